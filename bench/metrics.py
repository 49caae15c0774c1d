"""HD95 of three regions of a full-size case, MONAI's function against ours, and what all scores of a case cost."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance
from scipy.ndimage import distance_transform_edt, gaussian_filter

from bench.inputs import GRID
from bench.timing import Ratio, Rounds, Target, machine, race, target_table, time_table
from models.scoring import dice
from tasks.benchmarks import find_benchmark
from tasks.metrics_surface import surface_distances
from tasks.scores import score_case

PREDICTIONS = {"good": 1.5, "poor": 4.0}
"""By how many mm (standard deviation) the predicted surface is away from the true one."""
RADII = {"ET": 0.1, "TC": 0.15, "WT": 0.25}
"""Of the regions, in shares of the shortest edge of the grid: 15, 23 and 39 mm."""
FASTER = 5.0
"""Asked: how many times faster than MONAI."""
ROUNDS = 7
CLOSE = 1e-4


def tumour(grid: tuple[int, int, int], away_mm: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return predicted masks (3, X, Y, Z) and the label (X, Y, Z) of a rugged tumour on a grid of 1 mm."""
    rng = np.random.default_rng(seed)
    centre = np.array([0.4, 0.5, 0.5]) * grid
    axes = [(np.arange(n) - c) ** 2 for n, c in zip(grid, centre, strict=True)]
    distance = np.sqrt(axes[0][:, None, None] + axes[1][None, :, None] + axes[2])
    rugged = distance + 0.2 * RADII["WT"] * min(grid) * _waves(rng, grid, 6)
    truth = [rugged < share * min(grid) for share in RADII.values()]
    noise = away_mm * _waves(rng, grid, 2)
    predicted = [distance_transform_edt(mask) - distance_transform_edt(~mask) + noise > 0 for mask in truth]
    return np.stack(predicted), np.select(truth, [3, 1, 2], 0).astype(np.uint8)


def _waves(rng: np.random.Generator, grid: tuple[int, int, int], sigma: float) -> np.ndarray:
    field = gaussian_filter(rng.normal(size=grid).astype(np.float32), sigma)
    return field / field.std()


def measure(grid: tuple[int, int, int], rounds: int) -> tuple[dict[str, Rounds], list[Target], list[str]]:
    """Race MONAI's HD95 of three regions against ours on one grid; returns times, targets and remarks."""
    times: dict[str, Rounds] = {}
    targets, remarks = [], []
    benchmark = find_benchmark("brats2023-ped")
    for name, away in PREDICTIONS.items():
        predicted, label = tumour(grid, away)
        truth = np.stack([np.isin(label, region.labels) for region in benchmark.regions])
        theirs, ours, everything = (f"{what}, {name} prediction" for what in ("MONAI", "ours", "all scores of a case"))
        times |= race(
            {
                theirs: partial(monai_hd95, predicted, truth),
                ours: partial(our_hd95, predicted, truth),
                everything: partial(score_case, predicted, (label, (1.0, 1.0, 1.0)), benchmark, "bench"),
            },
            rounds,
        )
        ratio = Ratio.of(times[theirs], times[ours])
        targets.append(Target(f"HD95 of three regions, MONAI / ours, {name} prediction", ratio, FASTER, at_least=True))
        gap = float(np.abs(np.subtract(monai_hd95(predicted, truth), our_hd95(predicted, truth))).max())
        overlap = ", ".join(f"{value:.2f}" for value in dice(predicted, truth))
        verdict = "met" if gap <= CLOSE else "**not met**"
        remarks.append(f"{name} prediction: Dice {overlap}; largest difference to MONAI {gap:.1e} mm ({verdict})")
    return times, targets, remarks


def monai_hd95(predicted: np.ndarray, truth: np.ndarray) -> list[float]:
    """Return MONAI's HD95 of each region, on whole volumes as an evaluation calls it."""
    tensors = [torch.from_numpy(masks)[None].float() for masks in (predicted, truth)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=[1.0, 1.0, 1.0])
    return [float(value) for value in found[0]]


def our_hd95(predicted: np.ndarray, truth: np.ndarray) -> list[float]:
    """Return our HD95 of each region."""
    return [surface_distances(one, other, (1, 1, 1)).hd95 for one, other in zip(predicted, truth, strict=True)]


def part(grid: tuple[int, int, int], rounds: int) -> tuple[str, list[Target]]:
    """Return this part of the report as Markdown, and its targets."""
    times, targets, remarks = measure(grid, rounds)
    size = "x".join(map(str, grid))
    return f"## Metrics: {size}, three regions\n\n{time_table(times)}\n\n" + "\n".join(remarks) + "\n", targets


def main() -> None:
    """Print this part alone."""
    torch.set_num_threads(1)
    print(f"Machine: {machine()}\n")
    text, targets = part(GRID, ROUNDS)
    print(f"{text}\n{target_table(targets)}\n\nMachine at the end: {machine()}")
