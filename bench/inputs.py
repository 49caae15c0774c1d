"""A full-size case made from the MNI152 maps that nilearn ships: four contrasts, skull-stripped, int16 `.nii.gz`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from models.records import PlannedCase, Scan
from models.spec import PreprocessSpec
from models.store import StoreWriter, create_or_open
from tasks import plan as plans

DATASET = "bench"
MODALITIES = ("flair", "t1", "t1c", "t2")
GRID = (240, 240, 155)
NOISE = 12.0
"""Spread of the noise inside the brain, of intensities up to some 1000: keeps gzip and lz4 from an easy life."""


def mni_brain() -> np.ndarray:
    """Return the skull-stripped MNI152 T1 at 1 mm, (X, Y, Z) float32 of 0..1, cut to its bounding box."""
    from nilearn import datasets

    image = np.asarray(datasets.load_mni152_template(resolution=1).dataobj, dtype=np.float32)
    mask = np.asarray(datasets.load_mni152_brain_mask(resolution=1).dataobj) > 0
    return tight(np.where(mask, np.maximum(image, 0.02), 0))


def tight(brain: np.ndarray) -> np.ndarray:
    """Cut a volume to the box of its voxels above zero."""
    found = np.nonzero(brain)
    return brain[tuple(slice(int(axis.min()), int(axis.max()) + 1) for axis in found)]


def centred(brain: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """Put a brain into the middle of an empty grid, with equal margins on both sides of every axis.

    Where the margins would differ by one plane, the last plane is dropped: on a symmetric box our symmetric crop and
    MONAI's crop are the same, so that results can be compared voxel by voxel.
    """
    if any(n > g for n, g in zip(brain.shape, grid, strict=True)):
        raise ValueError(f"a brain of {brain.shape} voxels does not fit a grid of {grid}; use a larger grid")
    cut = brain
    while any((g - n) % 2 for n, g in zip(cut.shape, grid, strict=True)):
        cut = tight(cut[tuple(slice(0, n - (g - n) % 2) for n, g in zip(cut.shape, grid, strict=True))])
    out = np.zeros(grid, dtype=np.float32)
    out[tuple(slice((g - n) // 2, (g - n) // 2 + n) for n, g in zip(cut.shape, grid, strict=True))] = cut
    return out


def contrasts(brain: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Return four images of one brain by modality, (X, Y, Z) int16, zero outside it, each with its own noise."""
    rng = np.random.default_rng(seed)
    inside = brain > 0
    curves = {
        "flair": 150 + 700 * brain * (1.6 - brain),
        "t1": 900 * brain,
        "t1c": 980 * brain**1.3 + 40,
        "t2": 1000 - 850 * brain,
    }
    images = {}
    for modality in MODALITIES:
        noisy = curves[modality] + rng.normal(0, NOISE, brain.shape)
        images[modality] = np.where(inside, np.clip(noisy, 1, 32000), 0).astype(np.int16)
    return images


def write_scans(folder: Path, brain: np.ndarray, every_z: int = 1) -> list[Scan]:
    """Write the four images, every `every_z`-th plane of them, and return their catalog rows."""
    folder.mkdir(parents=True, exist_ok=True)
    affine = np.diag([1.0, 1.0, float(every_z), 1.0])
    affine[:3, 3] = [-(n - 1) / 2 for n in brain.shape]
    scans = []
    for modality, data in contrasts(brain).items():
        path = folder / f"case_{modality}.nii.gz"
        image = nib.Nifti1Image(np.ascontiguousarray(data[:, :, ::every_z]), affine)
        image.set_sform(affine, code=1)
        image.set_qform(affine, code=1)
        nib.save(image, path)
        scans.append(
            Scan(
                dataset=DATASET,
                subject="case",
                case="case",
                modality=modality,
                path=str(path),
                size_bytes=path.stat().st_size,
                etag=str(path.stat().st_mtime_ns),
                shape=image.shape,
                spacing_mm=(1.0, 1.0, float(every_z)),
                dtype="int16",
            )
        )
    return scans


@dataclass(frozen=True)
class Workplace:
    """One case with its files, and a store that has a planned row for it."""

    writer: StoreWriter
    case: PlannedCase

    @property
    def paths(self) -> list[Path]:
        """The four files, in order of modality."""
        return [Path(file.path) for file in self.case.files]


def workplace(store: Path, scans: list[Scan], spec: PreprocessSpec) -> Workplace:
    """Create a store, plan the case of these scans in it and make room for it, as the flow does."""
    writer = create_or_open(str(store), spec)
    (case,) = plans.plan_rows(plans.cases_from_scans(scans), (), spec).added
    plans.write_plan(writer.url, [case], spec.content_digest())
    writer.grow(DATASET, 1, with_label=False)
    return Workplace(writer, case)
