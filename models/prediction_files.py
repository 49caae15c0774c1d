"""The predictions in a training's folder: what lies where, reading it, and whether it can be read. Imports no torch.

`predictions/predictions.parquet` has one line a test case with its `file`, an .npz beside it (`regions`: masks
(R, X, Y, Z) on the stored extent), and, for a classification, one `prob_<class>` column a class. The columns of PLACE
say which case was predicted and where its voxels lie; tables from before there were any are predicted again.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from models.config import TrainingConfig
from models.selection import of_role, read_selection

if TYPE_CHECKING:
    from models.store import StoredCase

FOLDER = "predictions"
TABLE = "predictions.parquet"
REGIONS = "regions"
"""Name of the masks in an .npz."""
PLACE = ("digest", "extent", "affine")
"""Columns: digest of the case as it was predicted, its voxels by axis, and its affine (16 numbers, row by row)."""
REMEDY = "delete it and run evaluate again: what is missing is predicted again from the training's weights"

GRID_ATOL = 1e-4
"""Millimetres by which two affines of one grid may differ."""

CaseKey = tuple[str, str]
"""Dataset and case."""


class PredictionError(ValueError):
    """A prediction is missing or cannot be read; says which file, and what to do."""


def place_of(stored: StoredCase) -> dict[str, Any]:
    """Return the columns of PLACE of a stored case."""
    return {"digest": stored.digest, "extent": list(stored.extent), "affine": stored.affine.ravel().tolist()}


def check_place(table: Path, line: Mapping[str, Any], stored: StoredCase) -> None:
    """Raise PredictionError when a line (columns of PLACE) was predicted on another grid, or of another case."""
    ours = place_of(stored)
    if list(line["extent"]) != ours["extent"] or not np.allclose(line["affine"], ours["affine"], atol=GRID_ATOL):
        raise PredictionError(
            f"{table}: {stored.case} was predicted on another grid, of {_grid(line)}; the store has it on "
            f"{_grid(ours)}; {REMEDY}"
        )
    check_digest(table, line, stored.digest, stored.case)


def check_digest(table: Path, line: Mapping[str, Any], digest: str, case: str) -> None:
    """Raise PredictionError unless a line was predicted from the case of this digest."""
    if line["digest"] != digest:
        raise PredictionError(
            f"{table}: {case} was predicted as digest {str(line['digest'])[:12]}, asked is the case with digest "
            f"{digest[:12]}: another one, or preprocessed anew; {REMEDY}"
        )


def _grid(place: Mapping[str, Any]) -> str:
    affine = np.round(np.reshape(place["affine"], (4, 4))[:3], 3).tolist()
    return f"{' x '.join(map(str, place['extent']))} voxels with the affine {affine}"


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


def read_masks(path: Path, extent: Sequence[int]) -> NDArray[Any]:
    """Return the masks (R, X, Y, Z) of one file; raises PredictionError, also for another extent (X, Y, Z)."""
    _check_file(path, extent)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return np.asarray(arrays[REGIONS])
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise PredictionError(f"{path} cannot be read ({_first_line(error)}); {REMEDY}") from error


def damage(training: Path, config: TrainingConfig) -> str:
    """Return why the predictions of a finished training cannot be used, with the file; empty when they can.

    Of masks the head of each file is looked at, not the voxels. A training that predicts nothing has no damage.
    """
    if not config.predict:
        return ""
    is_segmentation = config.objective.kind == "segmentation"
    columns = ["file"] if is_segmentation else [f"prob_{name}" for name in getattr(config.objective, "classes", ())]
    try:
        lines = read_lines(training, [*columns, *PLACE])
        for case in of_role(read_selection(config.data.selection), "test"):
            line = lines.get((case.dataset, case.case))
            if line is None:
                return f"{training / FOLDER / TABLE} has no line of case {case.case} of {case.dataset}"
            check_digest(training / FOLDER / TABLE, line, case.digest, case.case)
            if is_segmentation:
                _check_file(training / FOLDER / str(line["file"]), tuple(line["extent"]))
    except PredictionError as error:
        return str(error)
    return ""


def _check_file(path: Path, extent: Sequence[int]) -> None:
    """Raise PredictionError unless the file is there, whole by its directory, and has masks of this extent."""
    if not path.exists():
        raise PredictionError(f"{path} is missing; run evaluate again: it is predicted again")
    try:
        with zipfile.ZipFile(path) as archive:
            shape = _shape(archive) if f"{REGIONS}.npy" in archive.namelist() else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise PredictionError(f"{path} cannot be read ({_first_line(error)}); {REMEDY}") from error
    if shape is None:
        raise PredictionError(f"{path} has no array {REGIONS!r}; {REMEDY}")
    if shape[1:] != tuple(extent):
        raise PredictionError(
            f"{path} has masks of shape {shape}, its case has {tuple(extent)} voxels (regions, x, y, z are needed); "
            f"{REMEDY}"
        )


def _shape(archive: zipfile.ZipFile) -> tuple[int, ...]:
    """Return the shape of the masks, from the head of their array."""
    with archive.open(f"{REGIONS}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)[0]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
