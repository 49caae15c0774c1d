"""Preparing a training folder: freeze the cases once, write run.json once, refuse a folder made for something else."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from infra.storage import write_bytes
from models.config import TrainingConfig, deciding
from models.records import OLDEST, SelectedCase
from models.schedule import plan_steps
from models.selection import SelectionError, read_selection, selection_digest, write_selection
from tasks.folds import fold_of

_log = logging.getLogger(__name__)
RUN = "run.json"


class TrainingExistsError(ValueError):
    """A training folder holds another training than the one that is asked for."""


@dataclass(frozen=True)
class PreparedTraining:
    """A folder that `tasks.launch.launch` can run."""

    folder: Path
    config: TrainingConfig
    selection: list[SelectedCase]
    ranks: int
    """Processes that run it now: those of its config, or another number when it is continued."""

    @property
    def total_steps(self) -> int:
        """Optimiser steps from the beginning to the end."""
        return plan_steps(self.config, self.count("train"), self.config.world_size).total_steps

    def count(self, role: str) -> int:
        """Return the number of cases with a role."""
        return sum(case.role == role for case in self.selection)

    def is_finished(self) -> bool:
        """Whether done.json says that this very training has ended."""
        done = self.done()
        wanted = {"config_digest": self.config.content_digest(), "selection_digest": selection_digest(self.selection)}
        return all(done.get(key) == value for key, value in wanted.items())

    def done(self) -> dict[str, Any]:
        """Return done.json, or an empty dict while the training is not finished."""
        path = self.folder / "done.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def metrics(self) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl."""
        from models.metrics import read_metrics

        return read_metrics(self.folder)


def prepare_training(folder: Path, config: TrainingConfig, cases: Sequence[SelectedCase]) -> PreparedTraining:
    """Write selection.parquet, then run.json; a folder that has both is taken as it is.

    The selection is frozen, and so are the digests of what it was made from: cases that came into the store later are
    not trained on, and a log line says so. What else decides no weight (loader processes, `running`) is taken from the
    new config, and its `world_size` runs the training from now on, while a step keeps the cases that it had. Raises
    TrainingExistsError naming the first other setting in which an existing training differs, ValueError for ranks to
    which the cases of a step cannot be dealt.
    """
    selection, run = folder / "selection.parquet", folder / RUN
    if not run.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_selection(selection, cases)
        write_bytes(str(run), _as_file(config))
        return PreparedTraining(folder, config, read_selection(selection), config.world_size)
    before, ranks = json.loads(run.read_text(encoding="utf-8")), config.world_size
    config = config.replace(world_size=before.get("world_size", ranks))
    _check_same(folder, before, config)
    config, frozen = config.replace(made_from=before.get("made_from", {})), read_selection(selection)
    plan_steps(config, sum(case.role == "train" for case in frozen), ranks)
    if run.read_bytes() != (written := _as_file(config)):
        write_bytes(str(run), written)
    if selection_digest(frozen) != selection_digest(cases):
        _log.warning(
            "training %s keeps its frozen selection of %d cases; the store and split would now give %d",
            folder.name,
            len(frozen),
            len(cases),
        )
    return PreparedTraining(folder, config, frozen, ranks)


def _as_file(config: TrainingConfig) -> bytes:
    return (config.model_dump_json(indent=1) + "\n").encode()


def _check_same(folder: Path, existing: dict[str, Any], config: TrainingConfig) -> None:
    from models.checkpoint import first_difference

    if different := first_difference(deciding(existing), deciding(config.model_dump(mode="json"))):
        raise TrainingExistsError(
            f"training {folder.name!r} exists with another config: {different}; "
            "choose another name, or give the parameters that it was started with"
        )


