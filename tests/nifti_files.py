"""Small NIfTI files, catalog rows and plans for the tests of preprocessing; every voxel is known by construction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from models.records import PlannedCase, Scan
from models.spec import PreprocessSpec
from tasks.nifti import Volume
from tasks.plan import cases_from_scans

SMALL = PreprocessSpec(name="small", grid=(40, 36, 30), modalities=("flair", "t1", "t2"))
"""Frame `image`, 1 mm."""
FIXED = PreprocessSpec(
    name="fixed",
    spacing_mm=3.0,
    grid=(12, 14, 11),
    frame="template",
    grid_affine=((3.0, 0, 0, -15.0), (0, 3.0, 0, -18.0), (0, 0, 3.0, -15.0), (0, 0, 0, 1.0)),
    modalities=("flair", "t1", "t2"),
)
"""Frame `template`, 3 mm, centred on the world's origin."""


def blob(shape: tuple[int, int, int] = (30, 28, 24), seed: int = 0, margin: int = 4) -> np.ndarray:
    """Return a smooth positive bump with an empty rim, different in every place: (X, Y, Z) float32."""
    axes = [np.linspace(-1, 1, n - 2 * margin) for n in shape]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    tilt = np.random.default_rng(seed).uniform(0.1, 0.4, 3)
    inside = 200 * np.exp(-(x**2 + 1.3 * y**2 + 0.8 * z**2)) * (1 + tilt[0] * x + tilt[1] * y + tilt[2] * z) + 5
    out = np.zeros(shape, dtype=np.float32)
    out[margin:-margin, margin:-margin, margin:-margin] = inside
    return out


def centred(shape: tuple[int, ...], zooms: tuple[float, float, float] = (1, 1, 1)) -> np.ndarray:
    """Return the RAS affine that puts the centre of a volume at the world's origin."""
    affine = np.diag([*zooms, 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * mm for n, mm in zip(shape, zooms, strict=True)]
    return affine


def oblique(shape: tuple[int, ...], zooms: tuple[float, float, float], degrees: float = 12) -> np.ndarray:
    """Return the affine of a volume that is turned about the world's z axis."""
    angle = np.deg2rad(degrees)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn @ centred(shape, zooms)


def volume_of(data: np.ndarray, affine: np.ndarray | None = None) -> Volume:
    """Return voxels as a volume that was read from a file named `a`."""
    return Volume(torch.from_numpy(data), centred(data.shape) if affine is None else affine, "a")


def write_nifti(path: Path, data: np.ndarray, affine: np.ndarray | None = None, **header: Any) -> Path:
    """Write one image; header: `slope` and `inter` set the scaling of integer data."""
    image = nib.Nifti1Image(data, centred(data.shape[:3]) if affine is None else affine)
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    if "slope" in header:
        image.header.set_slope_inter(header["slope"], header.get("inter", 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def scan_of(path: Path, modality: str, subject: str = "s1", dataset: str = "toy", **more: Any) -> Scan:
    """Return the catalog row of a file as it is now."""
    there = path.stat() if path.exists() else None
    try:
        image = nib.load(path)
        shape, zooms = tuple(image.shape), tuple(float(v) for v in image.header.get_zooms())
    except Exception:  # noqa: BLE001 - broken on purpose
        shape, zooms = (), ()
    return Scan(
        dataset=dataset,
        subject=subject,
        case=subject,
        modality=modality,
        path=str(path),
        size_bytes=there.st_size if there else 0,
        etag=str(there.st_mtime_ns) if there else "",
        shape=shape,
        spacing_mm=zooms,
        dtype="float32",
        label_scheme="toy" if modality == "label" else "",
        **more,
    )


def planned(files: Mapping[str, Path], row: int = 0, subject: str = "s1", dataset: str = "toy") -> PlannedCase:
    """Return the plan of one case from its files by modality."""
    (case,) = cases_from_scans([scan_of(path, modality, subject, dataset) for modality, path in files.items()])
    return case.replace(row=row)


def write_case(folder: Path, subject: str, seed: int = 0, label: bool = False) -> dict[str, Path]:
    """Write t1 and t2 (and a label) of one subject on one grid; returns the files by modality."""
    data = blob(seed=seed)
    files = {
        "t1": write_nifti(folder / f"{subject}_t1.nii.gz", data),
        "t2": write_nifti(folder / f"{subject}_t2.nii.gz", 300 - data * (data > 0) - 300 * (data == 0)),
    }
    if label:
        mask = np.zeros(data.shape, dtype=np.uint8)
        mask[10:14, 10:15, 8:12] = 1 + seed % 3
        files["label"] = write_nifti(folder / f"{subject}_seg.nii.gz", mask)
    return files


def write_dataset(folder: Path, subjects: int, labels: bool = False, dataset: str = "toy") -> list[Scan]:
    """Write some subjects and return their catalog rows."""
    return [
        scan_of(path, modality, f"s{n}", dataset)
        for n in range(subjects)
        for modality, path in write_case(folder / dataset, f"s{n}", n, labels and n % 2 == 0).items()
    ]
