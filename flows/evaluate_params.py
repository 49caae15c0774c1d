"""What the evaluation flow is asked for: the form in the UI, and the name of a flow run."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from flows.forms import few, workspace_field
from tasks.benchmarks import BENCHMARKS, PHANTOM_BENCHMARKS
from tasks.label_efficiency import check_shares
from tasks.statistics import REPLICATES

BenchmarkName = Annotated[str, Field(json_schema_extra={"enum": list(BENCHMARKS)})]
"""The form offers the registered ones."""


class EvaluateParams(BaseModel):
    """Which pre-training to evaluate, on what, and with which budget."""

    model_config = ConfigDict(extra="forbid", title="Evaluate")

    workspace: str = workspace_field(
        "Folder with the store, the splits and the trainings; tables and report are written into it."
    )
    pretrained: str = Field(
        title="Pre-training",
        description="Name of a finished training in <workspace>/trainings whose encoder is fine-tuned.",
        pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$",
        examples=["brainmvp_tiny"],
    )
    benchmarks: list[BenchmarkName] = Field(
        default=list(PHANTOM_BENCHMARKS),
        title="Benchmarks",
        description="Names of registered benchmarks, at least one; those without data in the store show `no data`.",
        min_length=1,
        examples=[list(PHANTOM_BENCHMARKS)],
    )
    seeds: int = Field(3, ge=1, le=20, title="Seeds", description="Trainings of each row, from 1 to 20.")
    epochs: int | None = Field(
        None, ge=1, title="Epochs", description="Of every fine-tuning, at least 1; empty: as the recipe says."
    )
    lanes: int = Field(
        2, ge=1, le=64, title="Lanes", description="Fine-tunings that run at the same time on this host, from 1 to 64."
    )
    template_mix: bool = Field(
        False,
        title="Template mix",
        description="Train a third row at the same budget: pre-trained, learned templates mixed into the channels.",
    )
    missing_modalities: bool = Field(
        False,
        title="Missing modalities",
        description="Predict segmentations again without each modality: zeros against the learned template.",
    )
    native_scores: bool = Field(
        False,
        title="Native scores",
        description="Score segmentations a second time on the grids of their label files, which must still be there.",
    )
    label_shares: list[float] = Field(
        default_factory=list,
        title="Label shares",
        description="Train the benchmarks also on these shares of their training subjects, each above 0 and below 1, "
        "with as many optimiser steps; empty: on all of them alone.",
        examples=[[0.05, 0.1, 0.2, 0.4, 0.6, 0.8]],
    )
    split: str = Field(
        "default",
        title="Split",
        description="Name of the split in <workspace>/splits: letters, digits, dashes and underscores.",
        pattern=r"^[A-Za-z0-9_-]+$",
    )
    replicates: int = Field(
        REPLICATES, ge=200, le=100_000, title="Bootstrap replicates", description="From 200 to 100,000."
    )

    @field_validator("label_shares")
    @classmethod
    def _shares(cls, shares: list[float]) -> list[float]:
        check_shares(shares)
        return sorted(shares)


def run_name(params: EvaluateParams) -> str:
    """Return `evaluate <pre-training> on <benchmarks>`, shortened after three."""
    return f"evaluate {params.pretrained} on {few(params.benchmarks)}"
