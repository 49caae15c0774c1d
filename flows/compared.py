"""What the flows of probes and prompts share: rows of trainings in their forms, who may be tested, and the page."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pandas as pd
from pydantic import ConfigDict, Field, model_validator

from flows.forms import Form
from infra.storage import write_bytes
from models.selection import read_selection
from models.store import Store
from tasks.benchmarks import Benchmark
from tasks.embeddings import EncoderSource
from tasks.finetune import read_json
from tasks.methods_text import MethodsText
from tasks.phenotype_layouts import read_layout, with_layouts
from tasks.probe_cohort import ProbeCohort, seen_subjects
from tasks.probe_report import probe_report
from tasks.probing import EncoderRow
from tasks.report import TableSection, write_report
from tasks.rows import RESERVED, Run
from tasks.seen_prints import seen_elsewhere
from tasks.splits import Subject, people_of
from tasks.summary import SCRATCH

TrainingName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]
OF_FOLDERS = re.compile(r"labels[0-9]|native(-|$)")
"""How the names of trainings on fewer labels, and of native scores, go on after that of their benchmark."""


class TrainingRow(Form):
    """One row of the tables: trainings that repeat each other, or members of an ensemble."""

    model_config = ConfigDict(title="Row")

    name: str = Field(
        title="Name",
        description="What the tables call it, 1 to 40 characters, printable, not = + - or @ first; not the name of a "
        "row that every table has.",
        min_length=1,
        max_length=40,
        examples=["AnatCL global"],
    )
    trainings: list[TrainingName] = Field(
        title="Trainings",
        description="Names of finished or imported trainings in `<workspace>/trainings`, at least one.",
        min_length=1,
        examples=[["anatcl-seed0", "anatcl-seed1"]],
    )
    together: Literal["seeds", "ensemble"] = Field(
        "seeds",
        title="Together",
        description="seeds: repetitions, whose scores are averaged in every fold. ensemble: one model (the released "
        "folds), whose predictions are averaged.",
    )

    @model_validator(mode="after")
    def _printable(self) -> Self:
        check_printable(self.name)
        return self


class RunRow(Form):
    """One pre-training as a row of the tables."""

    model_config = ConfigDict(title="Run")

    training: TrainingName = Field(
        title="Training",
        description="Name of a finished or imported training in `<workspace>/trainings`.",
        examples=["brainmvp_tiny"],
    )
    name: str = Field(
        "",
        title="Name",
        description="What the tables call it, at most 40 characters, printable, not = + - or @ first; empty: the "
        "training's name.",
        max_length=40,
        examples=["BrainMVP"],
    )
    repeats: list[TrainingName] = Field(
        default_factory=list,
        title="Repeats",
        description="Further trainings of the same recipe that differ in their seed: one row with the first, scores "
        "averaged.",
        exclude_if=lambda value: not value,
        examples=[["brainmvp-seed1", "brainmvp-seed2"]],
    )

    @model_validator(mode="after")
    def _named(self) -> Self:
        self.name = self.name or self.training
        check_printable(self.name)
        return self

    @property
    def trainings(self) -> list[str]:
        """All trainings of the row."""
        return [self.training, *self.repeats]

    def in_folder(self, trainings: Path) -> Run:
        """Return the run, whose trainings lie in a folder."""
        first, *others = (trainings / name for name in self.trainings)
        return Run(self.name, first, tuple(others))


def check_printable(name: str) -> None:
    """Raise ValueError for a name that would break the lines of a table, or be a formula in a spreadsheet."""
    if not name.isprintable():
        raise ValueError(f"{name!r} has a line break or a character that cannot be printed; leave it out")
    if name.lstrip().startswith(("=", "+", "-", "@")):
        raise ValueError(f"{name!r} begins as a formula of a spreadsheet does; begin with a letter or digit")


def check_runs_once(runs: Sequence[RunRow]) -> None:
    """Raise ValueError when one training stands in two rows."""
    trainings = [name for run in runs for name in run.trainings]
    if twice := next((name for name in trainings if trainings.count(name) > 1), ""):
        raise ValueError(f"training {twice!r} is named in two rows, or twice in one; every training stands in one row")


def check_names(rows: Sequence[TrainingRow | RunRow], reserved: Collection[str]) -> None:
    """Raise ValueError when two rows are called alike, or one like a row that every table has."""
    if empty := next((row.name for row in rows if not slug(row.name)), ""):
        raise ValueError(f"{empty!r} has no letter a-z or digit, which the files of its scores are named by")
    names = [slug(row.name) for row in rows]
    if twice := next((row.name for row in rows if names.count(slug(row.name)) > 1), ""):
        raise ValueError(f"two rows are called like {twice!r}; names must differ in letters or digits")
    taken = {slug(name) for name in reserved}
    if wrong := next((row.name for row in rows if slug(row.name) in taken), ""):
        raise ValueError(f"{wrong!r} is the name of a row that every table has; call yours otherwise")


def check_tuned_names(rows: Sequence[RunRow]) -> None:
    """Raise ValueError as `check_names` does, and for names whose scores would lie in the files of others' scores."""
    check_names(rows, RESERVED)
    for row in rows:
        if slug(row.name).startswith(SCRATCH):
            raise ValueError(f"{row.name!r} starts as the names of rows from scratch do; call yours otherwise")
        if OF_FOLDERS.match(slug(row.name)):
            raise ValueError(
                f"{row.name!r} starts as what is kept of label_shares or native_scores; call yours otherwise"
            )


