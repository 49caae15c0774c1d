"""What a segmentation benchmark waits for: predicting its test cases, or scoring what was predicted.

Full-size phantoms go through the product's own path: preprocessing into a store, the fine-tuning's prediction (sliding
windows of UniFormer-S over whole cases, files written), then the scores of three regions by the Dask workers that
the evaluation uses. The network has random weights, so its masks would be noise: before scoring they are replaced by
tumour-like ones, good and poor in turn.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from bench.inputs import DATASET, GRID, centred, mni_brain, write_scans
from bench.metrics import PREDICTIONS, tumour
from bench.step import WORLD, stored_cases
from bench.timing import machine
from flows.case_workers import LARGE, CaseWorkers
from infra.settings import Settings
from models.config import AnyNetwork, NetworkConfig, TrainingConfig
from models.predict import predict_cases
from models.predict_times import read_times
from models.recipes import find_recipe
from models.records import LABEL, Scan, SelectedCase
from models.selection import write_selection
from models.spec import SPECS, PreprocessSpec
from models.state import start_training
from models.store import open_store
from tasks.benchmarks import Benchmark, find_benchmark
from tasks.evaluation import Cohort
from tasks.processes import usable_cores
from tasks.scores import RowKey, segmentation_scores
from tasks.trained_scores import trained_masks

CASES = 4
"""Measured unless asked for more."""
ASKED = 40
"""Of the claim: scoring so many cases is bounded by inference."""


@dataclass(frozen=True)
class Measured:
    """Seconds by the clock."""

    cases: int
    predicting: float
    scoring: Mapping[int, float]
    """By the number of processes."""
    threads: int
    chosen: int
    """Processes that an evaluation of ASKED such cases would score with."""
    cpu: tuple[float, float]
    """Processor seconds of predicting, and of scoring with one worker: they hold on a busy machine, too."""

    def share(self, workers: int) -> float:
        """Return the share of scoring in predicting and scoring."""
        return self.scoring[workers] / (self.scoring[workers] + self.predicting)


def measure(
    folder: Path, brain: np.ndarray, spec: PreprocessSpec, network: AnyNetwork, edge: int, cases: int
) -> Measured:
    """Store, predict and score so many cases; edge: of the sliding window in voxels."""
    names = [f"case{k}" for k in range(cases + 1)]
    predictions = dict(zip(names, (poor_or_good(brain.shape, k) for k in range(len(names))), strict=True))
    scans = write_scans(folder / "scans", brain)
    labels = [write_label(folder / "scans", scans[0], name, label) for name, (_, label) in predictions.items()]
    store = str(folder / "scoring.zarr")
    first, *tested = stored_cases(store, scans, spec, names, labels)
    selected = [first, *(case.model_copy(update={"role": "test"}) for case in tested)]
    training = folder / "training"
    training.mkdir()
    write_selection(training / "selection.parquet", selected)
    state = start_training(prediction_config(store, training, network, edge), training, WORLD)
    begun = time.process_time()
    predict_cases(state)
    predicting = time.process_time() - begun
    times = read_times(training)
    assert times is not None
    benchmark = find_benchmark("brats2023-ped").replace(datasets=(DATASET,))
    cohort = Cohort(benchmark, (), open_store(store).cases().to_pandas(), open_store(store)).for_workers()
    replace_predictions(training, cohort, selected[1:], {name: masks for name, (masks, _) in predictions.items()})
    begun = time.process_time()
    scoring = {1: score(benchmark, cohort, training, selected[1:], 1)}
    cpu = predicting, time.process_time() - begun
    scoring |= {n: score(benchmark, cohort, training, selected[1:], n) for n in {usable_cores()} - {1}}
    chosen = usable_cores() if ASKED * math.prod(spec.grid) >= LARGE else 1
    return Measured(cases, times.seconds, scoring, torch.get_num_threads(), chosen, cpu)


def poor_or_good(grid: tuple[int, ...], number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return predicted masks and the label of a tumour on a grid of 1 mm, another one for each number."""
    away = list(PREDICTIONS.values())[number % len(PREDICTIONS)]
    x, y, z = grid
    return tumour((x, y, z), away, number)


