"""A store of clean synthetic brains and of one with each known defect, for the tests of quality control.

Ellipsoids with two tissues and fluid from one scanner: gain, size, bias and noise vary a little from brain to brain.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from nifti_files import centred, scan_of, write_nifti
from scipy import ndimage
from store_builds import ingest

from models.records import Scan
from models.spec import PreprocessSpec

SPEC = PreprocessSpec(
    name="qc", spacing_mm=3.0, grid=(56, 64, 56), modalities=("t1", "t2"), percentiles=(1, 99),
    percentile_region="foreground",
)  # fmt: skip
SHAPE = (48, 58, 46)
SPACING = (3.0, 3.0, 3.0)
CLEAN = 24
DATASET = "phantom"
Volume = np.ndarray


def brain(seed: int) -> tuple[Volume, Volume, Volume]:
    """Return t1, t2 (float32) and a label (uint8) of one clean brain."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in SHAPE), indexing="ij")
    x, y, z = axes
    size = rng.normal(1, 0.02, 3)
    inside = (x / (20 * size[0])) ** 2 + (y / (25 * size[1])) ** 2 + (z / (19 * size[2])) ** 2 < 1
    relief = ndimage.gaussian_filter(rng.standard_normal(SHAPE), 2.5)
    relief /= relief.std()
    tilt = rng.normal(0, 0.03, 3)
    bias = np.exp(tilt[0] * x / 20 + tilt[1] * y / 25 + tilt[2] * z / 19)
    lesion = (x - rng.uniform(-6, 6)) ** 2 + (y - 4) ** 2 + z**2 < rng.uniform(4, 5) ** 2
    scans = []
    for white, grey, fluid in ((1.0, 0.7, 0.2), (0.4, 0.6, 1.0)):
        tissue = np.select([lesion, relief > 1.3, relief > 0], [0.8, fluid, white], grey)
        signal = np.maximum(tissue * bias + rng.normal(0, 0.02, SHAPE), 0.01)
        scans.append(np.where(inside, 400 * np.exp(rng.normal(0, 0.1)) * signal, 0).astype(np.float32))
    return scans[0], scans[1], (lesion & inside).astype(np.uint8)


def noisy(data: Volume) -> Volume:
    """Noise of a sixth of the mean."""
    noise = np.random.default_rng(0).normal(0, data[data > 0].mean() / 6, data.shape)
    return np.where(data > 0, np.abs(data + noise), 0)


def biased(data: Volume) -> Volume:
    """Two and a half times as bright in front as in the back."""
    return data * np.exp(np.linspace(-0.45, 0.45, data.shape[1]))[None, :, None]


def shifted(data: Volume) -> Volume:
    """Four times the mean is added inside the brain."""
    return np.where(data > 0, data + 4 * data[data > 0].mean(), 0)


def scaled(data: Volume) -> Volume:
    """Another unit."""
    return data * 10


def cut(data: Volume) -> Volume:
    """The lowest third of the brain is lost, padded with zeros."""
    out = data.copy()
    out[:, :, : SHAPE[2] // 3] = 0
    return out


DEFECTS: dict[str, Callable[[Volume], Volume] | None] = {
    "noisy": noisy, "biased": biased, "shifted": shifted, "scaled": scaled, "cut": cut, "incomplete": None,
}  # fmt: skip
"""By case; all in its t1 but `incomplete`, which has no t2."""


def scans_of_brain(folder: Path, case: str, seed: int, dataset: str = DATASET) -> list[Scan]:
    """Write one case, with its defect if it is named after one, and return its catalog rows."""
    t1, t2, label = brain(seed)
    defect = DEFECTS.get(case)
    files = {"t1": t1 if defect is None else defect(t1).astype(np.float32), "t2": t2, "label": label}
    if case == "incomplete":
        del files["t2"]
    affine = centred(SHAPE, SPACING)
    return [
        scan_of(write_nifti(folder / dataset / f"{case}_{name}.nii.gz", data, affine), name, case, dataset)
        for name, data in files.items()
    ]


def write_qc_store(folder: Path, clean: int = CLEAN, defects: bool = True) -> str:
    """Write the store: clean cases `c00`, `c01`, ..., and those with defects; returns its URL."""
    cases = [*(f"c{n:02d}" for n in range(clean)), *(DEFECTS if defects else [])]
    scans = [scan for seed, case in enumerate(cases) for scan in scans_of_brain(folder, case, seed)]
    url = str(folder / "qc.zarr")
    ingest(url, scans, spec=SPEC)
    return url
