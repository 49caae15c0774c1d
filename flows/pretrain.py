"""Pre-train: freeze the cases, launch the ranks, follow them, and show losses, reconstructions and templates."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, Literal

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict, Field

from flows.artifacts import png_markdown, publish_markdown, publish_table
from flows.progress import Progress
from infra import storage
from models.config import RunningConfig
from models.store import open_store
from tasks.finetune import pretrained_digest, pretrained_network
from tasks.launch import launch
from tasks.pretraining import (
    PreparedTraining,
    data_wait_share,
    metrics_rows,
    prepare_training,
    probe_rows,
    with_targets,
)
from tasks.selection import select_cases
from tasks.splits import people_of, workspace_split

_log = logging.getLogger(__name__)

PICTURES_EVERY_S = 30.0
"""Between two publications of curves and pictures while a training runs."""


class PretrainParams(BaseModel):
    """Which store to pre-train on, with which recipe."""

    model_config = ConfigDict(extra="forbid", title="Pre-train")

    workspace: str = Field(
        "./state/demo",
        title="Workspace",
        description="Folder with the splits and the trainings; the training is written into <workspace>/trainings.",
        min_length=1,
        examples=["./state/demo"],
    )
    store: str = Field(
        "",
        title="Store",
        description="Path or URL of the Zarr store, on disk or s3://; empty: <workspace>/store.zarr.",
    )
    split: str = Field(
        "default",
        title="Split",
        description="Name of the split in <workspace>/splits, made when absent; letters, digits, dashes, underscores. "
        "Its test subjects are left out of the pre-training.",
        pattern=r"^[A-Za-z0-9_-]+$",
    )
    datasets: list[str] = Field(
        default_factory=list, title="Datasets", description="Only these datasets of the store; empty: all of them."
    )
    recipe: Literal["brainmvp_tiny", "brainmvp", "brainmvp_unet_tiny", "brainmvp_unet"] = Field(
        "brainmvp_tiny",
        title="Recipe",
        description="brainmvp: UniFormer-S on 8 GPUs; brainmvp_unet: UNET3D; with _tiny a small network on two CPU "
        "ranks.",
    )
    preset: Literal["recommended", "paper", "code"] = Field(
        "recommended",
        title="Preset",
        description="Values of the objective: ours with reasons (recommended), the paper's, or the released code's.",
    )
    init_from: str = Field(
        "",
        title="Start from",
        description="Name of a finished or imported training in <workspace>/trainings whose network and weights this "
        "one starts with; empty: the recipe's network, random weights.",
        pattern=r"^[A-Za-z0-9_-]*$",
    )
    name: str = Field(
        "",
        title="Name",
        description="Folder of the training, letters, digits, dashes and underscores; empty: the recipe's name.",
        pattern=r"^[A-Za-z0-9_-]*$",
    )
    epochs: int | None = Field(None, ge=1, title="Epochs", description="At least 1; empty: as the recipe says.")
    seed: int = Field(0, ge=0, le=2**31 - 1, title="Seed", description="From 0 to 2147483647.")
    ranks: int | None = Field(
        None, ge=1, le=64, title="Ranks", description="Processes on this host, from 1 to 64; empty: as the recipe says."
    )
    restarts: int = Field(
        1,
        ge=0,
        le=100,
        title="Restarts",
        description="How often a killed training is continued from its checkpoint in the same flow run, from 0 to 100.",
    )
    stall_seconds: int = Field(
        600,
        ge=30,
        le=86_400,
        title="Stall time",
        description="Seconds without any sign of life from the ranks after which they are stopped and the flow run "
        "fails, from 30 to 86400.",
    )
    loader_workers: int | None = Field(
        None,
        ge=0,
        le=64,
        title="Loader processes",
        description="Of each rank, from 0 to 64; empty: as the recipe says. The result does not depend on it.",
    )
    stage_dir: str = Field(
        "",
        title="Staging folder",
        description="Local folder of every node to which the selected cases are copied first; for stores on S3. "
        "Empty: the store is read where it is.",
    )
    stage_gib: float = Field(
        100.0,
        gt=0,
        title="Staging limit",
        description="GiB that the staging folder may hold, more than 0; cases that do not fit are refused.",
    )
    tensorboard: bool = Field(
        False, title="TensorBoard", description="Write event files into the training's folder `tensorboard`."
    )
    probe_target: str = Field(
        "",
        title="Probed phenotype",
        description="Column of the phenotypes (diagnosis, sex, age) that k-NN and linear probes of the features "
        "predict on the validation subjects; empty: no probes.",
    )
    probe_every: int = Field(
        10, ge=1, title="Probe every", description="Epochs between two probes, at least 1; one more is made at the end."
    )
    rank_limit: float = Field(
        1.5,
        ge=1,
        title="Rank limit",
        description="Warn of collapse when the effective rank of the features of the validation cases is below it, at "
        "least 1; 1 never warns.",
    )


def run_name(params: PretrainParams) -> str:
    """Return `pretrain <training> on <store>`."""
    return f"pretrain {params.name or params.recipe} on {store_url(params).rstrip('/').rsplit('/', 1)[-1]}"


def _run_name() -> str:
    params = runtime.flow_run.parameters["params"]
    return run_name(params if isinstance(params, PretrainParams) else PretrainParams.model_validate(params))


def store_url(params: PretrainParams) -> str:
    """Return the store's URL; a local one is absolute, because the ranks run in another folder."""
    url = params.store or str(Path(params.workspace) / "store.zarr")
    return str(storage.local_path(url).resolve()) if storage.is_local(url) else url


