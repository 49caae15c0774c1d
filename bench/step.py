"""One optimisation step of BrainMVP: ours against the reference's structure and against a floor of matrix products.

Every rival has a process of its own, so that its peak memory is its own; they run one after another, since a process
keeps what it once held (some 12 GiB). All start from the same weights and see the same batches, read from a store of
two cases. The matrix product of the floor is timed before each step.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.inputs import DATASET, GRID, centred, mni_brain, write_scans
from bench.timing import Ratio, Rounds, Target, machine, target_table, time_table
from models.config import BrainMVPConfig, NetworkConfig, TrainingConfig
from models.distributed import World
from models.recipes import find_recipe
from models.records import PlannedCase, Scan, SelectedCase
from models.selection import write_selection
from models.spec import SPECS, PreprocessSpec
from models.state import start_training
from models.store import create_or_open, read_lines
from models.trainer import bf16_on_cpu, train_step
from tasks import plan as plans
from tasks import shards
from tasks.launch import KEEP_MEMORY
from tasks.preprocess import preprocess_batch

OURS, OURS_BF16, REFERENCE, FLOOR = "ours, fp32", "ours, bf16", "reference's structure, fp32", "floor"
CASES = 2
"""In a batch: InfoNCE of one case is 0."""
VIEWS = 2
THREADS = 2
PARTS = ("data", "forward", "backward", "optimiser")
LIMIT, STRETCH = 4.8, 3.3
"""Ours / floor: what is asked, and what would be fine."""
CLOSE = 1e-4
"""How far our first loss may be from the reference's, relative; summation in another order alone gives some 1e-6."""
ROUNDS = 2
WORLD = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Lap:
    """One step."""

    parts: Mapping[str, float]
    """Seconds by the clock."""
    cpu: float
    loss: float

    @property
    def wall(self) -> float:
        """Seconds of the whole step."""
        return sum(self.parts.values())


class Stopwatch:
    """Times the parts of a step by hooks on the module and the optimiser: the loop is the one that trains."""

    def __init__(self, module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        self.marks: dict[str, float] = {}
        module.register_forward_pre_hook(lambda *_: self._mark("forward"))
        module.register_forward_hook(lambda *_: self._mark("backward"))
        optimiser.register_step_pre_hook(lambda *_: self._mark("optimiser"))

    def _mark(self, part: str) -> None:
        self.marks[part] = time.perf_counter()

    def lap(self, run: Callable[[], float]) -> Lap:
        """Do a step, which returns its loss. Clipping counts as backward."""
        cpu = time.process_time()
        self._mark("data")
        loss = run()
        ends = [*(self.marks[part] for part in PARTS[1:]), time.perf_counter()]
        parts = {part: end - self.marks[part] for part, end in zip(PARTS, ends, strict=True)}
        return Lap(parts, time.process_time() - cpu, loss)


def ours(config: TrainingConfig, folder: Path) -> tuple[Stopwatch, Callable[[], float]]:
    """Return the training loop's own step."""
    state = start_training(config, folder, WORLD)
    return Stopwatch(state.model, state.optimiser), lambda: train_step(state, lambda: False).losses["loss"]


def reference(config: TrainingConfig, folder: Path) -> tuple[Stopwatch, Callable[[], float]]:
    """Return a step of the reference's structure, from the weights and with the batches of ours."""
    from bench.reference import Reference

    assert isinstance(config.network, NetworkConfig)
    assert isinstance(config.objective, BrainMVPConfig)
    state = start_training(config, folder, WORLD)
    torch.use_deterministic_algorithms(False)
    model = Reference(config.network, state.store.spec.grid, config.objective.mask_block)
    missing, foreign = model.load_state_dict(state.objective.state_dict(), strict=False)
    if foreign or not all(name.startswith("decoder.") for name in missing):
        raise ValueError(f"the reference's networks have other names than ours: {missing} are missing, {foreign} extra")
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=config.optimiser.lr, weight_decay=config.optimiser.weight_decay
    )
    batches = state.batches

    def run() -> float:
        optimiser.zero_grad()
        loss = model(next(batches))
        loss.backward()
        optimiser.step()
        return float(loss.detach())

    return Stopwatch(model, optimiser), run


BUILDERS = {OURS: ours, OURS_BF16: ours, REFERENCE: reference}


