"""Pre-train: freeze the cases, launch the ranks, follow them, and show losses, reconstructions and templates."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.artifacts import png_markdown, publish_markdown, publish_table
from flows.forms import params_of
from flows.gpu_turn import gpu_turn
from flows.launching import Launcher, launch_preview, launch_settings, launcher
from flows.pretrain_params import AGELESS, PretrainParams, run_name, store_url, training_name
from flows.progress import Progress
from infra import gauges
from models.config import RunningConfig
from models.gpu_turn import need_gpus
from models.store import open_store
from tasks.crosswalk import person_links
from tasks.finetune import pretrained_digest, pretrained_network
from tasks.folds import ensure_folds
from tasks.launch import launch as local_launch
from tasks.pretraining import (
    PreparedTraining,
    check_fold,
    data_wait_share,
    hold_out,
    metrics_rows,
    prepare_training,
    probe_rows,
    with_ages,
    with_images,
    with_targets,
)
from tasks.seen_prints import keep_fingerprints
from tasks.selection import select_cases
from tasks.splits import made_from, people_of, workspace_split

_log = logging.getLogger(__name__)

PICTURES_EVERY_S = 30.0
"""Between two publications of curves and pictures while a training runs."""


def _run_name() -> str:
    return run_name(params_of(PretrainParams))


@flow(name="pretrain", flow_run_name=_run_name)
def pretrain(params: PretrainParams) -> dict[str, Any]:
    """Pre-train an encoder; a finished training is found done, an interrupted one continues from its checkpoint.

    Raises TrainingExistsError when a training of that name has another config, and TrainingFailed with the reason and
    the log's end when the ranks fail.
    """
    settings = launch_settings(params.launch, params.nodes)
    launch = launcher(settings)
    prepared = prepare(params)
    launched = not prepared.is_finished()
    # SLURM has queues of its own.
    with nullcontext() if settings.launch == "slurm" else gpu_turn():
        train_encoder(prepared, params.restarts, params.stall_seconds, launch)
    publish(prepared)
    done = prepared.done()
    return {
        "training": prepared.config.name,
        "folder": str(prepared.folder),
        "weights_digest": done["weights_digest"],
        "steps": done["step"],
        "metrics": done["metrics"],
        "made_from": prepared.config.made_from.model_dump(),
        "launched": launched,
    }


def dry_run(params: PretrainParams) -> str:
    """Return what would be launched: a command, one per node, or the job script of SLURM; nothing is written."""
    from models.recipes import find_recipe

    folder = Path(params.workspace).resolve() / "trainings" / training_name(params)
    config = find_recipe(params.recipe)(store_url(params), str(folder / "selection.parquet"))
    settings = launch_settings(params.launch, params.nodes)
    return launch_preview(settings, folder, params.ranks or config.world_size, config.threads)


def prepare(params: PretrainParams) -> PreparedTraining:
    """Choose the cases, build the config and write the training's folder."""
    from models.recipes import find_recipe

    workspace, url = Path(params.workspace).resolve(), store_url(params)
    store = open_store(url)
    cases = store.cases()
    people = people_of(cases.to_pandas(), workspace)
    split, digest = workspace_split(workspace, params.split, url, people)
    links = person_links(workspace, url)
    selected = select_cases(cases, split, params.datasets or None, drop_test=True, links=links)
    selected = with_images(selected, cases)
    if params.fold is not None:
        selected = hold_out(selected, ensure_folds(workspace, params.split, url, people, params.folds), params.fold)
    if params.recipe not in AGELESS:
        selected = with_ages(selected, people)
    if params.probe_target:
        selected = with_targets(selected, people, params.probe_target)
    name = training_name(params)
    folder = workspace / "trainings" / name
    if params.fold is not None:
        check_fold(folder, selected)
    optional = {
        "epochs": params.epochs,
        "world_size": params.ranks,
        "batch_size": params.batch_size,
        "accumulation": params.accumulation,
        "precision": params.precision,
        "workers": params.loader_workers,
    }
    overrides: dict[str, Any] = {key: value for key, value in optional.items() if value is not None}
    overrides |= _start(workspace, params.init_from)
    overrides |= {"variant": params.variant} if params.variant else {}
    config = find_recipe(params.recipe)(
        url,
        str(folder / "selection.parquet"),
        preset=params.preset,
        name=name,
        seed=params.seed,
        running=running(params),
        made_from=made_from(workspace, params.split, digest),
        **overrides,
    )
    prepared = prepare_training(folder, config, selected)
    keep_fingerprints(folder, store, prepared.selection)
    return prepared


