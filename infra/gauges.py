"""Gauges of a process for Prometheus, on a port of loopback, only when BRAINLOOM_METRICS_PORT asks for it.

No label names a subject or a path: stores and trainings are called by their names.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import cache
from typing import Any

from infra.settings import Settings

PORTS = 10
"""Flow runs of one host take the next free port, so many at most."""
HOST = "127.0.0.1"
_GAUGES = {
    "brainloom_done": ("What is done of a stage, quarantined included", ("stage",)),
    "brainloom_total": ("What there is to do in a stage", ("stage",)),
    "brainloom_quarantined": ("Cases of a stage in quarantine", ("stage",)),
    "brainloom_per_second": ("Units of a stage per second since it began", ("stage",)),
    "brainloom_step_seconds": ("Seconds of Dask workers by step of preprocessing", ("step",)),
    "brainloom_data_wait_share": ("Share of the step time that a training waited for data", ("training",)),
}
LEASE_AGE = "brainloom_lease_age_seconds"
_lock = threading.Lock()
_port: list[int] = []
_renewed: dict[str, float] = {}
_log = logging.getLogger(__name__)


def serve_if_asked(settings: Settings | None = None) -> int:
    """Start telling the gauges when the settings say so, once a process; return the port, 0 when it is not asked for.

    A port that is taken is a warning: no work depends on it.
    """
    wanted = (settings or Settings()).metrics_port
    with _lock:
        if wanted and not _port:
            _port.append(_serve(wanted))
    return _port[0] if _port else 0


def tell(name: str, label: str, value: float) -> None:
    """Set a gauge for one label; does nothing in a process that serves none."""
    if _port:
        _made()[1][name].labels(label).set(value)


def renewed(place: str) -> None:
    """Note that a lease of a store or of GPUs was just written; place: its name."""
    _renewed[place] = time.monotonic()


def released(place: str) -> None:
    """Note that a lease is not held any more."""
    _renewed.pop(place, None)


def _serve(first: int) -> int:
    from prometheus_client import start_http_server

    for port in range(first, first + PORTS):
        try:
            start_http_server(port, addr=HOST, registry=_made()[0])
        except OSError:
            continue
        _log.info("metrics at http://%s:%d/metrics", HOST, port)
        return port
    _log.warning("no free port of %s from %d to %d: this process tells no metrics", HOST, first, first + PORTS - 1)
    return 0


class _Leases:
    """The age of each lease that this process holds, computed when it is asked for."""

    def collect(self) -> Any:
        """Yield the family of gauges."""
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(LEASE_AGE, "Seconds since a lease was last renewed", labels=["place"])
        for place, at in list(_renewed.items()):
            family.add_metric([place], time.monotonic() - at)
        yield family


@cache
def _made() -> tuple[Any, dict[str, Any]]:
    """Return the registry and the gauges by name."""
    from prometheus_client import CollectorRegistry, Gauge

    registry = CollectorRegistry()
    registry.register(_Leases())
    return registry, {name: Gauge(name, text, labels, registry=registry) for name, (text, labels) in _GAUGES.items()}