def serve(pipe: Connection, name: str, config: TrainingConfig, folder: Path) -> None:
    """Do a step for each true value received and answer with its lap; then answer with the peak memory in bytes."""
    watch, run = BUILDERS[name](config, folder)
    while pipe.recv():
        pipe.send(watch.lap(run))
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


class Rival:
    """A process that does steps on demand."""

    def __init__(self, name: str, config: TrainingConfig, folder: Path) -> None:
        folder.mkdir(parents=True)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, name, config, folder), daemon=True)
        with patch.dict(os.environ, {**KEEP_MEMORY, "OMP_NUM_THREADS": str(config.threads)}):
            self._process.start()
        theirs.close()  # so that a dead process ends our waiting

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()

    def lap(self) -> Lap:
        """Do one step."""
        self._pipe.send(True)
        return self._pipe.recv()

    def peak_bytes(self) -> int:
        """End the process and return the most memory that it held."""
        self._pipe.send(False)
        return self._pipe.recv()


@dataclass(frozen=True)
class Measured:
    """All laps by rival, the first one not to be counted for time."""

    laps: Mapping[str, Sequence[Lap]]
    floors: Mapping[str, Rounds]
    """Times of the floor of a step, measured between the steps of each rival."""
    peaks: Mapping[str, int]
    operations: int
    """Of a forward pass over all views of a batch."""

    @property
    def rate(self) -> float:
        """Median fp32 operations per second of the matrix product."""
        return 3 * self.operations / self.floors[OURS].median

    def rounds(self, name: str) -> Rounds:
        """Return the times of a rival's steps."""
        laps = self.laps[name][1:]
        return Rounds(tuple(lap.wall for lap in laps), tuple(lap.cpu for lap in laps))


def step_config(store: str, selection: str, network: NetworkConfig, edge: int, precision: str) -> TrainingConfig:
    """Return the paper's BrainMVP with all three losses from the first step, two cases a batch, on this CPU."""
    return find_recipe("brainmvp")(
        store,
        selection,
        preset="paper",
        contrast_from_epoch=0,
        network=network,
        crop=(edge, edge, edge),
        batch_size=CASES,
        workers=0,
        world_size=1,
        threads=THREADS,
        precision=precision,
        epochs=1000,
    )


def measure(
    folder: Path, brain: np.ndarray, spec: PreprocessSpec, network: NetworkConfig, edge: int, rounds: int, matrix: int
) -> Measured:
    """Run every rival, `rounds` steps after one that is not counted.

    edge: of the crop in voxels; matrix: side of the square matrices of the floor.
    """
    store = folder / "step.zarr"
    selection = folder / "selection.parquet"
    write_selection(selection, stored_cases(str(store), write_scans(folder / "step", brain), spec, ("one", "two")))
    torch.set_num_threads(THREADS)  # preprocessing has set one
    configs = {
        name: step_config(str(store), str(selection), network, edge, precision)
        for name, precision in ((OURS, "fp32"), (OURS_BF16, "bf16"), (REFERENCE, "fp32"))
        if precision == "fp32" or bf16_on_cpu()
    }
    operations = forward_operations(network, edge) * VIEWS * CASES
    scale = 3 * operations / (2 * matrix**3)
    laps: dict[str, list[Lap]] = {name: [] for name in configs}
    floors: dict[str, Rounds] = {}
    peaks: dict[str, int] = {}
    for name, config in configs.items():
        products: list[tuple[float, float]] = []
        with Rival(name, config, folder / f"rival{len(peaks)}") as rival:
            for _ in range(rounds + 1):
                products.append(matrix_product(matrix))
                laps[name].append(rival.lap())
            peaks[name] = rival.peak_bytes()
        floors[name] = Rounds(
            tuple(wall * scale for wall, _ in products[1:]), tuple(cpu * scale for _, cpu in products[1:])
        )
    return Measured(laps, floors, peaks, operations)


def forward_operations(network: NetworkConfig, edge: int) -> int:
    """Return the floating-point operations of encoder and decoder for one view, as the reference computes it."""
    from bench.reference import Decoder, Encoder

    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder, decoder = Encoder(network).eval(), Decoder(network)
        decoder(encoder(torch.empty(1, network.in_channels, edge, edge, edge)))
    return counter.get_total_flops()


def matrix_product(side: int) -> tuple[float, float]:
    """Return wall and processor seconds of one fp32 product of square matrices, the median of five."""
    left, right = torch.rand(2, side, side)
    times = []
    for _ in range(5):
        wall, cpu = time.perf_counter(), time.process_time()
        left @ right
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return sorted(times)[2]


