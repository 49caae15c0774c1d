"""The whole of BrainMVP-16k as small volumes through `brainloom preprocess`: time, orchestration, memory, task runs.

Somebody has the UI open meanwhile, nothing may be lost, and the server's database is weighed after every stage. With
kills: the same, killed with all its processes at random moments and started again, must end with the same store.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil
import yaml
from isal import igzip

from bench.catalog import write_cohort
from bench.growth import Growth, age, sizes, vacuum
from bench.kills import Started, flow_command, kill_after_cases, kill_points, kill_server, kill_table, receipts_in
from bench.timing import machine
from bench.watching import Watcher, ended_well, latency_table
from infra.server import ServerInfo, child_environment, ensure_server, stop_server
from infra.settings import Settings
from models.spec import PreprocessSpec
from models.store import open_store, read_cases, store_digest
from tasks import plan as plans
from tasks.catalog import build_catalog, read_catalog, write_catalog
from tasks.sources import SourceConfig

SHARES = (1 / 16, 1 / 4, 1.0)
"""Of the cohort's 3,755 cases and 16,021 scans; the last one is held against the limits."""
SHAPE = (24, 24, 16)
SPEC = PreprocessSpec(name="scale", spacing_mm=8.0, grid=SHAPE)
"""Eight modalities as in BrainMVP's; voxels so large that the small volumes have the size of a head."""
WORKERS = 2
SAMPLE_S = 0.1
"""How often the memory of the flow's process is looked at."""
PREPROCESS_S, NOTHING_S, ORCHESTRATION_MS, TASK_RUNS, DRIVER_MIB = 360.0, 10.0, 2.0, 500, 1024
LINEAR = 1.3
"""How much dearer a scan may be between the second and third share than between the first and second."""
PAGES = ("progress-preprocess", "qc", "quarantine", "duplicates", "unchanged")
"""Keys of artifacts that must be there after a run and one with nothing to do."""
LATENCY_S = 1.0
"""What 95 of 100 requests of an open page may take while the largest share is preprocessed."""
OLD_DAYS = 100
"""Age that all flow runs are given before `brainloom retention` removes those of more than its 90 days."""
FLAT_MIB = 20
"""How much the flow's process may grow in the middle third of its time, in which some 1,300 cases are written."""


@dataclass(frozen=True)
class Watched:
    """One run of the command."""

    seconds: float
    """From the start of its process to its end."""
    cpu: float
    """Processor time of it and its workers."""
    memory: tuple[float, ...]
    """MiB of the flow's own process, every SAMPLE_S."""


