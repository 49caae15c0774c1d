"""The whole run in order: inputs, preprocessing without and with resampling, crops, and what is printed."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bench import catalog, crops, metrics, preprocess, step, workers
from bench.inputs import GRID, centred, mni_brain, workplace, write_scans
from bench.timing import machine, target_table, time_table
from models.spec import SPECS, PreprocessSpec
from models.store_layout import limit_threads

CROP = 96
ROUNDS = 7
CATALOG_ROUNDS = 3
INPUTS = ((1, (1.6, 2.0)), (2, (1.6, 2.5)))
"""Every how many planes are in the files; asked: at most x the floor, at least x faster than the chain."""
CLOSE = 2e-3
"""How far a voxel may be from the chain's after rounding to float16."""


def main() -> None:
    """Print the report, part by part as it is measured."""
    # The chain's libraries announce their own deprecations; they would stand between the tables.
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory(prefix="brainloom-bench-") as folder:
        for part in report(Path(folder), centred(mni_brain(), GRID), SPECS["brainmvp"], CROP, ROUNDS, 1.0):
            print(part, flush=True)
    step.main()


def report(
    folder: Path, brain: np.ndarray, spec: PreprocessSpec, crop: int, rounds: int, share: float
) -> Iterator[str]:
    """Yield the parts of the report as Markdown.

    brain: (X, Y, Z) float32 on the grid of the spec, centred; share: of BrainMVP-16k's cases in the catalog.
    """
    torch.set_num_threads(1)
    limit_threads(1)
    yield f"Machine: {machine()}\n"
    results = []
    for every_z, limits in INPUTS:
        result = preprocess.measure(folder / f"z{every_z}", brain, spec, every_z, rounds, limits)
        results.append(result)
        yield f"## Preprocess: {result.title}\n\n{time_table(result.rounds)}\n"
        yield f"Largest difference to the chain: {result.gap:.1e} ({'met' if result.gap <= CLOSE else '**not met**'})\n"
        yield "Our time by step: " + ", ".join(f"{step} {share:.0%}" for step, share in result.steps.items()) + "\n"
    chain = results[0].rounds[preprocess.CHAIN]
    scans = write_scans(folder / "read", brain)
    reading = workplace(folder / "read.zarr", scans, spec)
    times, targets = crops.measure(folder, reading, scans, crop, 3 * rounds, chain)
    yield f"## Crop: {crop}^3 voxels of 2 modalities\n\n{time_table(times)}\n"
    teams, added = workers.measure(folder / "workers", scans, spec, rounds)
    targets += added
    per_case = teams[workers.TWO].median / workers.CASES
    yield f"## Workers\n\nTwo workers, {workers.CASES} cases: {per_case:.2f} s a case\n"
    listed = catalog.measure(folder / "catalog", min(rounds, CATALOG_ROUNDS), share)
    yield f"## Catalog: {listed.scans:,} scans\n\n{time_table(listed.rounds)}\n"
    targets += listed.targets
    text, added = metrics.part(spec.grid, min(rounds, metrics.ROUNDS))
    yield f"{text}\n"
    targets += added
    yield f"## Targets\n\n{target_table([t for r in results for t in r.targets] + targets)}\n"
    yield f"Machine at the end: {machine()}"
