"""Connecting this process to a Prefect server for a while."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from infra.server import ServerInfo, connect
from infra.settings import Settings


@contextmanager
def connected(settings: Settings) -> Iterator[ServerInfo]:
    """Start the server of some settings unless it runs, and point this process at it until the end."""
    before = dict(os.environ)
    _let_go()
    try:
        yield connect(settings)
        _let_go()
    finally:
        os.environ.clear()
        os.environ.update(before)
        if "prefect" in sys.modules:
            from prefect.context import refresh_global_settings_context

            refresh_global_settings_context()


def _let_go() -> None:
    """Let Prefect send its logs and events while there is a server that takes them, and end their senders.

    A process has one sender of each, which stays with the first server: states of task runs are events.
    """
    if "prefect" in sys.modules:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        APILogWorker.drain_all(timeout=10)
        EventsWorker.drain_all(timeout=10)
