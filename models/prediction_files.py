"""The predictions in a training's folder: what lies where, reading it, and whether it can be read. Imports no torch.

`predictions/predictions.parquet` has one line a test case with its `file`, an .npz beside it (`regions`: masks
(R, X, Y, Z) on the stored extent), and, for a classification, one `prob_<class>` column a class.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from models.config import TrainingConfig
from models.selection import of_role, read_selection

FOLDER = "predictions"
TABLE = "predictions.parquet"
REGIONS = "regions"
"""Name of the masks in an .npz."""
REMEDY = "delete it and run evaluate again: what is missing is predicted again from the training's weights"

CaseKey = tuple[str, str]
"""Dataset and case."""


class PredictionError(ValueError):
    """A prediction is missing or cannot be read; says which file, and what to do."""


def read_lines(training: Path, columns: Sequence[str]) -> dict[CaseKey, dict[str, Any]]:
    """Return these columns of the table of predictions by dataset and case; raises PredictionError."""
    path = training / FOLDER / TABLE
    if not path.exists():
        raise PredictionError(f"{path} is missing; run evaluate again: it is predicted again")
    try:
        names = pq.read_schema(path).names
        wanted = ("dataset", "case", *columns)
        if absent := [name for name in wanted if name not in names]:
            raise PredictionError(f"{path} lacks the columns {absent}; {REMEDY}")
        lines = pq.read_table(path, columns=list(wanted)).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise PredictionError(f"{path} cannot be read ({_first_line(error)}); {REMEDY}") from error
    found: dict[CaseKey, dict[str, Any]] = {}
    for line in lines:
        key = (str(line["dataset"]), str(line["case"]))
        if key in found:
            raise PredictionError(f"{path} has two lines of case {key[1]} of {key[0]}; {REMEDY}")
        found[key] = line
    return found


def read_masks(path: Path) -> NDArray[Any]:
    """Return the masks (R, X, Y, Z) of one file; raises PredictionError."""
    _check_file(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays[REGIONS])
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise PredictionError(f"{path} cannot be read ({_first_line(error)}); {REMEDY}") from error


def damage(training: Path, config: TrainingConfig) -> str:
    """Return why the predictions of a finished training cannot be used, with the file; empty when they can.

    Of masks the directory of each file is looked at, not the voxels. A training that predicts nothing has no damage.
    """
    if not config.predict:
        return ""
    is_segmentation = config.objective.kind == "segmentation"
    columns = ["file"] if is_segmentation else [f"prob_{name}" for name in getattr(config.objective, "classes", ())]
    try:
        lines = read_lines(training, columns)
        for case in of_role(read_selection(config.data.selection), "test"):
            line = lines.get((case.dataset, case.case))
            if line is None:
                return f"{training / FOLDER / TABLE} has no line of case {case.case} of {case.dataset}"
            if is_segmentation:
                _check_file(training / FOLDER / str(line["file"]))
    except PredictionError as error:
        return str(error)
    return ""


def _check_file(path: Path) -> None:
    """Raise PredictionError unless the file is there, whole by its directory, and has masks."""
    if not path.exists():
        raise PredictionError(f"{path} is missing; run evaluate again: it is predicted again")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise PredictionError(f"{path} cannot be read ({_first_line(error)}); {REMEDY}") from error
    if f"{REGIONS}.npy" not in names:
        raise PredictionError(f"{path} has no array {REGIONS!r}; {REMEDY}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
