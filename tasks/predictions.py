"""Reading what a finished training predicted for its test cases; the files are those of models.prediction_files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.prediction_files import FOLDER, CaseKey, PredictionError, read_lines, read_masks
from models.records import SelectedCase
from tasks.scores import ScoreError


def read_regions(training: Path, case: SelectedCase) -> npt.NDArray[Any]:
    """Return the predicted masks (R, X, Y, Z) of one case; raises ScoreError naming what is missing or damaged."""
    (line,) = _lines(training, [case], ["file"])
    try:
        return read_masks(training / FOLDER / str(line["file"]))
    except PredictionError as error:
        raise ScoreError(f"case {case.case}: {error}") from error


def read_probabilities(
    training: Path, cases: Sequence[SelectedCase], classes: Sequence[str]
) -> npt.NDArray[np.float64]:
    """Return the probabilities (N, K) of the cases in order; raises ScoreError naming what is missing or damaged."""
    columns = [f"prob_{name}" for name in classes]
    lines = _lines(training, cases, columns)
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
