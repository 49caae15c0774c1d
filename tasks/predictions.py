"""Reading what a finished training predicted for its test cases; the files are those of models.prediction_files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.prediction_files import (
    FOLDER,
    PLACE,
    TABLE,
    CaseKey,
    PredictionError,
    check_digest,
    check_place,
    read_lines,
    read_masks,
)
from models.records import SelectedCase
from models.store import StoredCase
from tasks.scores import ScoreError


def read_regions(training: Path, case: SelectedCase, stored: StoredCase) -> npt.NDArray[Any]:
    """Return the predicted masks (R, X, Y, Z) of one case on the extent that is stored of it.

    Raises ScoreError naming the file that is missing or damaged, or that was predicted on another grid or from a case
    of another digest.
    """
    (line,) = _lines(training, [case], ["file", *PLACE])
    try:
        check_place(training / FOLDER / TABLE, line, stored)
        return read_masks(training / FOLDER / str(line["file"]), stored.extent)
    except PredictionError as error:
        raise ScoreError(f"case {case.case}: {error}") from error


def read_probabilities(
    training: Path, cases: Sequence[SelectedCase], classes: Sequence[str]
) -> npt.NDArray[np.float64]:
    """Return the probabilities (N, K) of the cases in order.

    Raises ScoreError naming what is missing, damaged, or predicted from a case of another digest.
    """
    columns = [f"prob_{name}" for name in classes]
    lines = _lines(training, cases, [*columns, *PLACE])
    try:
        for case, line in zip(cases, lines, strict=True):
            check_digest(training / FOLDER / TABLE, line, case.digest, case.case)
    except PredictionError as error:
        raise ScoreError(f"{training.name}: {error}") from error
    return np.array([[line[name] for name in columns] for line in lines], dtype=np.float64)


def _lines(training: Path, cases: Sequence[SelectedCase], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Return the lines of the cases in order."""
    try:
        table = read_lines(training, columns)
    except PredictionError as error:
        raise ScoreError(f"{training.name}: {error}") from error
    keys: list[CaseKey] = [(case.dataset, case.case) for case in cases]
    if missing := [key for key in keys if key not in table]:
        raise ScoreError(
            f"{training.name}: no prediction for {len(missing)} test cases, first {missing[0]}; run evaluate again: "
            "what is missing is predicted again"
        )
    return [table[key] for key in keys]


def predictions_digest(training: Path) -> str:
    """Return the SHA-256 over the names and bytes of all files in `<training>/predictions`."""
    total = hashlib.sha256()
    for path in sorted((training / FOLDER).glob("*")):
        total.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
