"""Predictions of others in the forms of evaluate and benchmark: a name, a benchmark, and a folder of label maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from flows.compared import RunRow, check_printable, check_tuned_names
from flows.forms import Form
from tasks.benchmarks import BENCHMARKS
from tasks.others import Others, check_folder

SEGMENTATIONS = [name for name, one in BENCHMARKS.items() if one.kind == "segmentation"]


class PredictionRow(Form):
    """Label maps that somebody else predicted, as a row of one benchmark's table."""

    model_config = ConfigDict(title="Predictions of others")

    name: str = Field(
        title="Name",
        description="What the tables call the row, at most 40 characters, printable, not = + - or @ first.",
        min_length=1,
        max_length=40,
        examples=["nnU-Net"],
    )
    benchmark: Annotated[str, Field(json_schema_extra={"enum": SEGMENTATIONS})] = Field(
        title="Benchmark",
        description="A segmentation among `benchmarks`.",
        examples=["brats2023-ped"],
    )
    folder: str = Field(
        title="Folder",
        description="On the host of the worker: one NIfTI label map a test case, `CASE.nii.gz` or `SUBJECT.nii.gz`, on "
        "the grid of a source scan or of the stored case.",
        min_length=1,
        examples=["/data/nnunet/predictions"],
    )

    @model_validator(mode="after")
    def _printable(self) -> Self:
        check_printable(self.name)
        return self

    @property
    def others(self) -> Others:
        """Where the label maps are."""
        return Others(self.name, self.benchmark, Path(self.folder).expanduser().resolve())

    @property
    def absolute(self) -> Self:
        """The same whatever the working folder of the worker that reads it."""
        return self.model_copy(update={"folder": str(self.others.folder)})


PredictionRows = Annotated[
    list[PredictionRow],
    Field(
        title="Predictions of others",
        description="Label maps of other people's networks as rows of segmentations, scored and tested as all are.",
        exclude_if=lambda value: not value,
        examples=[[{"name": "nnU-Net", "benchmark": "brats2023-ped", "folder": "/data/nnunet/predictions"}]],
    ),
]


def check_predictions(rows: Sequence[PredictionRow], runs: Sequence[RunRow], benchmarks: Sequence[str]) -> None:
    """Raise ValueError for a benchmark that is not asked for or is no segmentation, and for names that are taken."""
    for row in rows:
        if row.benchmark not in benchmarks:
            raise ValueError(
                f"predictions {row.name!r} are for {row.benchmark!r}, which is not among `benchmarks`: add it"
            )
        if row.benchmark not in BENCHMARKS or BENCHMARKS[row.benchmark].kind != "segmentation":
            raise ValueError(
                f"predictions {row.name!r} are for {row.benchmark!r}, which is no segmentation; label maps are scored "
                "for segmentations alone"
            )
    for name in dict.fromkeys(row.benchmark for row in rows):
        mine = [RunRow.model_construct(training="", name=row.name) for row in rows if row.benchmark == name]
        check_tuned_names([*mine, *runs])


def check_folders(rows: Sequence[PredictionRow], below: Path | None = None) -> None:
    """Raise ScoreError for a folder that is not there.

    below: a folder that all hosts share; only what lies in it is looked at, since the rest may be on another host.
    """
    for row in rows:
        if below is None or row.others.folder.is_relative_to(below):
            check_folder(row.others)
