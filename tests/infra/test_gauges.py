"""Gauges for Prometheus: told on loopback when asked, scraped over HTTP, and never in the way of the work."""

from __future__ import annotations

import io
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from s3_server import free_ports

from flows.progress import Progress
from infra import gauges
from infra.environments import server_environment
from infra.settings import Settings
from tasks.lease import Lease


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process be one that tells nothing yet."""
    monkeypatch.setattr(gauges, "_port", [])
    gauges._made.cache_clear()
    yield
    gauges._made.cache_clear()


def scraped(port: int) -> dict[tuple[str, str], float]:
    """Return values by name and label, as Prometheus reads them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in families
        for sample in family.samples
    }


def test_progress_and_leases_are_scraped(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BRAINLOOM_METRICS_PORT", str(free_ports(1)[0]))
    with Lease(str(tmp_path / "doe^jane" / "s.zarr"), "a flow"):
        with Progress("preprocess", 40, "cases", console=Console(file=io.StringIO())) as progress:
            progress.update(30, quarantined=2)
            port = gauges.serve_if_asked()
            progress.update(31, quarantined=2)
            gauges.tell("brainloom_step_seconds", "encode", 12.5)
            gauges.tell("brainloom_data_wait_share", "night-1", 0.25)
            found = scraped(port)
        assert found["brainloom_done", "preprocess"] == 31
        assert found["brainloom_total", "preprocess"] == 40
        assert found["brainloom_quarantined", "preprocess"] == 2
        assert found["brainloom_per_second", "preprocess"] > 0
        assert found["brainloom_step_seconds", "encode"] == 12.5
        assert found["brainloom_data_wait_share", "night-1"] == 0.25
        assert 0 <= found["brainloom_lease_age_seconds", "s.zarr"] < 300
        assert "doe^jane" not in str(found)
    assert ("brainloom_lease_age_seconds", "s.zarr") not in scraped(port)


def test_nothing_listens_unless_it_is_asked_for(fresh: None) -> None:
    with Progress("catalog", 1, "scans", console=Console(file=io.StringIO())) as progress:
        progress.update(1)
    assert gauges.serve_if_asked(Settings()) == 0
    assert "PREFECT_SERVER_METRICS_ENABLED" not in server_environment(Settings())
    assert server_environment(Settings(metrics_port=9464))["PREFECT_SERVER_METRICS_ENABLED"] == "true"


def test_the_next_free_port_is_taken_and_without_one_the_work_goes_on(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        first = int(taken.getsockname()[1])
        monkeypatch.setattr(gauges, "PORTS", 1)
        assert gauges.serve_if_asked(Settings(metrics_port=first)) == 0
    (told,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert told == f"no free port of 127.0.0.1 from {first} to {first}: this process tells no metrics"
