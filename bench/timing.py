"""Interleaved rounds of rivals, medians, ratios, and the machine on which they were measured."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Rounds:
    """Times of one rival, one entry per round."""

    wall: tuple[float, ...]
    """Seconds by the clock."""
    cpu: tuple[float, ...]
    """Seconds of processor time of this process, all threads together."""

    @property
    def median(self) -> float:
        """Median seconds by the clock."""
        return statistics.median(self.wall)

    @property
    def cores(self) -> float:
        """Processor time per wall time: 1 for one busy thread, less when others hold the core or the disk is slow."""
        return sum(self.cpu) / sum(self.wall)


def race(
    rivals: Mapping[str, Callable[[], object]], rounds: int, before: Callable[[], object] | None = None
) -> dict[str, Rounds]:
    """Run every rival once per round, in turn, after one round that is not counted; `before` each run is not timed.

    In turn, so that what else the machine does meets all of them alike.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds}")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in rivals}
    for number in range(rounds + 1):
        for name, run in rivals.items():
            if before is not None:
                before()
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            lap = time.perf_counter() - wall, time.process_time() - cpu
            if number:
                times[name].append(lap)
    return {name: Rounds(tuple(w for w, _ in laps), tuple(c for _, c in laps)) for name, laps in times.items()}


@dataclass(frozen=True)
class Ratio:
    """How many times longer one rival takes than another, by round."""

    by_round: tuple[float, ...]

    @classmethod
    def of(cls, slower: Rounds, faster: Rounds) -> Ratio:
        """Divide the times of equal rounds."""
        return cls(tuple(a / b for a, b in zip(slower.wall, faster.wall, strict=True)))

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.by_round)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({min(self.by_round):.2f}-{max(self.by_round):.2f})"


@dataclass(frozen=True)
class Target:
    """A ratio beside what was asked of it."""

    what: str
    ratio: Ratio
    limit: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Say whether the median keeps the limit."""
        return self.ratio.median >= self.limit if self.at_least else self.ratio.median <= self.limit

    def row(self) -> str:
        """Return a line of a Markdown table."""
        asked = f"{'at least' if self.at_least else 'at most'} {self.limit:g}"
        return f"| {self.what} | {self.ratio} | {asked} | {'met' if self.met else '**not met**'} |"


def target_table(targets: list[Target]) -> str:
    """Return the Markdown table of some targets."""
    return "\n".join(["| ratio | median (range) | asked | |", "|---|---|---|---|", *(t.row() for t in targets)])


def time_table(results: Mapping[str, Rounds]) -> str:
    """Return the Markdown table of median times, for orientation: only the ratios carry over to other machines."""
    lines = [f"| {name} | {_human(r.median)} | {len(r.wall)} | {r.cores:.2f} |" for name, r in results.items()]
    return "\n".join(["| | median time | rounds | CPU / wall |", "|---|---|---|---|", *lines])


def machine() -> str:
    """Say on what, when and under which load this runs."""
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    usable = len(os.sched_getaffinity(0))
    return f"{when}; {_cpu_model()}, {usable} cores; load (1, 5, 15 min) {load}; Python {platform.python_version()}"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _human(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds:.2f} s"
