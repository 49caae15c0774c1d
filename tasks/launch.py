"""Starting trainings in processes of their own, following them, and leaving none behind.

torchrun starts each rank in its own session, so killing the flow's process group does not reach them. What leaves no
orphan: the child asks Linux for SIGTERM when we die, torchrun hands it on to its ranks, and on any exception here the
group gets SIGTERM, time to write a checkpoint, and then SIGKILL for every process that was ever below it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import psutil

from infra.settings import private_environment
from models.exhausted import no_room
from tasks.follow import MetricsFollower, OnProgress, Vital, log_tail

LOG_NAME = "train.log"
GRACE_SECONDS = 40.0
"""Between SIGTERM and SIGKILL; torchrun itself gives its ranks 30 s."""
POLL_SECONDS = 0.2
STALL_LINES = 80
"""Of the log after a stall: the stacks are at its end."""
Diagnose = Callable[[Set[int]], str]

# Runs before the real program in its process. A preexec_fn could deadlock in a flow with threads.
_TIED = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"
    "if os.getppid() != int(sys.argv[1]): sys.exit(143)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


class TrainingFailed(RuntimeError):  # noqa: N818 - the word people read in the log
    """A training ended badly; the message has the reason and the end of its log."""


KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""glibc keeps freed memory for the next step instead of giving it back and faulting it in again, page by page: a fifth
of a step on the CPU. By default every tensor above 32 MiB would be such a loan (docs/speed.md)."""


