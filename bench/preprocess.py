"""One full-size case from its files to its finished shard: ours, the floor below it, and the MONAI chain."""

from __future__ import annotations

import cProfile
import pstats
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from isal import isal_zlib

from bench.chain import monai_chain
from bench.inputs import DATASET, MODALITIES, Workplace, workplace, write_scans
from bench.timing import Ratio, Rounds, Target, race
from models.spec import PreprocessSpec
from models.store_layout import open_array
from tasks.prepare import prepare_case
from tasks.preprocess import preprocess_case

OURS, FLOOR, CHAIN, CHAIN_WRITE = "ours", "floor", "MONAI chain", "MONAI chain + shard write"
STEPS = {
    "gunzip, header": ("nifti.py", "parse_nifti"),
    "NaN and constant checks": ("integrity.py", "finite", "varied"),
    "box of the tissue, orientation": ("prepare.py", "_source"),
    "resampling": ("resampling.py", "resample"),
    "foreground boxes": ("volumes.py", "foreground_box"),
    "percentiles": ("intensity.py", "intensity_range"),
    "scaling, copy": ("prepare.py", "_fill"),
    "quality measures": ("case_quality.py", "image_quality"),
    "fingerprint": ("fingerprint.py", "fingerprint"),
    "shard: encode, write, fsync": ("store_writer.py", "write_case"),
    "case digest": ("store_writer.py", "case_digest"),
}
"""Parts of `preprocess_case` by file and functions; none of them calls another."""


@dataclass(frozen=True)
class PreprocessResult:
    """What was measured for one kind of input."""

    title: str
    rounds: dict[str, Rounds]
    targets: list[Target]
    gap: float
    """Largest difference between our float16 voxels and the chain's float32 ones."""
    steps: dict[str, float]
    """Share of our time by step."""


def measure(
    folder: Path, brain: np.ndarray, spec: PreprocessSpec, every_z: int, rounds: int, limits: tuple[float, float]
) -> PreprocessResult:
    """Race ours, the floor and the chain on one case; limits: at most x the floor, at least x faster than the chain.

    brain: (X, Y, Z) float32, its foreground centred; every_z above 1 leaves out planes, so that all must resample.
    """
    place = workplace(folder / "ours.zarr", write_scans(folder / "scans", brain, every_z), spec)
    chain = monai_chain(place.paths, spec)
    expected = prepare_case(place.case, spec).image
    rivals: dict[str, Callable[[], object]] = {
        OURS: lambda: preprocess_case(place.case, spec, place.writer),
        FLOOR: floor(folder / "floor.zarr", place, spec, expected, brain.shape if every_z > 1 else None),
        CHAIN: chain,
        CHAIN_WRITE: lambda: place.writer.write_case(DATASET, 0, stored(chain(), spec, place), None),
    }
    results = race(rivals, rounds, before=lambda: _erase(folder))
    below, above = limits
    kind = "resampled, " if every_z > 1 else ""
    targets = [
        Target(f"preprocess ({kind}ours / floor)", Ratio.of(results[OURS], results[FLOOR]), below, at_least=False),
        Target(f"preprocess ({kind}chain + write / ours)", Ratio.of(results[CHAIN_WRITE], results[OURS]), above, True),
    ]
    title = f"{len(place.paths)} x {tuple(brain[:, :, ::every_z].shape)} int16, {'1 x 1 x ' + str(every_z)} mm"
    return PreprocessResult(title, results, targets, _gap(chain(), expected, place, spec), step_shares(place, spec))


def floor(
    store: Path, place: Workplace, spec: PreprocessSpec, image: np.ndarray, resampled: tuple[int, ...] | None
) -> Callable[[], None]:
    """Return the work that nobody can leave out: gunzip with isal, torch's interpolation if needed, encode the shard.

    image: our voxels, (M, x, y, z) float16; the floor's store holds the present modalities alone. resampled: shape
    after interpolation, or None. The floor neither checks nor forces anything to disk.
    """
    narrow = spec.replace(modalities=MODALITIES)
    lean = workplace(store, write_scans(store.parent / "floor-scans", np.ones((2, 2, 2), np.float32)), narrow)
    array = open_array(lean.writer.url, f"{DATASET}/image", "r+")
    present = np.ascontiguousarray(image[[spec.modalities.index(m) for m in MODALITIES]])
    x, y, z = present.shape[1:]

    def run() -> None:
        for path in place.paths:
            body = isal_zlib.decompress(path.read_bytes(), 31)
            if resampled is not None:
                _interpolate(body, resampled)
        array[0, :, :x, :y, :z] = present

    return run


def _interpolate(body: bytes, shape: tuple[int, ...]) -> torch.Tensor:
    """Interpolate the voxels of a single-file NIfTI-1 of int16 trilinearly to a shape, first and last planes kept."""
    nx, ny, nz = np.frombuffer(body, "<i2", count=3, offset=42)
    voxels = np.frombuffer(body, "<i2", offset=352).reshape(nz, ny, nx).astype(np.float32)
    return torch.nn.functional.interpolate(
        torch.from_numpy(voxels)[None, None], size=shape[::-1], mode="trilinear", align_corners=True
    )


def stored(channels: np.ndarray, spec: PreprocessSpec, place: Workplace) -> np.ndarray:
    """Return the chain's channels as the store wants them: all modalities of the spec, float16."""
    out = np.zeros((len(spec.modalities), *channels.shape[1:]), dtype=np.float16)
    for channel, file in zip(channels, place.case.files, strict=True):
        out[spec.modalities.index(file.modality)] = channel
    return out


def _gap(channels: np.ndarray, ours: np.ndarray, place: Workplace, spec: PreprocessSpec) -> float:
    chosen = ours[[spec.modalities.index(file.modality) for file in place.case.files]]
    if chosen.shape != channels.shape:
        raise ValueError(f"ours has shape {chosen.shape}, the chain {channels.shape}: they did not crop alike")
    return float(np.abs(chosen.astype(np.float32) - channels).max())


def step_shares(place: Workplace, spec: PreprocessSpec) -> dict[str, float]:
    """Profile one run of ours and return each step's share of its time, `rest` last."""
    profile = cProfile.Profile()
    profile.runcall(preprocess_case, place.case, spec, place.writer)
    times: dict[tuple[str, str], float] = {}
    for (file, _, name), entry in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]  # not in its stub
        times[Path(file).name, name] = entry[3]
    whole = times["preprocess.py", "preprocess_case"]
    shares = {step: sum(times.get((file, name), 0) for name in names) / whole for step, (file, *names) in STEPS.items()}
    return {**shares, "rest (copies, stacking, geometry)": 1 - sum(shares.values())}


def _erase(folder: Path) -> None:
    for store in ("ours.zarr", "floor.zarr"):
        shutil.rmtree(folder / store / DATASET / "image" / "c", ignore_errors=True)
