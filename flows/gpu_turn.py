"""One training at a time on a group of GPUs, whatever flow it is of and however it was started.

The group is a folder with a lease (tasks.lease): who dies holding it, by SIGKILL as well, is replaced at once by a flow
run of the same host, and after five minutes by one of another host.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from prefect import get_run_logger, runtime

from flows.artifacts import in_run, publish_markdown
from infra.settings import Settings
from models.gpu_turn import asking, turn_is_asked
from tasks.lease import HeldError, Lease, LeaseError

POLL_SECONDS = 2.0
TOLD_SECONDS = 600.0
"""How often a flow run that goes on waiting for the same holder says so again."""
_log = logging.getLogger(__name__)


@contextmanager
def gpu_turn(settings: Settings | None = None, sleep: Callable[[float], None] = time.sleep) -> Iterator[None]:
    """Take the lease of the GPUs when something inside first needs them (`need_gpus`), and give it back at the end.

    A flow run inside another one that has asked already shares its turn. With nothing to compute nothing is waited for.
    """
    if turn_is_asked():
        yield
        return
    place = lease_place(settings or Settings())
    with ExitStack() as held:
        taken: list[Lease] = []

        def take() -> None:
            if not taken:
                taken.append(held.enter_context(wait_for_lease(place, _owner(), sleep)))

        with asking(take):
            yield


def lease_place(settings: Settings) -> str:
    """Return the folder or URL of the lease: that of the settings, else one of this installation."""
    return settings.gpu_lease or str(settings.state_dir / "gpus")


@contextmanager
def wait_for_lease(place: str, owner: str, sleep: Callable[[float], None] = time.sleep) -> Iterator[Lease]:
    """Hold the lease of a group of GPUs, waiting as long as somebody else does; says whom it waits for."""
    with ExitStack() as held:
        told, waited, lease = "", 0.0, None
        while lease is None:
            try:
                lease = held.enter_context(Lease(place, owner))
            except LeaseError as error:
                holder = error.owner if isinstance(error, HeldError) else "another flow run"
                if holder != told or waited >= TOLD_SECONDS:
                    _say(f"waits for {holder}: one training at a time uses the GPUs of {place}")
                    told, waited = holder, 0.0
                sleep(POLL_SECONDS)
                waited += POLL_SECONDS
        if told:
            _say(f"has the GPUs of {place}, after {told}")
        yield lease


def _say(text: str) -> None:
    # The flow run's own log is what the UI shows.
    (get_run_logger() if in_run() else _log).warning(text)
    publish_markdown("gpus", f"This flow run {text}.", "Whose turn it is on the GPUs")


def _owner() -> str:
    return f"{runtime.flow_run.name or 'a training'} ({socket.gethostname()}, pid {os.getpid()})"