@dataclass(frozen=True)
class Rendezvous:
    """Where the nodes of one training meet (torchrun's c10d). Every node launches the same folders, on a disk that all
    of them share, with the same values but `node`."""

    endpoint: str
    """host:port on one of the nodes, reachable from all of them."""
    nodes: int
    node: int
    """Number of this node, from 0; it only names the log. torchrun deals the ranks."""
    run_id: str = "brainloom"
    """Keeps trainings apart that meet at one endpoint."""
    local_addr: str = ""
    """Address of this node for the others; empty: torchrun finds it by the host's name."""
    is_host: bool | None = None
    """Whether this node is the one of the endpoint; None: torchrun compares the endpoint with the host's names."""

    def arguments(self) -> list[str]:
        """Return torchrun's arguments."""
        meeting = ["--nnodes", str(self.nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", self.endpoint]
        address = ["--local-addr", self.local_addr] if self.local_addr else []
        host = [] if self.is_host is None else ["--rdzv-conf", f"is_host={str(self.is_host).lower()}"]
        return [*meeting, "--rdzv-id", self.run_id, *address, *host]


ALONE = ("--standalone", "--local-addr", "127.0.0.1")
"""torchrun's arguments on one node: a free port on loopback."""


def training_command(
    run_dirs: Sequence[Path], world_size: int, module: str = "models.train", rendezvous: Rendezvous | None = None
) -> list[str]:
    """Return the command that runs the trainings of these folders, one after another, on `world_size` ranks.

    With a rendezvous it is this node's part of them. Raises ValueError when the ranks cannot be dealt to the nodes.
    """
    configs = [part for folder in run_dirs for part in ("--config", str(Path(folder).resolve() / "run.json"))]
    if world_size == 1:
        return [sys.executable, "-m", module, *configs]
    here = ranks_per_node(world_size, rendezvous.nodes if rendezvous else 1)
    torchrun = ["-m", "torch.distributed.run", *(rendezvous.arguments() if rendezvous else ALONE)]
    torchrun += ["--nproc-per-node", str(here)]
    return [sys.executable, *torchrun, "-m", module, *configs]


def ranks_per_node(world_size: int, nodes: int) -> int:
    """Return how many ranks run on each node; raises ValueError when the nodes do not divide them."""
    if world_size % nodes:
        raise ValueError(f"{world_size} ranks cannot be dealt to {nodes} nodes; the nodes must divide the ranks")
    return world_size // nodes


def training_environment(threads: int, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of the ranks: private, isolated from the working directory, with a fixed thread count."""
    environment = {**(os.environ if base is None else base), **private_environment()}
    # A launch from inside a rank must not inherit that rank's place.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    return {**KEEP_MEMORY, **environment, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def network_environment(rendezvous: Rendezvous | None) -> dict[str, str]:
    """Return the variables that let ranks talk over the interface that has this node's address.

    gloo and NCCL choose one by themselves otherwise, and gloo takes what the host's name resolves to: loopback on many
    systems, where no other node is. Nothing without an address, or when no interface has it.
    """
    if rendezvous is None or not rendezvous.local_addr:
        return {}
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(rendezvous.local_addr, None)}
    except OSError:
        return {}
    for name, addresses in psutil.net_if_addrs().items():
        if found & {address.address for address in addresses}:
            return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return {}


def launch(
    run_dirs: Sequence[Path],
    world_size: int,
    on_progress: OnProgress | None = None,
    *,
    restarts: int = 1,
    stall_seconds: float = 600.0,
    module: str = "models.train",
    rendezvous: Rendezvous | None = None,
) -> None:
    """Run the trainings of some folders (each with a run.json) to their end, on this host.

    on_progress gets each new record of each metrics.jsonl, with `training`, the folder's name. When a process is
    killed from outside, all continue from their checkpoints, `restarts` times. With a rendezvous this host runs its
    share of the ranks. Raises TrainingFailed with the reason and the log's tail, also after `stall_seconds` without a
    metrics line, a log line or a heartbeat of any rank; ValueError for a folder without run.json, or nodes that do not
    divide the ranks. On any exception, KeyboardInterrupt too, every process started here is gone before it is raised
    again.
    """
    folders = [Path(folder).resolve() for folder in run_dirs]
    threads = max([threads_of(folder) for folder in folders], default=1)
    follower, vital = MetricsFollower(folders, on_progress), Vital(folders)
    log_file = folders[0] / (f"train-node{rendezvous.node}.log" if rendezvous and rendezvous.node else LOG_NAME)
    for attempt in range(restarts + 1):
        forget_failures(folders)
        code = run_tied(
            training_command(folders, world_size, module, rendezvous),
            log_file=log_file,
            cwd=folders[0].parent,
            environment={**network_environment(rendezvous), **training_environment(threads)},
            poll=lambda: follower.poll() or vital.poll(),
            diagnose=vital.diagnose,
            stall_seconds=stall_seconds,
        )
        follower.poll()
        if code == 0:
            return
        own = own_failure(folders)
        if own or attempt == restarts or code in (143, -signal.SIGTERM):
            raise TrainingFailed(failure_text(folders, log_file, code, own))


def run_tied(
    command: Sequence[str],
    *,
    log_file: Path,
    cwd: Path,
    environment: Mapping[str, str],
    poll: Callable[[], bool],
    stall_seconds: float,
    diagnose: Diagnose = lambda pids: "",
) -> int:
    """Run a command that does not outlive us and return its exit code; its output is appended to `log_file`.

    poll: called a few times a second, returns whether there was progress. diagnose: gets the ids of all processes
    below us when there is none, and returns what is known of them. Raises TrainingFailed after `stall_seconds` without
    progress, neither by `poll` nor in the log.
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
        return _follow(process, family, log_file, poll, stall_seconds, diagnose)
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
    diagnose: Diagnose,
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
            known = diagnose(set(family))
            raise TrainingFailed(
                f"no progress for {stall_seconds:g} s: neither a metrics line nor a line in {log_file}{known}; the "
                "ranks were stopped. Look at the log, or raise stall_seconds. Its end:\n"
                f"{log_tail(log_file, STALL_LINES)}"
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


def threads_of(folder: Path) -> int:
    """Return the threads of each rank of a training; raises ValueError for a folder without run.json."""
    path = folder / "run.json"
    if not path.exists():
        raise ValueError(f"training folder {folder} has no run.json; write the config before launching")
    return int(json.loads(path.read_text(encoding="utf-8")).get("threads", 1))


def forget_failures(folders: Sequence[Path]) -> None:
    """Remove what earlier attempts said."""
    for folder in folders:
        (folder / "failure.json").unlink(missing_ok=True)


def own_failure(folders: Sequence[Path]) -> str:
    """Return why a training failed for a reason of its own, empty when there was none: starting again is in vain."""
    for folder in folders:
        path = folder / "failure.json"
        if path.exists():
            reason = json.loads(path.read_text(encoding="utf-8"))
            return f"{folder.name}: {reason['type']}: {reason['message']}"
        if no_room(folder):
            return f"{folder.name}: the disk of {folder} is full; make room, then start again"
    return ""


def failure_text(folders: Sequence[Path], log: Path, code: int, own: str) -> str:
    """Return what to say of trainings that ended with an exit code; own: as of `own_failure`."""
    names = ", ".join(folder.name for folder in folders)
    cause = own or (f"killed by signal {-code}" if code < 0 else f"exit code {code}")
    # Behind a reason of its own the log ends with what torchrun says of every rank: nothing that helps.
    more = f"Its traceback is in {log}" if own else f"End of {log}:\n{log_tail(log)}"
    return (
        f"training failed ({names}): {cause}. Its checkpoints are kept: launching it again continues from the newest. "
        f"{more}"
    )
