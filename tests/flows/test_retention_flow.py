from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from flows import retention as of_retention
from flows.retention import OUR_FLOWS, RetentionParams, retention, summary
from infra.server import ServerInfo, request_json
from tasks.retention import Removal

FLOWS = Path(__file__).resolve().parents[2] / "flows"


def test_all_of_our_flows_and_no_others_are_ours() -> None:
    text = "\n".join(path.read_text() for path in FLOWS.glob("*.py"))
    constants = dict(re.findall(r'^([A-Z]+) = "([^"]+)"$', text, re.MULTILINE))
    told = [found.strip('"') for found in re.findall(r"^@flow\(\s*name=([^,)]+)", text, re.MULTILINE)]
    assert sorted(OUR_FLOWS) == sorted(constants.get(name, name) for name in told)


def test_the_page_counts_by_kind() -> None:
    files = [Removal("half-written file", Path("/a"), 1_500_000, 9.0), Removal("staged copy", Path("/s"), 1, 9.0, "k")]
    page = summary(files, 3, dry_run=True)
    assert page.startswith("**Dry run: nothing was removed.**")
    assert (
        "- 3 flow runs with their logs and artifacts\n- half-written file: 1, 1.5 MB\n- staged copy: 1, 0.0 MB" in page
    )
    assert summary([], 0, dry_run=False).startswith("Removed:")


@pytest.fixture
def server(prefect_server: ServerInfo) -> str:
    return prefect_server.api_url


def ended_run(api_url: str, flow: str) -> str:
    """Make a flow run that ended, with an artifact."""
    flow_id = request_json(f"{api_url}/flows/", {"name": flow})["id"]
    run = request_json(f"{api_url}/flow_runs/", {"flow_id": flow_id, "state": {"type": "PENDING"}})["id"]
    for state in ("RUNNING", "COMPLETED"):
        request_json(f"{api_url}/flow_runs/{run}/set_state", {"state": {"type": state}, "force": True})
    request_json(f"{api_url}/artifacts/", {"key": "k", "type": "markdown", "data": "d", "flow_run_id": run})
    return str(run)


def runs_of(api_url: str, flow: str) -> set[str]:
    return {run["id"] for run in request_json(f"{api_url}/flow_runs/filter", {"flows": {"name": {"any_": [flow]}}})}


def artifacts_of(api_url: str, run: str) -> list[Any]:
    return list(request_json(f"{api_url}/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}}))


@pytest.mark.full
def test_old_flow_runs_go_with_their_artifacts_and_the_newest_stay(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_retention, "OUR_FLOWS", ("some-old-flow",))
    old = [ended_run(server, "some-old-flow") for _ in range(3)]
    foreign = ended_run(server, "not-ours")
    stray = tmp_path / "x.partial"
    stray.write_text("half")
    params = RetentionParams(workspaces=[str(tmp_path)], keep_last=1, leftover_days=None)
    assert retention(params)["flow_runs"] == 0  # none is old

    later = datetime.now(UTC) + timedelta(days=91)
    monkeypatch.setattr(of_retention, "_now", lambda: later)
    listed = retention(params)
    assert (listed["dry_run"], listed["flow_runs"]) == (True, 2)
    assert runs_of(server, "some-old-flow") == set(old)

    done = retention(RetentionParams.model_validate({**params.model_dump(), "dry_run": False}))
    assert (done["flow_runs"], done["files"]) == (2, {})
    assert runs_of(server, "some-old-flow") == {old[2]}
    assert artifacts_of(server, old[0]) == []
    assert len(artifacts_of(server, old[2])) == 1
    assert foreign in runs_of(server, "not-ours")
    assert stray.exists()
