"""Predictions of others as rows of a table: label maps in a folder, one NIfTI file a test case, such as nnU-Net writes.

They may lie on the grid of one of the case's source scans, or of the stored case (`brainloom store export` writes
those). Shape and affine are compared before anything is trained, voxels when they are scored. A map on the grid of a
scan is moved onto the stored grid by nearest neighbour, as the labels of the store were; native scores take it as it
is.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.prediction_files import CaseKey
from models.records import LABEL, SelectedCase, SourceFile
from tasks.affines import BadScanError, corner_gap_mm
from tasks.case_map import HERE, CaseMap
from tasks.export_nifti import from_grid, nearest, source_grids
from tasks.headers import HeaderError, is_nifti, read_header, stem
from tasks.label_schemes import scheme_labels
from tasks.scores import RowKey, ScoreError, region_masks
from tasks.trained_scores import RowToScore, gather_scores, score_regions

if TYPE_CHECKING:
    from tasks.evaluation import Cohort

GRID_MM = 0.1
"""Two affines are of one grid when they place no corner of the volume further apart."""
STORED = "the stored case"
Grid = tuple[tuple[int, ...], npt.NDArray[np.float64]]
"""Shape, and voxel -> RAS+ mm."""


@dataclass(frozen=True)
class Others:
    """Label maps that somebody predicted for the test cases of one benchmark."""

    name: str
    """Of the row."""
    benchmark: str
    folder: Path


def find_files(others: Others, cohort: Cohort) -> list[tuple[SelectedCase, Path]]:
    """Return the file of every test case, called `<case>`, `<subject>`, `<dataset>_<case>` or what `brainloom
    predictions` calls it, with `.nii.gz` or `.nii`.

    A subject's id names a case when the store has no other case of the subject and none that is called so. Other files
    are not looked at. Raises ScoreError for a folder that is not there, a case without a file and one with several.
    """
    check_folder(others)
    test = cohort.of_role("test")
    by_stem: dict[str, list[Path]] = {}
    for path in sorted(others.folder.iterdir()):
        if is_nifti(path.name):
            by_stem.setdefault(stem(path.name), []).append(path)
    names = _names(cohort, test)
    found: list[tuple[SelectedCase, Path]] = []
    missing: list[SelectedCase] = []
    for case in test:
        paths = [path for name in names[case.dataset, case.case] for path in by_stem.get(name, ())]
        if len(paths) > 1:
            raise ScoreError(
                f"{_words(others)}: case {case.case} has {len(paths)} files, {paths[0].name} and {paths[1].name} in "
                f"{others.folder}; one label map a test case is needed: move the other away"
            )
        found += [(case, path) for path in paths]
        missing += [] if paths else [case]
    if missing:
        own = names[missing[0].dataset, missing[0].case]
        raise ScoreError(
            f"{_words(others)}: {others.folder} has no label map for {len(missing)} of {len(test)} test cases, first "
            f"{missing[0].case} of {missing[0].dataset}; every test case needs one, called "
            f"{' or '.join(f'{name}.nii.gz' for name in own)}"
        )
    return found


def check_folder(others: Others) -> None:
    """Raise ScoreError for a folder that is not there."""
    if not others.folder.is_dir():
        raise ScoreError(f"{_words(others)}: {others.folder} is no folder on this host; correct `folder`")


def _names(cohort: Cohort, test: Sequence[SelectedCase]) -> dict[CaseKey, list[str]]:
    """Return what the file of each test case may be called, without names that could be another one's."""
    datasets = {case.dataset for case in test}
    stored = cohort.people[cohort.people["dataset"].isin(datasets)]
    cases, subjects = set(stored["case"]), Counter(zip(stored["dataset"], stored["subject"], strict=True))
    found: dict[CaseKey, list[str]] = {}
    for case in test:
        whole = f"{case.dataset}_{case.case}"
        own = [case.case, whole, f"{whole}_prediction"]
        alone = subjects[case.dataset, case.subject] == 1 and case.subject not in cases
        found[case.dataset, case.case] = [*own, *([case.subject] if alone else [])]
    shared = Counter(name for own in found.values() for name in own)
    return {key: [name for name in own if shared[name] == 1] for key, own in found.items()}


def check_others(others: Others, cohort: Cohort) -> None:
    """Raise ScoreError unless every test case has one file, on a grid that its case is known on; reads headers."""
    for case, path in find_files(others, cohort):
        try:
            header = read_header(str(path))
            _place(cohort, case, path, (tuple(header.shape[:3]), header.affine))
        except HeaderError as error:
            raise ScoreError(f"{_words(others)}: {path}: {error}; write it again as a NIfTI label map") from error
        except ScoreError as error:
            raise ScoreError(f"{_words(others)}: {error}") from error