def slug(name: str) -> str:
    """Return the letters and digits of a name, as the files of its scores have them."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def encoder_row(row: TrainingRow, sources: Mapping[str, EncoderSource]) -> EncoderRow:
    """Return a row of frozen encoders, with the recipes of its trainings."""
    encoders = tuple(sources[name] for name in row.trainings)
    recipes = {str((read_json(one.folder / "run.json") or {}).get("recipe", "")) for one in encoders if one.folder}
    return EncoderRow(row.name, encoders, row.together, tuple(sorted(recipes)))


def people_and_seen(
    workspace: Path, store: Store, layouts: Sequence[str], trainings: Iterable[Path]
) -> tuple[pd.DataFrame, dict[Subject, str], tuple[str, ...]]:
    """Return the cases of a store with their phenotypes, the subjects that these trainings have seen, with why, and
    sentences on what of that could not be looked for."""
    folders = list(trainings)
    own = [read_layout(Path(path)) for path in layouts]
    people = with_layouts(people_of(store.cases().to_pandas(), workspace), own)
    elsewhere = seen_elsewhere({folder.name: [folder] for folder in folders}, store)
    selections = [read_selection(folder / "selection.parquet") for folder in folders]
    return people, seen_subjects(selections, workspace, store.url, elsewhere.links), elsewhere.notes


def write_page(
    path: Path,
    title: str,
    store: Store,
    rows: Sequence[EncoderRow],
    sections: Sequence[TableSection],
    registered: Mapping[str, Benchmark],
    empty: Callable[[ProbeCohort], TableSection],
    notes: Sequence[str],
    date: str,
    methods: MethodsText,
) -> dict[str, Any]:
    """Write the report of a comparison at `<workspace>/<folder>/index.html` and return what the flow returns of it.

    `methods.md` is written beside.

    `empty` makes the section of a registered benchmark that was not asked for: it stands among those without data.
    """
    shown = [section for section in sections if section.table.has_scores]
    absent = [section for section in sections if not section.table.has_scores]
    named = {section.table.benchmark.name for section in sections}
    others = [empty(ProbeCohort(one, store)) for name, one in registered.items() if name not in named]
    workspace = path.parent.parent
    write_report(probe_report(title, workspace, store, rows, shown, [*absent, *others], notes, date, methods), path)
    write_bytes(str(path.parent / "methods.md"), methods.to_markdown().encode("utf-8"))
    return {
        "report": str(path),
        "tables": {section.table.benchmark.name: section.table.digest for section in sections},
        "no_data": [section.table.benchmark.name for section in absent],
    }
