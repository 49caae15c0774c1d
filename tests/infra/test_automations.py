from __future__ import annotations

import json
import threading
import time
import urllib.error
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr

from infra import automations
from infra.api import request_json
from infra.automations import (
    FAILURES,
    NEWS,
    NOTICES,
    PROPOSALS,
    TAG,
    ZOMBIES,
    AutomationError,
    ensure_all,
    ensure_automation,
    failure_automation,
    find_automations,
    holds,
    notice_automation,
    proposal_automation,
    zombie_automation,
)
from infra.server import ServerInfo
from infra.settings import Settings

WEBHOOK = {"id": str(uuid4()), "block_type": {"slug": "webhook"}, "block_schema": {"capabilities": []}}
SLACK = {"id": str(uuid4()), "block_type": {"slug": "slack-webhook"}, "block_schema": {"capabilities": ["notify"]}}
WAIT_S = 60


def all_of_them() -> list[dict[str, Any]]:
    blocks = [WEBHOOK, SLACK]
    return [
        zombie_automation(),
        failure_automation(3, 60, blocks),
        proposal_automation(str(uuid4())),
        notice_automation(blocks),
    ]


def test_prefect_understands_what_we_ask_for() -> None:
    from prefect.events.schemas.automations import AutomationCore

    told = [AutomationCore.model_validate(one) for one in all_of_them()]
    assert [one.name for one in told] == [ZOMBIES, FAILURES, PROPOSALS, NOTICES]
    assert [[action.type for action in one.actions] for one in told] == [
        ["change-flow-run-state"],
        ["call-webhook", "send-notification"],
        ["run-deployment"],
        ["call-webhook", "send-notification"],
    ]


def test_nothing_is_sent_without_a_block() -> None:
    assert failure_automation(3, 60, [])["actions"] == [{"type": "do-nothing"}]


def test_what_is_told_names_no_error_text_and_no_parameter() -> None:
    text = json.dumps([failure_automation(3, 60, [WEBHOOK]), notice_automation([WEBHOOK, SLACK])])
    for word in ("message", "parameters", "flow_run.name", "labels", "event.payload"):
        assert word not in text
    told = json.loads(notice_automation([WEBHOOK])["actions"][0]["payload"])
    assert list(told) == ["text"]


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        ({"within": 60.0, "id": 1}, {"within": 60}, True),
        ({"within": 60.0}, {"within": 61}, False),
        ({"expect": ["b", "a"]}, {"expect": ["a", "b"]}, True),
        ({"expect": ["a", "b", "c"]}, {"expect": ["a", "b"]}, False),
        ({"actions": [{"type": "x", "name": None}]}, {"actions": [{"type": "x"}]}, True),
        ({}, {"actions": []}, False),
    ],
)
def test_an_automation_is_as_wanted(found: dict[str, Any], wanted: dict[str, Any], same: bool) -> None:
    assert holds(found, wanted) is same


def test_an_address_that_is_none_is_refused_without_repeating_it() -> None:
    settings = Settings(notify_url=SecretStr("s3cret"))
    with pytest.raises(AutomationError, match="must start with http://") as refused:
        ensure_all("http://127.0.0.1:9/api", settings)
    assert "s3cret" not in str(refused.value)


@pytest.fixture
def inbox() -> Iterator[tuple[str, list[bytes]]]:
    """Return the address of a webhook on loopback, and what it was sent."""
    got: list[bytes] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Hook) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/?token=s3cret", got
        httpd.shutdown()


@pytest.fixture
def api_url(prefect_server: ServerInfo) -> Iterator[str]:
    """Return the API of a server whose automations and blocks are ours alone."""
    url = prefect_server.api_url
    delete_automations(url)  # other tests that deploy on this server leave theirs
    yield url
    delete_automations(url)
    body = {"block_documents": {"name": {"any_": [automations.NOTIFY_BLOCK]}}}
    for block in request_json(f"{url}/block_documents/filter", body):
        request_json(f"{url}/block_documents/{block['id']}", method="DELETE")


def delete_automations(url: str) -> None:
    for one in find_automations(url):
        request_json(f"{url}/automations/{one['id']}", method="DELETE")


@pytest.mark.full
def test_automations_are_made_once_mended_when_changed_and_twins_go(api_url: str) -> None:
    settings = Settings()
    ensure_automation(api_url, zombie_automation())
    assert ensure_all(api_url, settings) == {FAILURES: "made"}
    assert ensure_all(api_url, settings) == {}

    zombies, failures = find_automations(api_url, [ZOMBIES]), find_automations(api_url, [FAILURES])
    request_json(f"{api_url}/automations/{failures[0]['id']}", {"enabled": False}, method="PATCH")
    assert ensure_all(api_url, settings) == {}  # switched off by the operator, and stays so
    changed = {**failure_automation(9, 60, []), "enabled": False}
    request_json(f"{api_url}/automations/{failures[0]['id']}", changed, method="PUT")
    request_json(f"{api_url}/automations/", zombie_automation())  # as a start leaves it that was killed
    assert ensure_all(api_url, settings) == {FAILURES: "mended"}
    assert find_automations(api_url, [ZOMBIES]) == zombies
    (mended,) = find_automations(api_url, [FAILURES])
    assert (mended["trigger"]["threshold"], mended["enabled"], mended["id"]) == (3, False, failures[0]["id"])

    request_json(f"{api_url}/automations/{zombies[0]['id']}", method="DELETE")
    assert ensure_all(api_url, settings) == {ZOMBIES: "made"}
    with pytest.raises(AutomationError, match=f"the server refused the automation '{ZOMBIES}': .*within"):
        ensure_automation(api_url, {**zombie_automation(), "trigger": {"type": "event", "within": "long"}})


