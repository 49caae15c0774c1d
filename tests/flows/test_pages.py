"""What a flow run publishes when nothing changed: a line that leads to what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, get_client

from flows import artifacts
from flows.pages import Pages, is_there
from infra.server import ServerInfo, request_json


@flow(name="pages-test")
def publish(folder: str, text: str, rows: list[dict[str, Any]]) -> None:
    with Pages(folder) as pages:
        pages.markdown("pages-text", text, "The text", names_subjects=True)
        pages.table("pages-rows", rows, "The rows")


def published(server: ServerInfo) -> list[tuple[str, str]]:
    """Return key and content of all artifacts of those flow runs, oldest first."""
    flows = {"name": {"any_": ["pages-test"]}}
    runs = request_json(f"{server.api_url}/flow_runs/filter", {"flows": flows})
    body = {"artifacts": {"flow_run_id": {"any_": [run["id"] for run in runs]}}}
    found = request_json(f"{server.api_url}/artifacts/filter", body)
    return [(one["key"], one["data"]) for one in sorted(found, key=lambda one: one["created"])]


def test_only_what_changed_is_published_again(
    tmp_path: Path, prefect_server: ServerInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(str(tmp_path), "one", [{"case": "s1"}])
    publish(str(tmp_path), "one", [{"case": "s1"}])
    text, rows, note = published(prefect_server)
    assert (text, rows[0]) == (("pages-text", "one"), "pages-rows")
    record = json.loads((tmp_path / "published.json").read_text())
    first = record["pages-text"]["artifact"]
    assert note[0] == "unchanged"
    assert note[1].splitlines() == [
        "As in an earlier flow run, and not published again:",
        "",
        f"- [The text](/artifacts/artifact/{first}) (`pages-text`)",
        f"- [The rows](/artifacts/artifact/{record['pages-rows']['artifact']}) (`pages-rows`)",
    ]

    publish(str(tmp_path), "two", [{"case": "s1"}])
    assert [key for key, _ in published(prefect_server)[3:]] == ["pages-text", "unchanged"]

    # What retention or forget deleted is published again, and so is what may be shown from now on.
    record = json.loads((tmp_path / "published.json").read_text())
    assert record["pages-text"]["artifact"] != first
    with get_client(sync_client=True) as client:
        client.delete_artifact(record["pages-rows"]["artifact"])
    monkeypatch.setattr(artifacts, "is_private", lambda url: False)
    publish(str(tmp_path), "two", [{"case": "s1"}])
    # The row that was deleted is not among them any more.
    assert published(prefect_server)[-2:] == [("pages-text", artifacts.HIDDEN), ("pages-rows", "[{}]")]


def test_a_server_that_does_not_answer_has_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import httpx

    def refuse(**_: object) -> None:
        raise httpx.ConnectError("server is gone")

    monkeypatch.setattr("flows.pages.get_client", refuse)
    assert not is_there("0")
    assert "does not say whether it has artifact 0: server is gone" in caplog.text


def test_outside_of_a_flow_nothing_is_published_nor_recorded(tmp_path: Path) -> None:
    publish.fn(str(tmp_path), "one", [])
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_leaves_no_record(tmp_path: Path, prefect_server: ServerInfo) -> None:
    @flow(name="pages-refused-test")
    def refused() -> None:
        with Pages(str(tmp_path / "ws")) as pages:
            pages.markdown("pages-refused", "text", "The text")
            raise ValueError("nothing can be used")

    with pytest.raises(ValueError, match="nothing can be used"):
        refused()
    assert not (tmp_path / "ws").exists()


def test_a_record_that_cannot_be_written_does_not_stop_the_work(
    tmp_path: Path, prefect_server: ServerInfo, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "published.json").mkdir()
    publish(str(tmp_path), "three", [])
    assert "the next flow run publishes all pages again" in caplog.text