def metrics_rows(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one table row per validation, newest last: step, epoch, every metric, and what people were warned of."""
    return [
        {
            **{key: line[key] for key in ("step", "epoch")},
            **{k: round(v, 4) for k, v in line["metrics"].items()},
            **({"warning": line["warning"]} if "warning" in line else {}),
        }
        for line in records
        if line["kind"] == "val"
    ]


def hold_out(cases: Sequence[SelectedCase], folds: pd.DataFrame, fold: int) -> list[SelectedCase]:
    """Return the cases with the roles of a cross-validation: those of one fold validate, all others train.

    folds: columns dataset, subject, fold. A case whose subject is in no fold is left out. Raises SelectionError when
    no case trains, or none is held out.
    """
    of = fold_of(folds)
    known = [case for case in cases if (case.dataset, case.subject) in of]
    held = [case.replace(role="val" if of[case.dataset, case.subject] == fold else "train") for case in known]
    for role, what in (("val", "is held out"), ("train", "is left to train")):
        if not any(case.role == role for case in held):
            raise SelectionError(
                f"no case of the {len(cases)} that may be used {what} with fold {fold}; ask for other folds, or widen "
                "the datasets"
            )
    return held


def check_fold(folder: Path, cases: Sequence[SelectedCase]) -> None:
    """Raise TrainingExistsError when a training in the folder holds out other cases than these do."""
    if not (folder / "selection.parquet").exists():
        return
    frozen = {(case.dataset, case.case): case.role for case in read_selection(folder / "selection.parquet")}
    if moved := [case for case in cases if frozen.get((case.dataset, case.case), case.role) != case.role]:
        raise TrainingExistsError(
            f"training {folder.name!r} exists with another fold: case {moved[0].dataset}/{moved[0].case} has role "
            f"{frozen[moved[0].dataset, moved[0].case]!r} there, {moved[0].role!r} now; choose another name, or give "
            "the fold that it was started with"
        )


def with_images(cases: Sequence[SelectedCase], stored: pa.Table) -> list[SelectedCase]:
    """Return the cases that have an image; a log line counts those with a connectome alone, from which no pre-training
    learns.

    stored: cases.parquet of the store. Raises SelectionError when no training case has an image.
    """
    lines = stored.select(["dataset", "row", "modalities"]).to_pylist()
    seen = {(line["dataset"], line["row"]) for line in lines if line["modalities"]}
    kept = [case for case in cases if (case.dataset, case.row) in seen]
    if not any(case.role == "train" for case in kept):
        raise SelectionError(
            f"none of the training cases has an image ({len(cases)} cases, with connectomes alone); pre-training needs "
            "images: add them to the catalog and preprocess again"
        )
    if left := len(cases) - len(kept):
        _log.warning("%d of %d cases have a connectome and no image: they are left out", left, len(cases))
    return kept


def with_ages(cases: Sequence[SelectedCase], people: pd.DataFrame) -> list[SelectedCase]:
    """Return the cases with the age in years of their line in the phenotypes; None where it is not known.

    people: a line a case (columns dataset, case). Raises ValueError naming a case whose age is none of a human.
    """
    if "age" not in people:
        return list(cases)
    ages = _by_case(people, "age")
    return [_with_age(case, ages.get((case.dataset, case.case))) for case in cases]


def _with_age(case: SelectedCase, age: Any) -> SelectedCase:
    if age is None or pd.isna(age):
        return case
    if not 0 <= age <= OLDEST:
        raise ValueError(
            f"case {case.dataset}/{case.case} has age {age:g} in the phenotypes, in years from 0 to {OLDEST} are "
            "possible; correct it there (months, days?)"
        )
    return case.replace(age=float(age))


def with_targets(cases: Sequence[SelectedCase], people: pd.DataFrame, column: str) -> list[SelectedCase]:
    """Return the cases with a phenotype as target, empty where it is not known; probes of the features need it.

    people: a line a case (columns dataset, case) with its phenotypes. Raises ValueError for a column that is not there.
    """
    if column not in people:
        raise ValueError(
            f"probe_target {column!r} is no column of the phenotypes; known: {', '.join(map(str, people.columns))}"
        )
    known = {case: _target(value) for case, value in _by_case(people, column).items()}
    return [case.replace(target=known.get((case.dataset, case.case), "")) for case in cases]


def _by_case(people: pd.DataFrame, column: str) -> dict[tuple[str, str], Any]:
    return {(dataset, case): value for dataset, case, value in people[["dataset", "case", column]].itertuples(False)}


def _target(value: Any) -> str:
    if pd.isna(value):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def data_wait_share(records: Sequence[dict[str, Any]]) -> float | None:
    """Return the share of the logged steps' time in which the ranks waited for data; None before the first step."""
    steps = [line for line in records if line["kind"] == "train"]
    seconds = sum(line["seconds"] for line in steps)
    return min(1.0, sum(line["data_wait_seconds"] for line in steps) / seconds) if seconds else None


def probe_rows(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one table row per probe of the frozen features, newest last."""
    return [
        {
            **{key: line[key] for key in ("step", "epoch", "measure")},
            **{name.removeprefix("probe_"): round(value, 4) for name, value in line["metrics"].items()},
            **{key: line[key] for key in ("n_train", "n_val")},
        }
        for line in records
        if line["kind"] == "probe"
    ]
