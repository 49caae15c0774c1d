"""Dask's dashboard and performance report: linked, complete without a network, and without names of sources."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from flows import dask_pages as module
from flows.dask_pages import dashboard_text, dask_pages, names_in, report_url
from models.records import PlannedCase, SourceFile

SOURCE = SourceFile(modality="t1", path="/ward7/doe^jane/mrn4711_t1.nii.gz", size_bytes=1, etag="1")
CASE = PlannedCase(dataset="toy", row=0, case="s1", subject="s1", files=(SOURCE,))


def preprocess_batch(cases_json: str) -> int:
    return len(cases_json)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": "127.0.0.1:0"}
    options |= {"host": "127.0.0.1", "protocol": "tcp://"}
    with LocalCluster(**options) as cluster, Client(cluster, set_as_default=False) as found:
        yield found


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(module, "publish_markdown", lambda key, text, *_: found.append(f"{key}: {text}"))
    return found


def test_the_report_names_functions_and_no_sources(client: Client, tmp_path: Path, pages: list[str]) -> None:
    store = str(tmp_path / "brains.zarr")
    with dask_pages(client, store, [CASE], report=True):
        assert client.submit(preprocess_batch, CASE.model_dump_json(), pure=False).result() > 0
    report = Path(report_url(store))
    assert report == tmp_path / "brains-dask.html"
    text = report.read_bytes()
    assert b"Performance Report" in text
    assert [piece for piece in (b"ward7", b"doe^jane", b"mrn4711") if piece in text] == []
    assert b"preprocess_batch" in text
    assert not re.search(rb'<(script|link)[^>]*(src|href)="?https?:', text), "it asks no server for its scripts"
    assert pages[0].startswith(f"dask: [Dask dashboard]({client.dashboard_link})")
    assert client.dashboard_link.startswith("http://127.0.0.1:")
    assert "from " in pages[0]
    assert pages[1].endswith(f"its performance report is at `{report}`.")


def test_without_a_report_the_link_is_taken_back(client: Client, tmp_path: Path, pages: list[str]) -> None:
    with dask_pages(client, str(tmp_path / "s.zarr"), [CASE], report=False):
        pass
    assert list(tmp_path.iterdir()) == []
    assert pages[-1] == "dask: The Dask cluster of this flow run has ended."


def test_a_report_that_names_a_source_is_not_written(
    client: Client, tmp_path: Path, pages: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    shown = CASE.replace(files=[{**SOURCE.model_dump(), "path": "/data/Performance Report"}])
    with dask_pages(client, str(tmp_path / "s.zarr"), [shown], report=True):
        pass
    assert list(tmp_path.iterdir()) == []
    assert pages[-1] == "dask: The performance report names source files and was not written."
    assert caplog.records[-1].message.startswith("the performance report of Dask names 1 source files")


def test_who_can_open_the_dashboard_is_said() -> None:
    assert " only (or through a tunnel)" in dashboard_text("http://127.0.0.1:8787/status")
    assert dashboard_text("http://scheduler:8787/status") == (
        "[Dask dashboard](http://scheduler:8787/status), while it runs.\n"
    )
    assert names_in(b"nothing", [CASE]) == 0
