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
    try:
        yield connect(settings)
        _send_remaining_logs()
    finally:
        os.environ.clear()
        os.environ.update(before)
        if "prefect" in sys.modules:
            from prefect.context import refresh_global_settings_context

            refresh_global_settings_context()


def _send_remaining_logs() -> None:
    """Let Prefect send the logs of the flow runs while there is a server that takes them."""
    if "prefect" in sys.modules:
        from prefect.logging.handlers import APILogWorker

        APILogWorker.drain_all(timeout=10)
