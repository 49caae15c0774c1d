"""Time series, BOLD images and confounds with a known connectome, for the tests of connectomes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd

from models.connectomes import ConnectomeSpec
from models.spec import SPECS, PreprocessSpec

REGIONS = 6
FRAMES = 100
EDGE = 16
"""Voxels along each axis of the phantom BOLD, 12 mm each: it covers the brain in MNI space."""
AFFINE = np.array([[-12.0, 0, 0, 90], [0, 12, 0, -126], [0, 0, 12, -78], [0, 0, 0, 1]])
"""Axes as many tools write them: x from right to left."""
VALUES = (3, 5, 8, 13, 21, 34)
NAMES = ("calm", "wild", "left", "right", "deep", "high")


def own_spec(**changes: Any) -> ConnectomeSpec:
    """Return the settings of an atlas of six regions whose values are not 1, 2, 3..."""
    return ConnectomeSpec.model_validate({"atlas": "six", "regions": NAMES, "values": VALUES, **changes})


def store_spec(connectome: ConnectomeSpec) -> PreprocessSpec:
    """Return a 12 mm spec of T1s with connectomes."""
    tiny = SPECS["cinp_tiny"].model_dump()
    affine = [[12.0, 0, 0, -96], [0, 12, 0, -132], [0, 0, 12, -78], [0, 0, 0, 1]]
    changes = {"name": "six", "grid": (16, 20, 16), "spacing_mm": 12.0, "grid_affine": affine, "space": "any"}
    return PreprocessSpec.model_validate({**tiny, **changes, "connectome": connectome.model_dump()})


def planted(correlation: np.ndarray, frames: int = FRAMES, seed: int = 0) -> np.ndarray:
    """Return series (frames, regions) whose sample correlation is exactly the given matrix."""
    noise = np.random.default_rng(seed).standard_normal((frames, len(correlation)))
    noise -= noise.mean(axis=0)
    white, _ = np.linalg.qr(noise)  # orthonormal and without a mean
    return np.asarray(white @ np.linalg.cholesky(correlation).T)


def correlation_of(seed: int = 0, regions: int = REGIONS) -> np.ndarray:
    """Return a correlation matrix with values from about -0.6 to 0.6."""
    loads = np.random.default_rng(seed).standard_normal((regions, regions + 2))
    covariance = loads @ loads.T
    scale = np.sqrt(np.diag(covariance))
    return np.asarray(covariance / np.outer(scale, scale))


def fisher(correlation: np.ndarray) -> np.ndarray:
    """Return atanh off the diagonal and 0 on it."""
    return np.arctanh(correlation - np.eye(len(correlation)) * np.diag(correlation))


def pcp_text(series: np.ndarray, values: tuple[int, ...] = VALUES) -> bytes:
    """Return a `rois_*.1D` of the Preprocessed Connectomes Project."""
    lines = ["\t".join(f"#{value}" for value in values)]
    lines += ["\t".join(f"{value:.17g}" for value in row) for row in series]
    return ("\n".join(lines) + "\n").encode()


def athena_text(series: np.ndarray, values: tuple[int, ...] = VALUES) -> bytes:
    """Return the output of AFNI's 3dROIstats, as the Athena pipeline ships it."""
    lines = ["\t".join(["File", "Sub-brick", *(f"Mean_{value} " for value in values)])]
    lines += [
        "\t".join(["snwmrda1.nii.gz", f"{n}[?]", *(f"{value:.17g}" for value in row)]) for n, row in enumerate(series)
    ]
    return ("\n".join(lines) + "\n").encode()


def atlas_labels() -> np.ndarray:
    """Return blocks of 4 x 4 x 4 voxels with the values of the regions, (16, 16, 16) int16."""
    labels = np.zeros((EDGE, EDGE, EDGE), np.int16)
    for n, value in enumerate(VALUES):
        x, y = 2 + 4 * (n % 3), 4 + 5 * (n // 3)
        labels[x : x + 4, y : y + 4, 6:10] = value
    return labels


def write_atlas(path: Path) -> dict[str, str]:
    """Write the label image; returns what a spec says about it."""
    nib.save(nib.Nifti1Image(atlas_labels(), AFFINE), path)
    return {"atlas_image": str(path), "atlas_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def bold_of(series: np.ndarray, level: float = 1000.0) -> np.ndarray:
    """Return a BOLD image (16, 16, 16, frames) float32 whose regional means are `level` plus the series."""
    rng = np.random.default_rng(9)
    labels = atlas_labels()
    data = rng.uniform(100, 300, (*labels.shape, 1)).astype(np.float64) + np.zeros(len(series))
    for n, value in enumerate(VALUES):
        inside = labels == value
        own = rng.standard_normal((int(inside.sum()), 1)) * 20
        data[inside] = level + own - own.mean() + series[:, n]
    return data.astype(np.float32)


def write_bold(path: Path, data: np.ndarray, tr: float = 2.0, unit: str = "sec", affine: np.ndarray = AFFINE) -> Path:
    """Write a 4D image in MNI space with its repetition time."""
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, code=4)
    image.set_qform(affine, code=4)
    image.header.set_xyzt_units("mm", unit)
    image.header["pixdim"][4] = tr
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def confounds_of(frames: int = FRAMES, seed: int = 0, spikes: tuple[int, ...] = ()) -> pd.DataFrame:
    """Return a table as fMRIPrep writes it: 24 motion regressors, tissues, cosines; spikes of 1.5 mm at some frames."""
    rng = np.random.default_rng(seed + 100)
    names = [f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"]
    names = [*names, "csf", "white_matter", "global_signal"]
    table = pd.DataFrame(rng.standard_normal((frames, len(names))) * 0.05, columns=names)
    for name in names:
        change = table[name].diff()
        table = table.assign(
            **{f"{name}_derivative1": change, f"{name}_power2": table[name] ** 2},
            **{f"{name}_derivative1_power2": change**2},
        )
    time = np.arange(frames)
    for n in range(2):
        table[f"cosine{n:02d}"] = np.cos(np.pi * (n + 1) * (time + 0.5) / frames)
    displacement = np.full(frames, 0.1)
    displacement[list(spikes)] = 1.5
    displacement[0] = np.nan
    table["framewise_displacement"] = displacement
    table["std_dvars"] = np.where(time > 0, 1.0, np.nan)
    return table


def confounds_bytes(table: pd.DataFrame) -> bytes:
    """Return a table as fMRIPrep writes it."""
    return table.to_csv(sep="\t", index=False, na_rep="n/a").encode()