@pytest.mark.full
def test_a_block_that_cannot_notify_is_named(api_url: str) -> None:
    kind = request_json(f"{api_url}/block_types/slug/secret")
    (schema, *_) = request_json(
        f"{api_url}/block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}}
    )
    block = {"name": automations.NOTIFY_BLOCK, "data": {"value": "x"}}
    block |= {"block_schema_id": schema["id"], "block_type_id": kind["id"]}
    request_json(f"{api_url}/block_documents/", block)
    with pytest.raises(AutomationError, match="the block secret/brainloom-notify cannot notify"):
        ensure_all(api_url, Settings())


def flow_run(api_url: str, tags: list[str]) -> str:
    flow = request_json(f"{api_url}/flows/", {"name": "some-flow"})
    body = {"flow_id": flow["id"], "name": "sub-0042", "tags": tags, "state": {"type": "PENDING"}}
    return str(request_json(f"{api_url}/flow_runs/", body)["id"])


def end(api_url: str, run: str, state: str, message: str = "of subject sub-0042") -> None:
    body = {"state": {"type": state, "message": message}, "force": True}
    request_json(f"{api_url}/flow_runs/{run}/set_state", body)


def until(condition: Any, what: str) -> None:
    """Wait for what a server's services do by and by."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {WAIT_S} s"
        time.sleep(0.2)


@pytest.mark.full
def test_failures_are_told_to_a_webhook_and_several_are_an_alarm(api_url: str, inbox: tuple[str, list[bytes]]) -> None:
    url, got = inbox
    settings = Settings(notify_url=SecretStr(url), alarm_failures=2)
    assert ensure_all(api_url, settings) == dict.fromkeys([ZOMBIES, FAILURES, NOTICES], "made")
    assert ensure_all(api_url, settings) == {}
    stored = request_json(f"{api_url}/automations/filter", {})
    assert "s3cret" not in json.dumps(stored)

    watched = flow_run(api_url, [])  # of a shell: somebody looks at it already
    failed, crashed = flow_run(api_url, ["brainloom"]), flow_run(api_url, ["brainloom"])
    for run, state in ((watched, "FAILED"), (failed, "FAILED"), (crashed, "CRASHED")):
        end(api_url, run, state)
    until(lambda: len(got) >= 3, "two notices and an alarm")
    texts = sorted(json.loads(one)["text"] for one in got)
    assert [text.split(" ")[1] for text in texts] == ["ALARM:", "Crashed:", "Failed:"]
    assert texts[0].startswith("brainloom: ALARM: 2 flow runs failed or crashed within 60 min")
    assert crashed in texts[1]
    assert failed in texts[2]
    assert "sub-0042" not in "".join(texts)

    body = {"block_documents": {"name": {"any_": [automations.NOTIFY_BLOCK]}}}
    (block,) = request_json(f"{api_url}/block_documents/filter", body)
    request_json(f"{api_url}/block_documents/{block['id']}", method="DELETE")
    assert ensure_all(api_url, Settings(alarm_failures=2)) == {FAILURES: "mended", NOTICES: "deleted"}


@pytest.mark.full
def test_a_flow_run_without_heartbeat_is_crashed_and_a_suspended_one_is_not(api_url: str) -> None:
    ensure_automation(api_url, zombie_automation(after_s=10))
    killed, waiting = flow_run(api_url, ["brainloom"]), flow_run(api_url, ["brainloom"])
    for run in (killed, waiting):
        request_json(f"{api_url}/flow_runs/{run}/set_state", {"state": {"type": "RUNNING"}, "force": True})
        emit(api_url, "prefect.flow-run.heartbeat", f"prefect.flow-run.{run}")
    paused = {"state": {"type": "PAUSED", "name": "Suspended"}, "force": True}
    request_json(f"{api_url}/flow_runs/{waiting}/set_state", paused)

    def state(run: str) -> str:
        return str(request_json(f"{api_url}/flow_runs/{run}")["state_name"])

    until(lambda: state(killed) == "Crashed", "the end of the killed flow run")
    assert state(waiting) == "Suspended"
    told = request_json(f"{api_url}/flow_runs/{killed}")["state"]["message"]
    assert told == "No heartbeat for 10 s: the process of this flow run was killed."


def emit(api_url: str, event: str, resource: str) -> None:
    from prefect.events import emit_event
    from prefect.events.worker import EventsWorker

    assert emit_event(event, resource={"prefect.resource.id": resource}) is not None
    EventsWorker.instance().wait_until_empty()


def test_only_the_nightly_ingest_proposes() -> None:
    trigger = proposal_automation("x")["trigger"]
    assert trigger["expect"] == [NEWS]
    assert trigger["match_related"]["prefect.resource.id"] == "prefect.tag.nightly"
    assert TAG["prefect.resource.id"] == "prefect.tag.brainloom"


def test_a_busy_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.api.BUSY_WAIT_S", 0.0)
    asked = []

    class Busy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(503 if self.path == "/never" or len(asked) < 3 else 200)
            self.end_headers()
            self.wfile.write(b"true")

        def log_message(self, *_: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Busy) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        assert request_json(f"http://127.0.0.1:{httpd.server_port}/now") is True
        assert asked == ["/now"] * 3
        with pytest.raises(urllib.error.HTTPError, match="503"):
            request_json(f"http://127.0.0.1:{httpd.server_port}/never")
        httpd.shutdown()