def _start(workspace: Path, name: str) -> dict[str, Any]:
    """Return the settings of a training that starts from another one; raises ValueError when that is not finished."""
    if not name:
        return {}
    folder = workspace / "trainings" / name
    pretrained_digest(folder)
    return {"init_from": str(folder), **pretrained_network(folder)}


def running(params: PretrainParams) -> RunningConfig:
    """Return how the training runs: what may differ when it is continued."""
    return RunningConfig(
        tensorboard=params.tensorboard,
        stage_dir=str(Path(params.stage_dir).resolve()) if params.stage_dir else "",
        stage_gib=params.stage_gib,
        rank_limit=params.rank_limit,
        probe_every=params.probe_every if params.probe_target else 0,
    )


@task(name="train", task_run_name="train {prepared.config.name}", cache_policy=NO_CACHE)
def train_encoder(
    prepared: PreparedTraining, restarts: int = 1, stall_seconds: float = 600.0, launch: Launcher = local_launch
) -> None:
    """Run the ranks to the end of the training and follow them; nothing to do when it is finished."""
    if not prepared.is_finished():
        need_gpus()
    with Progress("pretrain", prepared.total_steps, "steps") as progress:
        if prepared.is_finished():
            progress.update(prepared.total_steps, note="found finished")
            return
        shown_at = time.monotonic()

        def show(line: dict[str, Any]) -> None:
            nonlocal shown_at
            if line["kind"] == "train":
                progress.update(int(line["step"]), note=f"epoch {line['epoch']}, loss {line['losses']['loss']:.4f}")
            if warning := line.get("warning"):
                _log.warning("step %d: %s", line["step"], warning)
            if line["kind"] == "val" and time.monotonic() - shown_at >= PICTURES_EVERY_S:
                shown_at = time.monotonic()
                publish(prepared)

        launch([prepared.folder], prepared.ranks, show, restarts=restarts, stall_seconds=stall_seconds)


def publish(prepared: PreparedTraining) -> None:
    """Publish loss curves, pictures and the validation table of a training, as far as there are any."""
    from tasks.figures import loss_curves

    name, records = prepared.config.name, prepared.metrics()
    if any(line["kind"] == "train" for line in records):
        picture = png_markdown(loss_curves(records, name), f"losses of {name}")
        share = data_wait_share(records) or 0
        gauges.tell("brainloom_data_wait_share", name, share)
        waited = f"Waiting for data: {share:.1%} of the step time."
        publish_markdown(
            f"losses-{name}", f"## Losses of {name}\n\n{picture}\n\n{waited}\n", "Losses by optimiser step"
        )
    for path in sorted((prepared.folder / "pictures").glob("*.png")):
        picture = png_markdown(path.read_bytes(), f"{path.stem} of {name}")
        text = f"## {path.stem.capitalize()} of {name}\n\n{picture}\n"
        publish_markdown(f"{path.stem}-{name}", text, CAPTIONS.get(path.stem, ""))
    if probes := probe_rows(records):
        publish_table(f"probes-{name}", probes, f"Probes of the features of {name} on the validation cases")
    if rows := metrics_rows(records):
        publish_table(f"validation-{name}", rows, f"Validation of {name}")


CAPTIONS = {
    "reconstruction": "A validation case a row: input and output of view 1 (masked blocks from the template), input "
    "and output of view 2 (masked blocks from another modality), target.",
    "templates": "Learned templates, a modality a row: sagittal, coronal and axial middle slices.",
    "similarity": "Validation cases by rising age. Left: cosine of their embeddings; then the weights of each loss "
    "term. White: 1.",
    "restored": "A validation case a row: masked input, output, output in place of what was masked, target.",
    "views": "A validation case a row: the two views that attract each other, axial middle slices.",
    "view_cosines": "Cosines of first views (rows) and second views (columns) of validation cases, own pairs on the "
    "diagonal. White: 1.",
    "masking": "A validation case a row: input, the patches that the encoder saw, output. The background stays black.",
    "pairs": "Cosines of validation images (rows) and connectomes (columns), own pairs on the diagonal. White: 1.",
    "embedding": "Validation cases along the first two principal components of their features, coloured by age.",
}