def write_label(folder: Path, scan: Scan, name: str, label: np.ndarray) -> Scan:
    """Write a label on the grid of a scan and return its catalog row."""
    path = folder / f"{name}_seg.nii.gz"
    nib.save(nib.Nifti1Image(label, nib.load(scan.path).affine), path)
    size, changed = path.stat().st_size, str(path.stat().st_mtime_ns)
    changes = {"subject": name, "case": name, "modality": LABEL, "path": str(path), "dtype": "uint8"}
    return scan.replace(**changes, size_bytes=size, etag=changed, label_scheme="brats2023")


def prediction_config(store: str, training: Path, network: AnyNetwork, edge: int) -> TrainingConfig:
    """Return the config of a fine-tuning for three regions on this CPU."""
    config = find_recipe("segmentation")(store, str(training / "selection.parquet"), crop=(edge, edge, edge))
    data = config.data.replace(workers=0)
    return config.replace(network=network, data=data, world_size=1, threads=usable_cores())


def replace_predictions(
    training: Path, cohort: Cohort, cases: Sequence[SelectedCase], masks: Mapping[str, np.ndarray]
) -> None:
    """Write masks given on the grid of the files in the place of what was predicted, cut to the stored extent."""
    spec = cohort.store.spec
    for case in cases:
        origin, extent = cohort.place(case)
        start = origin if spec.frame == "template" else _start(masks[case.case], cohort, case)
        box = tuple(slice(at, at + size) for at, size in zip(start, extent, strict=True))
        regions = masks[case.case][(slice(None), *box)].astype(np.uint8)
        np.savez_compressed(training / "predictions" / f"{case.case}.npz", regions=regions)


def _start(masks: np.ndarray, cohort: Cohort, case: SelectedCase) -> tuple[int, ...]:
    """Return where the stored extent begins: cases are centred in their files, with equal margins."""
    return tuple((full - kept) // 2 for full, kept in zip(masks.shape[1:], cohort.place(case)[1], strict=True))


def score(benchmark: Benchmark, cohort: Cohort, training: Path, cases: Sequence[SelectedCase], workers: int) -> float:
    """Return the seconds of scoring all cases, here or by so many Dask workers, their start included."""
    key, read = RowKey("bench", "bench", 0), partial(trained_masks, cohort, training)
    begun = time.perf_counter()
    settings = Settings(workers=workers, state_dir=training.parent / "state")
    with CaseWorkers(settings, large=0 if workers > 1 else sys.maxsize) as work:
        segmentation_scores(key, benchmark, cases, read, cohort.truth, work)
        return time.perf_counter() - begun


def report(measured: Measured) -> str:
    """Return the Markdown of a measurement."""
    lines = ["| | seconds | a case |", "|---|---|---|"]
    rows = {f"predicting, {measured.threads} threads": measured.predicting}
    rows |= {f"scoring, {n} worker{'s' if n > 1 else ''}": seconds for n, seconds in measured.scoring.items()}
    lines += [f"| {what} | {seconds:.1f} | {seconds / measured.cases:.2f} |" for what, seconds in rows.items()]
    shares = ", ".join(f"{measured.share(n):.1%} ({n} worker{'s' if n > 1 else ''})" for n in measured.scoring)
    words = "met" if measured.share(measured.chosen) < 0.5 else "**not met**"
    sized = (
        "" if measured.cases >= ASKED else f"; {measured.cases} cases stand for {ASKED}, both grow with their number"
    )
    verdict = f"bounded by inference with the {measured.chosen} that an evaluation takes: {words}{sized}"
    predicting, scoring = measured.cpu
    cpu = f"{predicting:.1f} and {scoring:.1f} s, {scoring / (predicting + scoring):.1%}"
    return "\n".join(
        [*lines, "", f"Share of scoring: {shares}; {verdict}.", f"Processor seconds of both, one worker: {cpu}."]
    )


def main(cases: int) -> None:
    """Print this part alone, at full size."""
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"Machine: {machine()}\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="brainloom-bench-") as folder:
        found = measure(
            Path(folder), centred(mni_brain(), GRID), SPECS["brainmvp"], NetworkConfig(in_channels=4), 96, cases
        )
    size = "x".join(map(str, GRID))
    print(f"## Scoring: {cases} cases of {size}, UniFormer-S, three regions\n\n{report(found)}\n")
    print(f"Machine at the end: {machine()}")
