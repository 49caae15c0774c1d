"""Kill -9 of the demo, of a Dask worker, of a rank; its evaluation cancelled: run again, it ends as if undisturbed."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from api_states import last_runs, start_deployment, unfinished_task_runs, wait_for_state
from demo_runs import DemoRun, run_demo, start_demo
from deployed import cancel, deployed, worker_log
from processes import words_of
from waiting import until

from infra.server import server_status, stop_server
from infra.settings import Settings
from models.store import store_digest
from tasks.verify import verify

pytestmark = [pytest.mark.full, pytest.mark.timeout(2700)]
POLL_S = 0.05
STEP_TIMEOUT_S = 400
Folder = tuple[Path, Path]

# When each has happened the demo is killed: in the order of the chain, each in the middle of its stage.
MOMENTS: dict[str, str] = {
    "phantoms are being written": "sources/*/*/**/*.nii.gz",
    "the catalog is written": "catalog.parquet",
    "the first receipts are there": "store.zarr/_build/receipts/**/*.json",
    "pre-training has made a step": "trainings/brainmvp_tiny/metrics.jsonl",
    "pre-training has saved": "trainings/brainmvp_tiny/checkpoints/*",
    "fine-tuning has made a step": "trainings/phantom-*/metrics.jsonl",
    "scores are being written": "scores/*.parquet",
}
WITH_THE_SERVER = ("the first receipts are there", "pre-training has saved")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    """Return workspace and state folder of a demo; its server is stopped at the end."""
    yield tmp_path / "ws", tmp_path / "state"
    stop_server(Settings(state_dir=tmp_path / "state"))


def test_killed_in_every_stage_it_ends_with_the_same_digests(folder: Folder, tiny_demo: DemoRun) -> None:
    workspace, state = folder
    log = workspace.parent / "demo.log"
    for moment, pattern in MOMENTS.items():
        demo = start_demo(workspace, state, log)
        wait_until(demo, lambda pattern=pattern: any_content(workspace, pattern), f"{moment}; log {log}")
        kill_tree(demo, spared=() if moment in WITH_THE_SERVER else server_of(state))
        assert demo.wait(30) == -9
        assert_nothing_writes(workspace)
    assert_same(run_demo(workspace, state), tiny_demo)


def test_a_killed_worker_and_a_killed_rank_cost_nothing(folder: Folder, tiny_demo: DemoRun) -> None:
    workspace, state = folder
    log = workspace.parent / "demo.log"
    demo = start_demo(workspace, state, log)
    wait_until(demo, lambda: any_content(workspace, MOMENTS["the first receipts are there"]), "a receipt")
    worker = next(child for child in below(demo) if "--multiprocessing-fork" in words_of(child))
    worker.kill()
    wait_until(demo, lambda: any_content(workspace, MOMENTS["pre-training has made a step"]), "a step")
    rank = next(child for child in below(demo) if environment_of(child).get("RANK") == "1")
    rank.kill()
    assert demo.wait(STEP_TIMEOUT_S) == 0, log.read_text()[-4000:]
    assert "exitcode  : -9" in (workspace / "trainings/brainmvp_tiny/train.log").read_text()
    assert_same(run_demo(workspace, state), tiny_demo)


def test_a_cancelled_evaluation_leaves_no_process_and_is_continued(tmp_path: Path, tiny_demo: DemoRun) -> None:
    workspace = tmp_path / "ws"
    shutil.copytree(tiny_demo.workspace, workspace)
    shutil.rmtree(workspace / "tables")
    (workspace / "scores.parquet").unlink()
    for training in workspace.glob("trainings/phantom-*"):
        shutil.rmtree(training)
    (undisturbed,) = last_runs(tiny_demo.api_url, "evaluate")
    params = {**undisturbed["parameters"]["params"], "workspace": str(workspace)}
    with deployed(tmp_path) as server:
        first = start_deployment(server.api_url, "evaluate/evaluate", params)
        step = partial(any_content, workspace, MOMENTS["fine-tuning has made a step"])
        until(step, lambda: f"a step:\n{worker_log(tmp_path)}", STEP_TIMEOUT_S)
        cancel(server.api_url, first)
        assert not (workspace / "scores.parquet").exists(), "it was cancelled before its end"
        assert unfinished_task_runs(server.api_url, first) == []
        again = start_deployment(server.api_url, "evaluate/evaluate", params)
        wait_for_state(server.api_url, again, "Completed")
    assert_same_tables(workspace, tiny_demo)


def any_content(workspace: Path, pattern: str) -> bool:
    """Say whether a file that matches is there and has something in it."""
    return any(path.stat().st_size for path in workspace.glob(pattern) if path.is_file())


def wait_until(demo: subprocess.Popen[bytes], happened: Callable[[], bool], what: str) -> None:
    """Watch a running demo; raises AssertionError when it ends or takes too long before it happened."""
    deadline = time.monotonic() + STEP_TIMEOUT_S
    while not happened():
        assert time.monotonic() < deadline, f"not within {STEP_TIMEOUT_S} s: {what}"
        try:
            code = demo.wait(POLL_S)
        except subprocess.TimeoutExpired:
            continue
        assert happened(), f"the demo ended with {code} before: {what}"


def server_of(state: Path) -> tuple[int, ...]:
    """Return the pids of the demo's Prefect server."""
    info = server_status(Settings(state_dir=state))
    if info is None or info.pid is None:
        return ()
    return info.pid, *(child.pid for child in psutil.Process(info.pid).children(recursive=True))


def kill_tree(demo: subprocess.Popen[bytes], spared: Iterable[int]) -> None:
    """Kill a process and all below it at once: stopped first, none can react to the death of another."""
    family = [psutil.Process(demo.pid), *psutil.Process(demo.pid).children(recursive=True)]
    victims = [member for member in family if member.pid not in set(spared)]
    for act in (psutil.Process.suspend, psutil.Process.kill):
        for victim in victims:
            try:
                act(victim)
            except psutil.NoSuchProcess:
                continue


def assert_nothing_writes(workspace: Path) -> None:
    """Whoever was started in the moment of the killing must end by itself."""
    strays = [process for process in psutil.process_iter(["cmdline"]) if is_of(process, workspace)]
    _, alive = psutil.wait_procs(strays, timeout=40)
    assert not [words_of(process) for process in alive]


def is_of(process: psutil.Process, workspace: Path) -> bool:
    return any(str(workspace) in word for word in process.info["cmdline"] or ())


def below(demo: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(demo.pid).children(recursive=True)


def environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return {}


def assert_same(demo: DemoRun, undisturbed: DemoRun) -> None:
    """The store digest is recomputed from the voxels."""
    store = str(demo.workspace / "store.zarr")
    assert verify(store, deep=True) == []
    assert store_digest(store) == store_digest(str(undisturbed.workspace / "store.zarr"))
    assert demo.digests == undisturbed.digests
    assert_same_tables(demo.workspace, undisturbed)


def assert_same_tables(workspace: Path, undisturbed: DemoRun) -> None:
    for name in ("scores.parquet", "tables/phantom-tumour.csv", "tables/phantom-control.csv"):
        assert (workspace / name).read_bytes() == (undisturbed.workspace / name).read_bytes(), name
