"""Pre-train: freeze the cases, launch the ranks, follow them, and show losses, reconstructions and templates."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from prefect import flow, runtime, task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict, Field

from flows.artifacts import png_markdown, publish_markdown, publish_table
from flows.progress import Progress
from infra import storage
from models.store import open_store
from tasks.launch import launch
from tasks.pretraining import PreparedTraining, metrics_rows, prepare_training
from tasks.selection import select_cases
from tasks.splits import people_of, workspace_split

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
    recipe: Literal["brainmvp_tiny", "brainmvp"] = Field(
        "brainmvp_tiny",
        title="Recipe",
        description="brainmvp_tiny: a small network on two CPU ranks; brainmvp: UniFormer-S on 8 GPUs.",
    )
    preset: Literal["recommended", "paper", "code"] = Field(
        "recommended",
        title="Preset",
        description="Values of the objective: ours with reasons (recommended), the paper's, or the released code's.",
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
    train_encoder(prepared, params.restarts)
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
    split, _ = workspace_split(workspace, params.split, url, people_of(cases.to_pandas(), workspace))
    selected = select_cases(cases, split, params.datasets or None, drop_test=True)
    name = params.name or params.recipe
    folder = workspace / "trainings" / name
    optional = {"epochs": params.epochs, "world_size": params.ranks}
    overrides = {key: value for key, value in optional.items() if value is not None}
    config = find_recipe(params.recipe)(
        url, str(folder / "selection.parquet"), preset=params.preset, name=name, seed=params.seed, **overrides
    )
    return prepare_training(folder, config, selected)


@task(name="train", task_run_name="train {prepared.config.name}", cache_policy=NO_CACHE)
def train_encoder(prepared: PreparedTraining, restarts: int = 1) -> None:
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
            if line["kind"] == "val" and time.monotonic() - shown_at >= PICTURES_EVERY_S:
                shown_at = time.monotonic()
                publish(prepared)

        launch([prepared.folder], prepared.config.world_size, show, restarts=restarts)


def publish(prepared: PreparedTraining) -> None:
    """Publish loss curves, pictures and the validation table of a training, as far as there are any."""
    from tasks.figures import loss_curves

    name, records = prepared.config.name, prepared.metrics()
    if any(line["kind"] == "train" for line in records):
        picture = png_markdown(loss_curves(records, name), f"losses of {name}")
        publish_markdown(f"losses-{name}", f"## Losses of {name}\n\n{picture}\n", "Losses by optimiser step")
    for path in sorted((prepared.folder / "pictures").glob("*.png")):
        picture = png_markdown(path.read_bytes(), f"{path.stem} of {name}")
        text = f"## {path.stem.capitalize()} of {name}\n\n{picture}\n"
        publish_markdown(f"{path.stem}-{name}", text, CAPTIONS.get(path.stem, ""))
    if rows := metrics_rows(records):
        publish_table(f"validation-{name}", rows, f"Validation of {name}")


CAPTIONS = {
    "reconstruction": "A validation case a row: input and output of view 1 (masked blocks from the template), input "
    "and output of view 2 (masked blocks from another modality), target.",
    "templates": "Learned templates, a modality a row: sagittal, coronal and axial middle slices.",
}
