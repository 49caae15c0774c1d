"""Starting trainings in processes of their own, following them, and leaving none behind.

torchrun starts each rank in its own session, so killing the flow's process group does not reach them. What leaves no
orphan: the child asks Linux for SIGTERM when we die, torchrun hands it on to its ranks, and on any exception here the
group gets SIGTERM, time to write a checkpoint, and then SIGKILL for every process that was ever below it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from infra.settings import private_environment

LOG_NAME = "train.log"
GRACE_SECONDS = 40.0
"""Between SIGTERM and SIGKILL; torchrun itself gives its ranks 30 s."""
POLL_SECONDS = 0.2
OnProgress = Callable[[dict[str, Any]], None]

# Runs before the real program in its process. A preexec_fn could deadlock in a flow with threads.
_TIED = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"
    "if os.getppid() != int(sys.argv[1]): sys.exit(143)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


class TrainingFailed(RuntimeError):  # noqa: N818 - the word people read in the log
    """A training ended badly; the message has the reason and the end of its log."""


KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""glibc keeps freed memory for the next step instead of giving it back and faulting it in again, page by page."""


def training_command(run_dirs: Sequence[Path], world_size: int, module: str = "models.train") -> list[str]:
    """Return the command that runs the trainings of these folders, one after another, on `world_size` ranks."""
    configs = [part for folder in run_dirs for part in ("--config", str(Path(folder).resolve() / "run.json"))]
    if world_size == 1:
        return [sys.executable, "-m", module, *configs]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    torchrun += ["--nproc-per-node", str(world_size)]
    return [sys.executable, *torchrun, "-m", module, *configs]


