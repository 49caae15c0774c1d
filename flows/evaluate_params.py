"""What the evaluation flow is asked for: the form in the UI, and the name of a flow run."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from flows.compared import RunRow, check_runs_once, check_tuned_names
from flows.forms import Form, few, workspace_field
from flows.launching import Launch
from flows.prediction_rows import PredictionRows, check_predictions
from tasks.benchmarks import BENCHMARKS, PHANTOM_BENCHMARKS
from tasks.label_efficiency import check_shares
from tasks.splits import NAME as SPLIT_NAME
from tasks.statistics import REPLICATES
from tasks.summary import PRETRAINED

ScratchNetwork = Literal["swin_unetr", "dynunet"]
MissingModalities = Annotated[
    bool,
    Field(
        title="Missing modalities",
        description="Predict segmentations again without each modality: zeros against the learned template.",
    ),
]
NativeScores = Annotated[
    bool,
    Field(
        title="Native scores",
        description="Score segmentations a second time on the grids of their label files, which must still be there.",
    ),
]
FinetuneLaunch = Annotated[
    Launch,
    Field(
        title="Launch of fine-tunings",
        description="Where each lane runs. local: on the host of this flow run; pool: a flow run in the work pool of "
        "`train-node`; slurm: a job. For pool and slurm the workspace is one folder for all hosts.",
        exclude_if=lambda value: value == "local",
    ),
]
BenchmarkName = Annotated[str, Field(json_schema_extra={"enum": list(BENCHMARKS)})]
"""The form offers the registered ones."""


class EvaluateParams(Form):
    """Which pre-training to evaluate, on what, and with which budget."""

    model_config = ConfigDict(title="Evaluate")

    workspace: str = workspace_field(
        "Folder with the store, the splits and the trainings; tables and report are written into it."
    )
    pretrained: str = Field(
        "",
        title="Pre-training",
        description="Name of a finished training in `<workspace>/trainings` whose encoder is fine-tuned: the row "
        "`pre-trained`; empty: the first of `runs` is the first row.",
        pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]*)?$",
        examples=["brainmvp_tiny"],
    )
    runs: list[RunRow] = Field(
        default_factory=list,
        title="Runs",
        description="Further pre-trainings as rows, at the same budget, each with its own network; the first row of "
        "all is tested against every other one.",
        exclude_if=lambda value: not value,
        examples=[[{"training": "brainmvp_unet_tiny", "name": "BrainMVP, U-Net"}]],
    )
    networks: list[ScratchNetwork] = Field(
        default_factory=list,
        title="Networks",
        description="Networks that segmentations train from scratch as further rows, at the same budget.",
        exclude_if=lambda value: not value,
        examples=[["swin_unetr", "dynunet"]],
    )
    benchmarks: list[BenchmarkName] = Field(
        default=list(PHANTOM_BENCHMARKS),
        title="Benchmarks",
        description="Names of registered benchmarks, at least one; those without data in the store show `no data`.",
        min_length=1,
        examples=[list(PHANTOM_BENCHMARKS)],
    )
    seeds: int = Field(
        3, ge=1, le=20, title="Seeds", description="Trainings of each row, or of each of its repeats, from 1 to 20."
    )
    epochs: int | None = Field(
        None, ge=1, title="Epochs", description="Of every fine-tuning, at least 1; empty: as the recipe says."
    )
    lanes: int = Field(
        2, ge=1, le=64, title="Lanes", description="Fine-tunings that run at the same time, from 1 to 64."
    )
    launch: FinetuneLaunch = "local"
    template_mix: bool = Field(
        False,
        title="Template mix",
        description="Train a further row at the same budget: the first one, learned templates mixed into the channels.",
    )
    missing_modalities: MissingModalities = False
    native_scores: NativeScores = False
    label_shares: list[float] = Field(
        default_factory=list,
        title="Label shares",
        description="Train the benchmarks also on these shares of their training subjects, each above 0 and below 1, "
        "with as many optimiser steps; empty: on all of them alone.",
        examples=[[0.05, 0.1, 0.2, 0.4, 0.6, 0.8]],
    )
    predictions: PredictionRows = Field(default_factory=list)
    split: str = Field(
        "default",
        title="Split",
        description="Name of the split in `<workspace>/splits`: letters, digits, dashes and underscores.",
        pattern=SPLIT_NAME,
    )
    replicates: int = Field(
        REPLICATES, ge=200, le=100_000, title="Bootstrap replicates", description="From 200 to 100,000."
    )

    @field_validator("label_shares")
    @classmethod
    def _shares(cls, shares: list[float]) -> list[float]:
        check_shares(shares)
        return sorted(shares)

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        if not self.rows:
            raise ValueError("name a finished training under `pretrained`, or several under `runs`")
        check_tuned_names(self.runs)
        check_runs_once(self.rows)
        check_predictions(self.predictions, self.runs, self.benchmarks)
        if twice := next((kind for kind in self.networks if self.networks.count(kind) > 1), ""):
            raise ValueError(f"network {twice!r} is named twice; every network is one row")
        return self

    @property
    def rows(self) -> list[RunRow]:
        """All pre-trainings in the order of their rows."""
        first = RunRow.model_construct(training=self.pretrained, name=PRETRAINED)
        return [first, *self.runs] if self.pretrained else self.runs

    @property
    def first(self) -> str:
        """Name of the first row, which the others are compared with."""
        return self.rows[0].name


def run_name(params: EvaluateParams) -> str:
    """Return `evaluate <pre-trainings> on <benchmarks>`, shortened after three each."""
    return f"evaluate {few(row.training for row in params.rows)} on {few(params.benchmarks)}"