def stored_cases(
    store: str, scans: Sequence[Scan], spec: PreprocessSpec, names: Sequence[str], labels: Sequence[Scan] = ()
) -> list[SelectedCase]:
    """Preprocess the scans as subjects of the same voxels, each with its own label if any; return training cases."""
    repeated = [scan.replace(subject=name, case=name) for name in names for scan in scans]
    writer = create_or_open(store, spec)
    cases: Sequence[PlannedCase] = plans.plan_rows(plans.cases_from_scans([*repeated, *labels]), (), spec).added
    plans.write_plan(writer.url, cases, spec.content_digest())
    writer.grow(DATASET, len(cases), with_label=bool(labels))
    preprocess_batch(writer.url, [case.model_dump(mode="json") for case in cases], "bench")
    shards.finalise(writer.url, cases)
    lines = read_lines(writer.url).to_pylist()
    return [
        SelectedCase(**{name: line[name] for name in ("dataset", "row", "case", "subject", "digest")}, role="train")
        for line in lines
    ]


def report(measured: Measured) -> str:
    """Return the Markdown of a measurement."""
    times = {name: measured.rounds(name) for name in measured.laps} | {FLOOR: measured.floors[OURS]}
    loss, theirs = (measured.laps[name][0].loss for name in (OURS, REFERENCE))
    gap = abs(loss - theirs) / abs(theirs)
    return "\n".join(
        [
            f"{measured.operations / CASES / 1e9:.0f} GFLOP forward a case, {measured.rate / 1e9:.0f} GFLOP/s in fp32: "
            f"floor {measured.floors[OURS].median / CASES:.2f} s a case\n",
            time_table(times),
            "",
            part_table(measured),
            "",
            f"First loss: ours {loss:.6f}, reference's {theirs:.6f}, relative difference {gap:.1e} "
            f"({'met' if gap <= CLOSE else '**not met**'})",
        ]
    )


def part_table(measured: Measured) -> str:
    """Return the Markdown table of medians per case by part, and of peak memory."""
    lines = ["| s a case | step | " + " | ".join(PARTS) + " | peak memory |", "|---" * (len(PARTS) + 3) + "|"]
    for name, laps in measured.laps.items():
        parts = [float(np.median([lap.parts[part] for lap in laps[1:]])) / CASES for part in PARTS]
        row = " | ".join(f"{seconds:.2f}" for seconds in (measured.rounds(name).median / CASES, *parts))
        lines.append(f"| {name} | {row} | {measured.peaks[name] / 2**30:.2f} GiB |")
    return "\n".join(lines)


def targets(measured: Measured) -> list[Target]:
    """Return the ratios beside what was asked of them."""
    fp32, theirs = measured.rounds(OURS), measured.rounds(REFERENCE)
    memory = Ratio((measured.peaks[OURS] / measured.peaks[REFERENCE],))
    found = [
        Target("step: ours / floor", Ratio.of(fp32, measured.floors[OURS]), LIMIT, at_least=False),
        Target("step: ours / floor, stretch", Ratio.of(fp32, measured.floors[OURS]), STRETCH, at_least=False),
        Target("step: reference / ours", Ratio.of(theirs, fp32), 2.2, at_least=True),
        Target("step: peak memory, ours / reference", memory, 1, at_least=False),
    ]
    if OURS_BF16 in measured.laps:
        found.append(Target("step: bf16 / fp32", Ratio.of(measured.rounds(OURS_BF16), fp32), 1, at_least=False))
    return found


def full_report(folder: Path, brain: np.ndarray) -> Iterator[str]:
    """Yield the report at full size: UniFormer-S, two crops of 96^3."""
    measured = measure(folder, brain, SPECS["brainmvp"], NetworkConfig(), 96, ROUNDS, 4096)
    yield f"## Step: UniFormer-S, {CASES} x 96^3, {THREADS} threads\n\n{report(measured)}\n"
    yield target_table(targets(measured)) + "\n"


def main() -> None:
    """Print the report of the step alone."""
    print(f"Machine: {machine()}\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="brainloom-bench-") as folder:
        for part in full_report(Path(folder), centred(mni_brain(), GRID)):
            print(part, flush=True)
    print(f"Machine at the end: {machine()}")
