"""Regional descriptors and grey-matter maps in the layouts that other software writes; every value is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from nifti_files import blob, write_nifti

from models.anatomy import ATLASES, MEASURES, Atlas
from models.spec import SPECS

AFFINE = np.array([[-1.5, 0, 0, 90], [0, 1.5, 0, -126], [0, 0, 1.5, -72], [0, 0, 0, 1.0]])
"""Of CAT12's maps."""
UNITS = {"SurfArea": "mm^2", "GrayVol": "mm^3", "ThickAvg": "mm"}
CHANNELS = [
    *("surface_area_mm^2", "gray_matter_volume_mm^3", "average_thickness_mm", "thickness_stddev_mm"),
    *("integrated_rectified_mean_curvature_mm^-1", "integrated_rectified_gaussian_curvature_mm^-2", "folding_index"),
]
"""Of OpenBHB's arrays."""


def regional(subject: int = 0, atlas: Atlas = "desikan_killiany") -> dict[str, list[float]]:
    """Return plausible values by measure, different for every subject, measure and region."""
    n = np.arange(len(ATLASES[atlas]))
    return {
        MEASURES[0]: [round(2.0 + 0.01 * v + 0.003 * subject, 3) for v in n],
        MEASURES[1]: [float(4000 + 20 * v + subject) for v in n],
        MEASURES[2]: [float(1500 + 7 * v + subject) for v in n],
    }


def stats_text(side: str, values: Mapping[str, list[float]], atlas: Atlas = "desikan_killiany", **units: str) -> str:
    """Return `?h.aparc*.stats` of one hemisphere as FreeSurfer writes it, with another order of columns than ours."""
    names = ["StructName", "NumVert", "SurfArea", "GrayVol", "ThickAvg", "ThickStd"]
    lines = ["# Table of FreeSurfer cortical parcellation anatomical statistics", f"# hemi {side}"]
    for number, name in enumerate(names, start=1):
        unit = {**UNITS, **units}.get(name, "NA")
        lines += [f"# TableCol  {number} ColHeader {name} ", f"# TableCol  {number} Units     {unit}"]
    lines.append(f"# ColHeaders {' '.join(names)}")
    for n, region in enumerate(ATLASES[atlas]):
        if region.startswith(side):
            thick, volume, area = (values[measure][n] for measure in MEASURES)
            name = region[3:].replace("_and_", "&")
            lines.append(f"{name:<40} 100 {area:g} {volume:g}  {thick:.3f} 0.5")
    return "\n".join(lines) + "\n"


def write_freesurfer(
    root: Path, folder: str, values: Mapping[str, list[float]], atlas: Atlas = "desikan_killiany"
) -> Path:
    """Write the statistics of one subject's folder; returns the folder `stats`."""
    stats = root / folder / "stats"
    stats.mkdir(parents=True, exist_ok=True)
    name = "aparc.stats" if atlas == "desikan_killiany" else "aparc.a2009s.stats"
    for side in ("lh", "rh"):
        (stats / f"{side}.{name}").write_text(stats_text(side, values, atlas))
    return stats


def tiny_map(seed: int = 0) -> np.ndarray:
    """Return a modulated map on the grid of `vbm_tiny`, (31, 37, 31) float32: zeros around, up to 1.3 inside."""
    return blob((31, 37, 31), seed=seed, margin=5) / 160


def write_map(path: Path, seed: int = 0) -> Path:
    """Write `tiny_map` as a file with x from right to left, as CAT12 has it."""
    flip = np.array(SPECS["vbm_tiny"].grid_affine)
    flip[0] = [-6, 0, 0, 90]
    return write_nifti(path, tiny_map(seed)[::-1], flip)


def write_resources(root: Path, channels: list[str] | None = None, atlas: str = "desikan") -> Path:
    """Write OpenBHB's resources.json, whose regions are in another order than ours."""
    names = ATLASES["desikan_killiany" if atlas == "desikan" else "destrieux"][::-1]
    entry = {"shape": [-1, 7, len(names)], "features": [n.replace("_", "-", 1) for n in names]}
    path = root / "resource" / "resources.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({f"{atlas}_roi": {**entry, "channels": CHANNELS if channels is None else channels}}))
    return path


def region_array(values: Mapping[str, list[float]], channels: list[str] | None = None) -> np.ndarray:
    """Return OpenBHB's (1, 7, regions) float32 array of one subject."""
    ours = ("average_thickness_mm", "gray_matter_volume_mm^3", "surface_area_mm^2")
    order = CHANNELS if channels is None else channels
    rows = {name: values[measure][::-1] for name, measure in zip(ours, MEASURES, strict=True)}
    count = len(values[MEASURES[0]])
    return np.array([[rows.get(name, [0.1] * count) for name in order]], dtype=np.float32)


def empty_array(path: Path, shape: tuple[int, ...] = (1, 121, 145, 121), dtype: str = "<f4") -> Path:
    """Write the header of an array and a hole of its size: enough for a catalog, and no work."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return path
