"""A real Prefect server after a forget: artifacts that show the subject, and flow runs that name it, are gone."""

from __future__ import annotations

from typing import Any

import pytest
from prefect import flow, get_run_logger, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

from flows.artifacts import publish_markdown, publish_table
from flows.forget_server import erase_from_server, search_server
from infra.server import ServerInfo
from tasks.forget_reach import Person

WHO = Person("toy", "person-b", ("person-b_2",))


@task
def work(message: str) -> None:
    get_run_logger().info(message)


CONTENT: dict[str, dict[str, Any]] = {
    "forget-task": {"task": "toy: person-b and 3 more"},
    "forget-page": {"markdown": "worst: person-b_2"},
    "forget-table": {"rows": [{"subject": "person-b", "reason": "unreadable"}]},
    "forget-picture": {"pictures": "pre"},
    "forget-clean": {"task": "toy: person-bb and 3 more", "pictures": "late"},
    "forget-short": {"rows": [{"subject": "b"}], "markdown": "mosaics"},
}
"""What each flow run says; no parameter, for those name subjects, too."""


@flow(name="preprocess")
def said(name: str) -> None:
    content = CONTENT[name]
    if "task" in content:
        work.with_options(task_run_name=content["task"])("nothing")
    if "markdown" in content:
        publish_markdown("qc", content["markdown"])
    if "rows" in content:
        publish_table("quarantine", content["rows"])
    if "pictures" in content:
        publish_markdown(f"reconstruction-{content['pictures']}", "a picture")
    publish_markdown("other", "of person-bb and nobody else")


@pytest.fixture
def runs(prefect_server: ServerInfo) -> list[str]:
    names = [name for name in CONTENT if name != "forget-short"]
    for name in names:
        said.with_options(flow_run_name=name)(name)
    return names


def left(runs: list[str]) -> dict[str, list[str]]:
    with get_client(sync_client=True) as client:
        mine = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=runs)))
        names = {run.id: run.name for run in mine}
        found: dict[str, list[str]] = {name: [] for name in names.values()}
        for artifact in client.read_artifacts(limit=200):
            if artifact.flow_run_id in names:
                found[names[artifact.flow_run_id]].append(artifact.key or "")
    return {name: sorted(keys) for name, keys in found.items()}


def test_what_shows_the_subject_is_found_and_erased_and_the_others_stay(runs: list[str]) -> None:
    found = search_server(WHO, ["superseded/pre"])
    assert [run.name for run in found.flow_runs] == ["forget-task"]
    assert sorted(one.key or "" for one in found.artifacts) == ["qc", "quarantine", "reconstruction-pre"]
    assert found.running == []
    assert set(left(runs)) == set(runs), "a search changes nothing"
    erase_from_server(found)
    erase_from_server(found)
    assert left(runs) == {
        "forget-page": ["other"],
        "forget-table": ["other"],
        "forget-picture": ["other"],
        "forget-clean": ["other", "reconstruction-late"],
    }
    again = search_server(WHO, ["superseded/pre"])
    assert (again.flow_runs, again.artifacts) == ([], [])


def test_a_short_id_is_told_by_columns_and_all_quality_pages_go(prefect_server: ServerInfo) -> None:
    short = Person("toy", "b")
    said.with_options(flow_run_name="forget-short")("forget-short")
    found = search_server(short)
    mine = left(["forget-short"])
    assert mine["forget-short"] == ["other", "qc", "quarantine"]
    erase_from_server(found)
    assert left(["forget-short"]) == {"forget-short": ["other"]}