def score_others(cohort: Cohort, folder: Path, work: CaseMap = HERE) -> tuple[pd.DataFrame, int]:
    """Return the long-form scores of the predictions of others of a cohort, and how many rows were computed now.

    They have one seed, 0. Files whose bytes are those of the last time are not scored again. Raises ScoreError naming
    file and case for what `find_files` and `check_others` refuse, and for voxels that are no labels of the scheme.
    """
    rows = []
    for one in cohort.others:
        files = find_files(one, cohort)
        paths = {(case.dataset, case.case): path for case, path in files}
        key = RowKey(cohort.benchmark.name, one.name, 0)
        rows.append(
            RowToScore(key, cohort, files_digest(files), partial(_score, cohort=cohort, paths=paths, work=work))
        )
    return gather_scores(rows, folder)


def _score(key: RowKey, cohort: Cohort, paths: Mapping[CaseKey, Path], work: CaseMap) -> pd.DataFrame:
    sent = cohort.for_workers()
    return score_regions(key, cohort, sent, partial(masks_of, sent, paths), work)


def files_digest(files: Sequence[tuple[SelectedCase, Path]]) -> str:
    """Return the SHA-256 over the cases and the bytes of their files."""
    total = hashlib.sha256(b"predictions of others\0")
    for case, path in files:
        total.update(f"{case.dataset}/{case.case}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def masks_of(cohort: Cohort, paths: Mapping[CaseKey, Path], case: SelectedCase) -> npt.NDArray[np.bool_]:
    """Return the regions (R, X, Y, Z) of a label map on the grid of the cohort's truth; raises ScoreError.

    That grid is the stored extent, or with `cohort.native` that of the label file, where a map that lies on the grid of
    its scan is not moved at all.
    """
    path = paths[case.dataset, case.case]
    values, affine = _read(path, case)
    on_stored = _place(cohort, case, path, (values.shape, affine)) == STORED
    benchmark = cohort.benchmark
    if unknown := set(np.unique(values).tolist()) - scheme_labels(benchmark.scheme):
        raise ScoreError(
            f"{path}, case {case.case}: label values {sorted(unknown)} are outside scheme {benchmark.scheme!r} (it "
            f"knows {sorted(scheme_labels(benchmark.scheme))}); write the label values of the dataset, not the "
            "network's own"
        )
    if on_stored:
        masks = region_masks(values, benchmark.regions, benchmark.scheme, case.case)
        return np.asarray(cohort.on_grid(case, masks), dtype=bool)
    if cohort.native is None:
        values = from_grid(cohort.dataset(case), case.row, values, affine)
    else:
        values = _as_label_file(values, affine, cohort.native.grid(case))
    return region_masks(values, benchmark.regions, benchmark.scheme, case.case)


def _as_label_file(values: npt.NDArray[np.uint8], affine: npt.NDArray[np.float64], grid: Grid) -> npt.NDArray[np.uint8]:
    shape, target = grid
    return values if _same((values.shape, affine), grid) else nearest(values, affine, shape, target)


def _read(path: Path, case: SelectedCase) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    from tasks.nifti import DEFAULT_MEMORY  # torch comes with these
    from tasks.prepare import read_label

    file = SourceFile(modality=LABEL, path=str(path), size_bytes=path.stat().st_size, etag="")
    try:
        volume = read_label(file, DEFAULT_MEMORY)
    except BadScanError as error:
        raise ScoreError(f"{path}, case {case.case}: {error}; a label map of finite integers is needed") from None
    return np.ascontiguousarray(volume.data.numpy()), volume.affine


def _place(cohort: Cohort, case: SelectedCase, path: Path, grid: Grid) -> str:
    """Return whose grid a file lies on: STORED, or a modality; raises ScoreError for another one."""
    stored = cohort.stored(case)
    known: dict[str, Grid] = {STORED: (stored.extent, stored.affine)}
    known |= source_grids(cohort.dataset(case), case.row)
    if found := next((name for name, one in known.items() if _same(grid, one)), None):
        return found
    there = "; ".join(f"{name}: {_grid_words(one)}" for name, one in known.items())
    raise ScoreError(
        f"{path} lies on another grid ({_grid_words(grid)}) than case {case.case} is known on "
        f"({there}); shape and affine (within {GRID_MM:g} mm) must be those of one of them: resample it by nearest "
        "neighbour, or predict the scans as they are"
    )


def _same(a: Grid, b: Grid) -> bool:
    return tuple(a[0]) == tuple(b[0]) and corner_gap_mm(a[1], b[1], tuple(a[0])) <= GRID_MM


def _grid_words(grid: Grid) -> str:
    return f"{' x '.join(map(str, grid[0]))}, affine {np.round(grid[1][:3], 2).tolist()}"


def _words(others: Others) -> str:
    return f"predictions {others.name!r} for {others.benchmark}"


def others_notes(cohort: Cohort) -> tuple[str, ...]:
    """Return the sentence of a table about predictions of others; nothing without any."""
    if not cohort.others:
        return ()
    named = ", ".join(one.name for one in cohort.others)
    return (
        f"Predictions of others: {named}. Label maps read from files: how, on whom and how long their networks were "
        "trained is not known here, so neither the budget nor the seeds above are theirs, and test subjects may be "
        "among their training data. Maps on the grids of source scans were moved onto the grid that is scored by "
        "nearest neighbour.",
    )