@flow(name="pretrain", flow_run_name=_run_name)
def pretrain(params: PretrainParams) -> dict[str, Any]:
    """Pre-train an encoder; a finished training is found done, an interrupted one continues from its checkpoint.

    Raises TrainingExistsError when a training of that name has another config, and TrainingFailed with the reason and
    the log's end when the ranks fail.
    """
    prepared = prepare(params)
    launched = not prepared.is_finished()
    train_encoder(prepared, params.restarts, params.stall_seconds)
    publish(prepared)
    done = prepared.done()
    return {
        "training": prepared.config.name,
        "folder": str(prepared.folder),
        "weights_digest": done["weights_digest"],
        "steps": done["step"],
        "metrics": done["metrics"],
        "launched": launched,
    }


def prepare(params: PretrainParams) -> PreparedTraining:
    """Choose the cases, build the config and write the training's folder."""
    from models.recipes import find_recipe

    workspace, url = Path(params.workspace).resolve(), store_url(params)
    cases = open_store(url).cases()
    people = people_of(cases.to_pandas(), workspace)
    split, _ = workspace_split(workspace, params.split, url, people)
    selected = select_cases(cases, split, params.datasets or None, drop_test=True)
    if params.probe_target:
        selected = with_targets(selected, people, params.probe_target)
    name = params.name or params.recipe
    folder = workspace / "trainings" / name
    optional = {"epochs": params.epochs, "world_size": params.ranks, "workers": params.loader_workers}
    overrides = {key: value for key, value in optional.items() if value is not None}
    overrides |= _start(workspace, params.init_from)
    config = find_recipe(params.recipe)(
        url,
        str(folder / "selection.parquet"),
        preset=params.preset,
        name=name,
        seed=params.seed,
        running=running(params),
        **overrides,
    )
    return prepare_training(folder, config, selected)


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
def train_encoder(prepared: PreparedTraining, restarts: int = 1, stall_seconds: float = 600.0) -> None:
    """Run the ranks to the end of the training and follow them; nothing to do when it is finished."""
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

        launch([prepared.folder], prepared.config.world_size, show, restarts=restarts, stall_seconds=stall_seconds)


def publish(prepared: PreparedTraining) -> None:
    """Publish loss curves, pictures and the validation table of a training, as far as there are any."""
    from tasks.figures import loss_curves

    name, records = prepared.config.name, prepared.metrics()
    if any(line["kind"] == "train" for line in records):
        picture = png_markdown(loss_curves(records, name), f"losses of {name}")
        waited = f"Waiting for data: {data_wait_share(records) or 0:.1%} of the step time."
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
}
