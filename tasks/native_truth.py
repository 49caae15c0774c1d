"""Labels as they lie in their files, and stored masks moved onto the same grids: the voxels that an annotator drew."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import numpy.typing as npt

from infra import storage
from models.config import Region
from models.records import LABEL, SelectedCase, SourceFile, digest_of
from models.store import Store, StoredDataset
from tasks.affines import BadScanError
from tasks.export_nifti import onto_grid
from tasks.hidden_paths import is_alias
from tasks.scores import ScoreError, Truth

if TYPE_CHECKING:
    from tasks.nifti import Volume

REGIONS_MAX = 8
"""Regions that are moved at once, a bit of a byte each."""


@dataclass(frozen=True)
class SourceLabels:
    """The label files of the cases of one store."""

    store: Store
    _last: dict[tuple[str, int], Volume] = field(default_factory=dict)
    """The label that was read last: its voxels and its grid are asked for one after the other."""

    @cached_property
    def _files(self) -> dict[tuple[str, int], SourceFile]:
        lines = self.store.cases().select(["dataset", "row", "files"]).to_pylist()
        files = [
            (line["dataset"], line["row"], SourceFile.model_validate(file))
            for line in lines
            for file in json.loads(line["files"] or "[]")
        ]
        return {(dataset, row): file for dataset, row, file in files if file.modality == LABEL}

    def file(self, case: SelectedCase) -> SourceFile:
        """Return the label file of a case; raises ScoreError when the store names none."""
        try:
            return self._files[case.dataset, case.row]
        except KeyError:
            raise ScoreError(
                f"case {case.case}: {self.store.url} names no label file of it, so it has no native grid; evaluate "
                "without native_scores"
            ) from None

    def check(self, cases: Sequence[SelectedCase]) -> None:
        """Raise ScoreError when the label file of a case is not named by the store, hidden, or not there any more."""
        if cases and is_alias(self.file(cases[0]).path):
            raise ScoreError(
                f"{self.store.url} hides the paths of its sources (hide_paths), so the label files cannot be found; "
                "evaluate without native_scores"
            )
        lost = [(case, path) for case in cases if not storage.exists(path := self.file(case).path)]
        if lost:
            case, path = lost[0]
            raise ScoreError(
                f"{len(lost)} of {len(cases)} label files are not there any more, first that of case {case.case}: "
                f"{path}; put them back, or evaluate without native_scores"
            )

    def digest(self, cases: Sequence[SelectedCase]) -> str:
        """Return what identifies the label files of some cases."""
        return digest_of([[case.dataset, case.row, *self.file(case).identity] for case in cases])

    def truth(self, case: SelectedCase) -> Truth:
        """Return the label (X, Y, Z) of a case as it is in its file, and the edges of its voxels in mm."""
        volume = self._read(case)
        return np.ascontiguousarray(volume.data.numpy()), tuple(float(v) for v in _edges(volume.affine))

    def grid(self, case: SelectedCase) -> tuple[tuple[int, ...], npt.NDArray[np.float64]]:
        """Return shape and affine (voxel -> RAS+ mm of the file) of the label file of a case."""
        volume = self._read(case)
        return volume.shape, volume.affine

    def moved(
        self, case: SelectedCase, dataset: StoredDataset, masks: npt.NDArray[np.generic], regions: Sequence[Region]
    ) -> npt.NDArray[np.bool_]:
        """Return predicted masks (R, x, y, z) of the stored extent on the grid of the label file, nearest neighbour.

        `dataset` is that of the case. Every region is moved as it is, also where regions contradict each other. Voxels
        outside the stored extent are not predicted: empty.
        """
        if len(regions) > REGIONS_MAX:
            raise ScoreError(f"{len(regions)} regions; at most {REGIONS_MAX} can be moved to a native grid")
        volume = self._read(case)
        bits = np.packbits(np.asarray(masks, dtype=bool), axis=0, bitorder="little")[0]
        there = onto_grid(dataset, case.row, bits, volume.shape, volume.affine)
        return np.unpackbits(there[None], axis=0, bitorder="little")[: len(regions)].astype(bool)

    def _read(self, case: SelectedCase) -> Volume:
        # torch comes with these; a flow that scores on stored grids alone starts without it.
        from tasks.nifti import DEFAULT_MEMORY
        from tasks.prepare import read_label

        key = (case.dataset, case.row)
        if key not in self._last:
            try:
                volume = read_label(self.file(case), DEFAULT_MEMORY)
            except BadScanError as error:
                raise ScoreError(
                    f"case {case.case}: {error}; native scores need the label files of the sources"
                ) from None
            self._last.clear()
            self._last[key] = volume
        return self._last[key]


def _edges(affine: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(nib.affines.voxel_sizes(affine))
