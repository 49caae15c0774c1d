"""Reading what a finished training predicted for its test cases.

A training keeps `predictions/predictions.parquet`: one line a case with its `file`, an .npz beside it (`regions`: masks
(R, X, Y, Z) on the stored extent), and, for a classification, one `prob_<class>` column a class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.records import SelectedCase
from tasks.scores import ScoreError


def read_regions(training: Path, case: SelectedCase) -> npt.NDArray[Any]:
    """Return the predicted masks (R, X, Y, Z) of one case; raises ScoreError naming what is missing."""
    table = _read_table(training)
    if (case.dataset, case.case) not in table.index:
        raise _absent(training, [(case.dataset, case.case)])
    path = training / "predictions" / str(table.loc[(case.dataset, case.case), "file"])
    if not path.exists():
        raise ScoreError(f"case {case.case}: {path} is missing; run the training's prediction again")
    with np.load(path, allow_pickle=False) as arrays:
        return np.asarray(arrays["regions"])


def read_probabilities(
    training: Path, cases: Sequence[SelectedCase], classes: Sequence[str]
) -> npt.NDArray[np.float64]:
    """Return the probabilities (N, K) of the cases in order, from predictions.parquet; a missing case is an error."""
    table = _read_table(training)
    columns = [f"prob_{name}" for name in classes]
    if absent := [name for name in columns if name not in table.columns]:
        raise ScoreError(f"{training.name}: predictions.parquet lacks the columns {absent}; other classes were trained")
    keys = [(case.dataset, case.case) for case in cases]
    if missing := [key for key in keys if key not in table.index]:
        raise _absent(training, missing)
    return table.reindex(pd.MultiIndex.from_tuples(keys))[columns].to_numpy(dtype=np.float64)


def _read_table(training: Path) -> pd.DataFrame:
    path = training / "predictions" / "predictions.parquet"
    if not path.exists():
        raise ScoreError(f"{training.name}: {path} is missing; run the training's prediction again")
    return pd.read_parquet(path).set_index(["dataset", "case"])


def _absent(training: Path, missing: Sequence[tuple[str, str]]) -> ScoreError:
    return ScoreError(
        f"{training.name}: no prediction for {len(missing)} test cases, first {missing[0]}; predict again"
    )


def predictions_digest(training: Path) -> str:
    """Return the SHA-256 over the names and bytes of all files in `<training>/predictions`."""
    total = hashlib.sha256()
    for path in sorted((training / "predictions").glob("*")):
        total.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()