def training_environment(threads: int, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of the ranks: private, isolated from the working directory, with a fixed thread count."""
    environment = {**(os.environ if base is None else base), **private_environment()}
    # A launch from inside a rank must not inherit that rank's place.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return {**KEEP_MEMORY, **environment, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def launch(
    run_dirs: Sequence[Path],
    world_size: int,
    on_progress: OnProgress | None = None,
    *,
    restarts: int = 1,
    stall_seconds: float = 600.0,
    module: str = "models.train",
) -> None:
    """Run the trainings of some folders (each with a run.json) to their end, on this host.

    on_progress gets each new record of each metrics.jsonl, with `training`, the folder's name. When a process is
    killed from outside, all continue from their checkpoints, `restarts` times. Raises TrainingFailed with the reason
    and the log's tail; ValueError for a folder without run.json. On any exception, KeyboardInterrupt too, every
    process started here is gone before it is raised again.
    """
    folders = [Path(folder).resolve() for folder in run_dirs]
    threads = max([_threads(folder) for folder in folders], default=1)
    follower = MetricsFollower(folders, on_progress)
    for attempt in range(restarts + 1):
        for folder in folders:
            (folder / "failure.json").unlink(missing_ok=True)
        code = run_tied(
            training_command(folders, world_size, module),
            log_file=folders[0] / LOG_NAME,
            cwd=folders[0].parent,
            environment=training_environment(threads),
            poll=follower.poll,
            stall_seconds=stall_seconds,
        )
        follower.poll()
        if code == 0:
            return
        own = _own_failure(folders)
        if own or attempt == restarts or code in (143, -signal.SIGTERM):
            raise TrainingFailed(_failure_text(folders, code, own))


def run_tied(
    command: Sequence[str],
    *,
    log_file: Path,
    cwd: Path,
    environment: Mapping[str, str],
    poll: Callable[[], bool],
    stall_seconds: float,
) -> int:
    """Run a command that does not outlive us and return its exit code; its output is appended to `log_file`.

    poll: called a few times a second, returns whether there was progress. Raises TrainingFailed after `stall_seconds`
    without any, neither by `poll` nor in the log.
    """
    tied = [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *command]
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            tied,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=dict(environment),
            start_new_session=True,
        )
    family = {process.pid: psutil.Process(process.pid)}
    try:
        return _follow(process, family, log_file, poll, stall_seconds)
    except BaseException:
        end_family(process, family)
        raise
    finally:
        _kill_survivors(family)


def _follow(
    process: subprocess.Popen[bytes],
    family: dict[int, psutil.Process],
    log_file: Path,
    poll: Callable[[], bool],
    stall_seconds: float,
) -> int:
    last_progress, log_size = time.monotonic(), log_file.stat().st_size
    while True:
        try:
            return process.wait(timeout=POLL_SECONDS)
        except subprocess.TimeoutExpired:
            _remember_descendants(process.pid, family)
        size = log_file.stat().st_size
        if poll() or size != log_size:
            last_progress, log_size = time.monotonic(), size
        if time.monotonic() - last_progress > stall_seconds:
            raise TrainingFailed(
                f"no progress for {stall_seconds:g} s: neither a metrics line nor a line in {log_file}; the ranks were "
                f"stopped. Look at the log, or raise stall_seconds. Its end:\n{log_tail(log_file)}"
            )


def _remember_descendants(pid: int, family: dict[int, psutil.Process]) -> None:
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for child in children:
        family.setdefault(child.pid, child)


def end_family(process: subprocess.Popen[bytes], family: dict[int, psutil.Process]) -> None:
    """SIGTERM to the group, which torchrun hands on to its ranks; wait; the rest is for `_kill_survivors`."""
    _remember_descendants(process.pid, family)
    try:
        os.killpg(process.pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    psutil.wait_procs(list(family.values()), timeout=GRACE_SECONDS)


def _kill_survivors(family: dict[int, psutil.Process]) -> None:
    # psutil compares the creation time, so a reused pid is not killed.
    alive = [process for process in family.values() if process.is_running()]
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=5)


class MetricsFollower:
    """Reads the new lines of several metrics.jsonl files, also when a resumed training rewrites them."""

    def __init__(self, folders: Sequence[Path], on_progress: OnProgress | None) -> None:
        self.on_progress = on_progress
        self.paths = [folder / "metrics.jsonl" for folder in folders]
        self.offsets: dict[Path, tuple[int, int]] = {}
        self.last_steps: dict[tuple[Path, str], int] = {}

    def poll(self) -> bool:
        """Hand on all new records; return whether there were any."""
        found = [self._poll_file(path) for path in self.paths]
        return any(found)

    def _poll_file(self, path: Path) -> bool:
        if not path.exists():
            return False
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            inode, offset = self.offsets.get(path, (status.st_ino, 0))
            if inode != status.st_ino or status.st_size < offset:
                offset = 0
            file.seek(offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.offsets[path] = (status.st_ino, offset + len(whole))
        records = [json.loads(line) for line in whole.splitlines()]
        return sum(self._hand_on(path, record) for record in records) > 0

    def _hand_on(self, path: Path, record: dict[str, Any]) -> bool:
        key = (path, str(record["kind"]))
        if record["step"] <= self.last_steps.get(key, -1):
            return False
        self.last_steps[key] = record["step"]
        if self.on_progress is not None:
            self.on_progress({"training": path.parent.name, **record})
        return True


def log_tail(path: Path, lines: int = 40, max_bytes: int = 16_384) -> str:
    """Return the last lines of a log."""
    if not path.exists():
        return "(no log)"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - max_bytes))
        text = file.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-lines:])


def _threads(folder: Path) -> int:
    path = folder / "run.json"
    if not path.exists():
        raise ValueError(f"training folder {folder} has no run.json; write the config before launching")
    return int(json.loads(path.read_text(encoding="utf-8")).get("threads", 1))


def _own_failure(folders: Sequence[Path]) -> str:
    for folder in folders:
        path = folder / "failure.json"
        if path.exists():
            reason = json.loads(path.read_text(encoding="utf-8"))
            return f"{folder.name}: {reason['type']}: {reason['message']}"
    return ""


def _failure_text(folders: Sequence[Path], code: int, own: str) -> str:
    names = ", ".join(folder.name for folder in folders)
    cause = own or (f"killed by signal {-code}" if code < 0 else f"exit code {code}")
    log = folders[0] / LOG_NAME
    return (
        f"training failed ({names}): {cause}. Its checkpoints are kept: launching it again continues from the newest. "
        f"End of {log}:\n{log_tail(log)}"
    )