@dataclass(frozen=True)
class Run:
    """What one share of the cohort cost."""

    scans: int
    cases: int
    first: Watched
    again: Watched
    """The same command with nothing to do."""
    busy: float
    """Seconds that workers spent on cases, summed over the cases."""
    task_runs: int
    lost: tuple[str, ...]
    """Sentences about cases, flow runs, task runs and artifacts of which there are not as many as there must be."""
    watcher: Watcher
    """Who had the UI open during the first run."""

    @property
    def orchestration_ms(self) -> float:
        """Milliseconds a scan that are not a worker's work on it; start of processes and finalise included."""
        return 1000 * (self.first.seconds - self.busy / WORKERS) / self.scans

    @property
    def grown(self) -> float:
        """MiB by which the flow's process grew while workers worked: from a third to two thirds of its time."""
        memory = self.first.memory
        return memory[len(memory) * 2 // 3] - memory[len(memory) // 3]


def write_brain(path: Path) -> None:
    """Write an ellipsoid of tissue with noise of its own, int16 `.nii.gz`, 8 mm voxels."""
    rng = np.random.default_rng(zlib.crc32(path.name.encode()))
    x, y, z = np.meshgrid(*(np.linspace(-1.15, 1.15, n) for n in SHAPE), indexing="ij")
    inside = x**2 + y**2 + z**2 < 1
    voxels = np.where(inside, np.clip(500 + 200 * x * y + rng.normal(0, 120, SHAPE), 1, 4000), 0)
    affine = np.diag([SPEC.spacing_mm] * 3 + [1.0])
    affine[:3, 3] = [-(n - 1) / 2 * SPEC.spacing_mm for n in SHAPE]
    image = nib.Nifti1Image(voxels.astype(np.int16), affine)
    path.write_bytes(igzip.compress(image.to_bytes(), 1))


def measure(folder: Path, share: float, settings: Settings, growth: Growth) -> Run:
    """Write a share of the cohort, run `brainloom preprocess` on it twice, and look at its process and the server."""
    server = ensure_server(settings)
    scans = write_catalogued(folder, share)
    store = str(folder / "s.zarr")
    config = write_config(folder / "preprocess.yaml", folder / "ws", store)
    environment = command_environment(settings, server)
    before = ended_well(server.api_url, PAGES)
    with Watcher(server.api_url) as watcher:
        first = _watched(config, environment)
    growth.note(f"{scans:,} scans")
    again = _watched(config, environment)
    growth.note("the same, nothing to do")
    lines = read_cases(store, ["status", "seconds"])
    if set(lines.column("status").to_pylist()) != {"stored"}:
        raise RuntimeError(f"not every case is stored: {open_store(store).cases().to_pylist()[:3]}")
    busy = math.fsum(lines.column("seconds").to_pylist())
    found = {what: count - before[what] for what, count in ended_well(server.api_url, PAGES).items()}
    found["cases"] = lines.num_rows
    lost = [f"{found[what]} {what}, not {count}" for what, count in _expected(folder).items() if found[what] != count]
    return Run(scans, lines.num_rows, first, again, busy, found["task runs"], tuple(lost), watcher)


def _expected(folder: Path) -> dict[str, int]:
    """Return what a run and one with nothing to do must leave: every case, every case batch, every page."""
    from flows.batches import split_batches  # imports Prefect, which the kills do not need
    from flows.preprocess_params import PreprocessParams

    cases = {(scan.dataset, scan.case) for scan in read_catalog(str(folder / "ws"))}
    size = PreprocessParams.model_fields["case_batch"].default
    batches = split_batches(plans.read_plans(str(folder / "s.zarr")), size, WORKERS)
    # The progress of both, the others of one of them.
    return {"cases": len(cases), "flow runs": 2, "task runs": len(batches), "artifacts": len(PAGES) + 1}


def command_environment(settings: Settings, server: ServerInfo) -> dict[str, str]:
    """Return the environment of a command of ours on this server."""
    return child_environment(settings, server) | {"BRAINLOOM_STATE_DIR": str(settings.state_dir)}


def write_catalogued(folder: Path, share: float) -> int:
    """Write a share of the cohort and its catalog (`<folder>/ws`), and return the number of scans."""
    sources = write_cohort(folder / "sources", share, write_brain)
    catalog = build_catalog(sources)
    write_catalog(catalog, str(folder / "ws"))
    _write_ingest(folder, sources)
    return len(catalog.scans)


def _write_ingest(folder: Path, sources: list[SourceConfig]) -> None:
    """Write the parameters of an ingest of the same sources into the same store."""
    found = [source.model_dump(mode="json") for source in sources]
    preprocess = _parameters(folder / "ws", str(folder / "s.zarr"))
    params = {"catalog": {"sources": found, "workspace": str(folder / "ws")}, "preprocess": preprocess}
    (folder / "ingest.yaml").write_text(yaml.safe_dump(params))


def _parameters(catalog: Path, store: str) -> dict[str, object]:
    own = SPEC.model_dump(mode="json")
    return {"catalog": str(catalog), "store": store, "own_spec": own, "workers": WORKERS}


def write_config(path: Path, catalog: Path, store: str) -> Path:
    """Write the parameters of `brainloom preprocess`, and return where."""
    path.write_text(yaml.safe_dump(_parameters(catalog, store)))
    return path


def nights_and_retention(folder: Path, settings: Settings, growth: Growth) -> None:
    """Weigh the database after an ingest, one with nothing new, and after `retention` of a history that is old."""
    server = ensure_server(settings)
    environment = command_environment(settings, server)
    for stage in ("ingest, its first night", "ingest, a night with nothing new", "ingest, one more such night"):
        _command(environment, "ingest", folder / "ingest.yaml")
        growth.note(stage)
    age(growth.database, OLD_DAYS)
    config = folder / "retention.yaml"
    config.write_text(yaml.safe_dump({"dry_run": False, "keep_last": 1, "workspaces": []}))
    _command(environment, "retention", config)
    growth.note(f"retention, all flow runs {OLD_DAYS} days old, the last of each flow kept")


def _command(environment: dict[str, str], verb: str, config: Path) -> None:
    command = [str(Path(sys.executable).with_name("brainloom")), verb, "--config", str(config)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def _watched(config: Path, environment: dict[str, str]) -> Watched:
    """Run the command and look at the memory of its own process; workers are others."""
    command = [str(Path(sys.executable).with_name("brainloom")), "preprocess", "--config", str(config)]
    log = config.with_suffix(".log")
    began, memory, ended = time.perf_counter(), [], 0
    with log.open("ab") as out:
        process = psutil.Popen(command, env=environment, stdout=out, stderr=out)
    while not ended:
        memory.append(process.memory_info().rss / 2**20)
        time.sleep(SAMPLE_S)
        # The processor time of the workers is part of what the command used once they have been waited for.
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    if status:
        raise RuntimeError(f"{' '.join(command)} ended with {status}:\n{log.read_text()[-3000:]}")
    return Watched(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, tuple(memory))


def table(runs: list[Run]) -> str:
    """Return what was measured as a Markdown table."""
    columns = "scans", "cases", "seconds", "CPU s", "ms a scan", "of it orchestration", "nothing to do"
    lines = [f"| {' | '.join((*columns, 'task runs', 'driver peak, growth'))} |", "|---" * (len(columns) + 2) + "|"]
    for r in runs:
        cells = (
            f"{r.scans:,}",
            f"{r.cases:,}",
            f"{r.first.seconds:.1f}",
            f"{r.first.cpu:.1f}",
            f"{1000 * r.first.seconds / r.scans:.2f}",
            f"{r.orchestration_ms:.2f}",
            f"{r.again.seconds:.1f} s ({r.again.cpu:.1f} CPU s)",
            f"{r.task_runs}",
            f"{max(r.first.memory):.0f} MiB, {r.grown:+.0f} MiB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def slope(runs: list[Run]) -> float:
    """Return the cost of one more scan at the upper end over that at the lower end; 1 is linear."""
    costs = [(b.first.seconds - a.first.seconds) / (b.scans - a.scans) for a, b in pairwise(runs)]
    return costs[-1] / costs[0]


def limits(runs: list[Run]) -> str:
    """Return the Markdown table of what was asked of the largest run."""
    last = runs[-1]
    rows = [
        ("preprocess, s", last.first.seconds, PREPROCESS_S),
        ("orchestration, ms a scan", last.orchestration_ms, ORCHESTRATION_MS),
        ("nothing to do, s", last.again.seconds, NOTHING_S),
        ("task runs", last.task_runs, TASK_RUNS),
        ("cases, flow runs, task runs, artifacts lost: kinds", sum(len(run.lost) for run in runs), 0),
        ("p95 of an open page's requests, s", latency(last), LATENCY_S),
        ("driver peak, MiB", max(last.first.memory), DRIVER_MIB),
        ("driver growth in the middle third, MiB", last.grown, FLAT_MIB),
        *([("cost of a scan, upper end / lower end", slope(runs), LINEAR)] if len(runs) > 2 else []),
    ]
    lines = [f"| {what} | {value:.2f} | {limit:g} | {_verdict(value <= limit)} |" for what, value, limit in rows]
    return "\n".join(["| | measured | at most | |", "|---|---|---|---|", *lines])


def latency(run: Run) -> float:
    """Return the seconds that 95 of 100 requests of the open page took at most, all routes together."""
    return float(np.percentile([one for seconds in run.watcher.seconds.values() for one in seconds], 95))


def _verdict(met: bool) -> str:
    return "met" if met else "**not met**"


def report(folder: Path, shares: tuple[float, ...]) -> Iterator[str]:
    """Yield the parts of the report as Markdown."""
    yield f"Machine: {machine()}\n"
    settings = Settings(state_dir=folder / "state", workers=WORKERS)
    growth = Growth(settings.server_dir / "prefect.db")
    runs = []
    try:
        ensure_server(settings)
        growth.note("start of the server")
        for number, share in enumerate(shares):
            runs.append(measure(folder / str(number), share, settings, growth))
            yield "\n".join(
                [f"measured {runs[-1].scans:,} scans in {runs[-1].first.seconds:.0f} s", *runs[-1].lost, ""]
            )
        nights_and_retention(folder / str(len(shares) - 1), settings, growth)
    finally:
        stop_server(settings)
    vacuum(growth.database)
    growth.stages.append(("`VACUUM`, the server stopped", sizes(growth.database)))
    yield f"## Scale: composition of BrainMVP-16k, {SHAPE} voxels, {WORKERS} workers\n\n{table(runs)}\n"
    yield f"{limits(runs)}\n"
    yield f"{latency_table({f'{run.scans:,} scans': run.watcher for run in runs})}\n"
    yield f"## The server's database, MB\n\n{growth.table()}\n"
    yield f"Machine at the end: {machine()}"


def report_kills(folder: Path, kills: int, share: float = 1.0, seed: int = 0) -> Iterator[str]:
    """Yield the parts of the report on a preprocess that is killed and started again and again, as Markdown."""
    yield f"Machine: {machine()}\n"
    settings = Settings(state_dir=folder / "state", workers=WORKERS)
    environment = {"BRAINLOOM_STATE_DIR": str(settings.state_dir)}
    scans = write_catalogued(folder, share)
    whole, store = folder / "undisturbed.zarr", folder / "killed.zarr"
    try:
        config = write_config(folder / "undisturbed.yaml", folder / "ws", str(whole))
        undisturbed = _watched(config, dict(os.environ) | environment)
        yield f"preprocessed {scans:,} scans in {undisturbed.seconds:.0f} s, undisturbed\n"
        cases = read_cases(str(whole), ["status"]).num_rows
        config = write_config(folder / "killed.yaml", folder / "ws", str(store))
        starts = []
        for done in kill_points(kills, cases, seed):
            process = flow_command("preprocess", config, config.with_suffix(".log"), **environment)
            starts.append(kill_after_cases(process, store, done))
            kill_server(settings)
            yield f"killed after {starts[-1].seconds:.0f} s, {starts[-1].cases:,} cases were done\n"
        last = _watched(config, dict(os.environ) | environment)
        starts.append(Started(last.seconds, receipts_in(store)))
    finally:
        stop_server(settings)
    yield f"## {kills} kills of flow, workers and server: {scans:,} scans, {WORKERS} workers, moments of seed {seed}\n"
    yield f"{kill_table(starts, cases, store_digest(str(store)) == store_digest(str(whole)))}\n"
    yield f"Machine at the end: {machine()}"


def main(kills: int = 0, share: float = 1.0) -> None:
    """Print the report: about three minutes, with kills four.

    kills: instead of the measurement. share: of the cohort, for kills.
    """
    with tempfile.TemporaryDirectory(prefix="brainloom-scale-") as folder:
        parts = report_kills(Path(folder), kills, share) if kills else report(Path(folder), SHARES)
        for part in parts:
            print(part, flush=True)
