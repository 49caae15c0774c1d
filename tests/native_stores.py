"""Stores of small tumours whose scans and labels lie on oblique grids of thick slices."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import nibabel as nib
import numpy as np
from nifti_files import SMALL, oblique, write_nifti
from store_builds import ingest, scans_of

SHAPE, ZOOMS = (24, 22, 10), (0.9, 1.1, 2.5)
"""An anisotropic scan, turned by 12 degrees."""


def write_native_store(folder: Path, subjects: Iterable[str]) -> tuple[str, dict[str, Path]]:
    """Write `s.zarr` with a case of each subject, and return its URL and the label file of each."""
    affine = oblique(SHAPE, ZOOMS)
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), axis=-1)
    world = nib.affines.apply_affine(affine, voxels)
    head = np.linalg.norm(world, axis=-1) < 11
    image = (30 - np.linalg.norm(world, axis=-1)).astype(np.float32) * head
    labels, scans = {}, []
    for number, name in enumerate(subjects):
        away = np.linalg.norm(world - (2, -1, 1 - number), axis=-1)
        label = np.select([away < 3, away < 5, away < 7], [1, 3, 2], 0).astype(np.uint8) * head
        labels[name] = write_nifti(folder / name / "seg.nii.gz", label, affine)
        files = {"t1": write_nifti(folder / name / "t1.nii.gz", image, affine), "label": labels[name]}
        scans += scans_of(files, name)
    url = str(folder / "s.zarr")
    ingest(url, scans, spec=SMALL.replace(grid=(48, 48, 40)))
    return url, labels
