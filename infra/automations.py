"""Automations that every brainloom server has, made when missing and mended when changed.

- Flow runs whose process was killed are marked Crashed; Prefect's own server never does that by itself.
- Several failures within a while are an alarm.
- An ingest with news makes a pre-training ready for a person to approve; see flows.propose.
- Failures and proposals are told to the block `brainloom-notify`, if there is one. Nothing is sent without it, and what
  is sent names flow, flow run and state: no subject, no path and no error text.
"""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Mapping, Sequence
from typing import Any

from infra.api import request_json
from infra.settings import Settings

ZOMBIE_AFTER_S = 540
"""A flow run without a heartbeat for this long is marked Crashed."""
ZOMBIES = "brainloom: crash flow runs without heartbeat"
FAILURES = "brainloom: several flow runs failed"
PROPOSALS = "brainloom: propose a pre-training after an ingest"
NOTICES = "brainloom: tell about failures and proposals"
NAMES = (ZOMBIES, FAILURES, PROPOSALS, NOTICES)

TAG = {"prefect.resource.id": "prefect.tag.brainloom", "prefect.resource.role": "tag"}
"""On all flow runs of deployments of `prefect.yaml`; runs that somebody starts and watches in a shell have it not."""
NIGHTLY = {"prefect.resource.id": "prefect.tag.nightly", "prefect.resource.role": "tag"}
NEWS = "brainloom.ingest.news"
"""Event of an ingest that brought something new into a store; its payload is a flows.propose.IngestNews."""
PROPOSER = "propose-pretraining"
"""Deployment of flows.propose."""
NOTIFY_BLOCK = "brainloom-notify"
"""Name of the blocks that are told: a webhook, or any notification block (Slack, Teams, e-mail, ...)."""

FLOW_RUNS = {"prefect.resource.id": "prefect.flow-run.*"}
SUBJECT_LINE = "brainloom"
WHO = "{{ flow.name }} / {{ deployment.name }}, flow run {{ flow_run.id }}"

Automation = dict[str, Any]


class AutomationError(RuntimeError):
    """The server refused an automation, or the block for notifications cannot notify."""


def zombie_automation(after_s: int = ZOMBIE_AFTER_S) -> Automation:
    """Return the automation that marks flow runs without a heartbeat Crashed.

    A suspended flow run waits for a person without a process: it needs no heartbeat.
    """
    quiet = ("Completed", "Failed", "Cancelled", "Crashed", "Suspended", "AwaitingRetry")
    return {
        "name": ZOMBIES,
        "description": f"A flow run without a heartbeat for {after_s} s was killed: mark it Crashed.",
        "trigger": {
            "type": "event",
            "posture": "Proactive",
            "after": ["prefect.flow-run.heartbeat"],
            "expect": ["prefect.flow-run.heartbeat", *(f"prefect.flow-run.{state}" for state in quiet)],
            "match": FLOW_RUNS,
            "for_each": ["prefect.resource.id"],
            "threshold": 1,
            "within": after_s,
        },
        "actions": [
            {
                "type": "change-flow-run-state",
                "state": "CRASHED",
                "message": f"No heartbeat for {after_s} s: the process of this flow run was killed.",
            }
        ],
    }


def failure_automation(failures: int, minutes: int, blocks: Sequence[Mapping[str, Any]]) -> Automation:
    """Return the alarm of so many failed or crashed flow runs within so many minutes."""
    text = f"ALARM: {failures} flow runs failed or crashed within {minutes} min, the last one of {WHO}"
    return {
        "name": FAILURES,
        "description": f"{failures} flow runs of deployments failed or crashed within {minutes} min. Without a block "
        f"{NOTIFY_BLOCK} it stands in the event feed and in brainloom doctor only.",
        "trigger": {
            "type": "event",
            "posture": "Reactive",
            "expect": ["prefect.flow-run.Failed", "prefect.flow-run.Crashed"],
            "match": FLOW_RUNS,
            "match_related": TAG,
            "threshold": failures,
            "within": minutes * 60,
        },
        "actions": [_told(block, text) for block in blocks] or [{"type": "do-nothing"}],
    }


def proposal_automation(deployment_id: str) -> Automation:
    """Return the automation that starts the deployment of flows.propose with the news of a nightly ingest."""
    payload = {"__prefect_kind": "jinja", "template": "{{ event.payload | tojson }}"}
    return {
        "name": PROPOSALS,
        "description": "An ingest of a deployment with the tag nightly brought new cases: make a pre-training ready "
        "and wait for a person to approve it.",
        "trigger": {
            "type": "event",
            "posture": "Reactive",
            "expect": [NEWS],
            "match": {"prefect.resource.id": "brainloom.store.*"},
            "match_related": NIGHTLY,
            "threshold": 1,
            "within": 0,
        },
        "actions": [
            {
                "type": "run-deployment",
                "source": "selected",
                "deployment_id": deployment_id,
                "parameters": {"news": {"__prefect_kind": "json", "value": payload}},
            }
        ],
    }


def notice_automation(blocks: Sequence[Mapping[str, Any]]) -> Automation:
    """Return the automation that tells the blocks about each failed or crashed flow run, and about each proposal."""
    told = ("Failed", "Crashed", "Suspended")
    text = "{{ event.resource['prefect.state-name'] }}: " + WHO
    return {
        "name": NOTICES,
        "description": "Names flow, flow run and state of what failed or waits for approval; no subject and no error "
        "text leaves the server.",
        "trigger": {
            "type": "event",
            "posture": "Reactive",
            "expect": [f"prefect.flow-run.{state}" for state in told],
            "match": FLOW_RUNS,
            "match_related": TAG,
            "threshold": 1,
            "within": 0,
        },
        "actions": [_told(block, text) for block in blocks],
    }


def ensure_automation(api_url: str, wanted: Automation) -> str:
    """Make an automation unless it is there as wanted; return what was done: made, mended or nothing ("").

    Whether it is enabled stays as the operator left it. Twins, which a killed start may leave, are deleted. Raises
    AutomationError with the server's words when it refuses.
    """
    found = find_automations(api_url, [wanted["name"]])
    try:
        for twin in found[1:]:
            request_json(f"{api_url}/automations/{twin['id']}", method="DELETE")
        if not found:
            request_json(f"{api_url}/automations/", wanted)
            return "made"
        if holds(found[0], wanted):
            return ""
        body = {**wanted, "enabled": found[0]["enabled"]}
        request_json(f"{api_url}/automations/{found[0]['id']}", body, method="PUT")
        return "mended"
    except urllib.error.HTTPError as error:
        words = error.read().decode(errors="replace")
        raise AutomationError(f"the server refused the automation {wanted['name']!r}: {words}") from error


def ensure_all(api_url: str, settings: Settings) -> dict[str, str]:
    """Make or mend all automations and the webhook of BRAINLOOM_NOTIFY_URL; return by name what was done.

    Needs the deployments. Raises AutomationError as `ensure_automation` does, and for a block that cannot notify.
    """
    if settings.notify_url and (url := settings.notify_url.get_secret_value()):
        if not url.startswith(("http://", "https://")):
            raise AutomationError("BRAINLOOM_NOTIFY_URL must start with http:// or https:// (not repeated here)")
        _ensure_webhook(api_url, url)
    wanted = wanted_automations(api_url, settings)
    done = {one["name"]: ensure_automation(api_url, one) for one in wanted}
    if NOTICES not in done:
        for stale in find_automations(api_url, [NOTICES]):  # its block was deleted: there is nobody to tell
            request_json(f"{api_url}/automations/{stale['id']}", method="DELETE")
            done[NOTICES] = "deleted"
    return {name: what for name, what in done.items() if what}


def wanted_automations(api_url: str, settings: Settings) -> list[Automation]:
    """Return the automations that a server with these deployments and blocks must have."""
    blocks = notify_blocks(api_url)
    named = {"deployments": {"name": {"any_": [PROPOSER]}}}
    proposers = request_json(f"{api_url}/deployments/filter", named)
    return [
        zombie_automation(),
        failure_automation(settings.alarm_failures, settings.alarm_minutes, blocks),
        *(proposal_automation(deployment["id"]) for deployment in proposers[:1]),
        *([notice_automation(blocks)] if blocks else []),
    ]


def find_automations(api_url: str, names: Sequence[str] = NAMES) -> list[Automation]:
    """Return the automations of these names, the oldest first."""
    found = request_json(f"{api_url}/automations/filter", {"automations": {"name": {"any_": list(names)}}})
    return sorted(found, key=lambda automation: str(automation["created"]))


def holds(found: Any, wanted: Any) -> bool:
    """Say whether what the server has holds all that is wanted; it adds fields and sorts lists as it likes."""
    if isinstance(wanted, Mapping):
        return isinstance(found, Mapping) and all(holds(found.get(key), value) for key, value in wanted.items())
    if isinstance(wanted, list):
        if not isinstance(found, list) or len(found) != len(wanted):
            return False
        return all(any(holds(one, value) for one in found) for value in wanted)
    return bool(found == wanted)


def notify_blocks(api_url: str) -> list[dict[str, Any]]:
    """Return the blocks that are told; raises AutomationError naming one that cannot notify."""
    body = {"block_documents": {"name": {"any_": [NOTIFY_BLOCK]}}, "include_secrets": False}
    blocks = request_json(f"{api_url}/block_documents/filter", body)
    for block in blocks:
        slug = block["block_type"]["slug"]
        if slug != "webhook" and "notify" not in block["block_schema"]["capabilities"]:
            raise AutomationError(
                f"the block {slug}/{NOTIFY_BLOCK} cannot notify; make a webhook or a notification block of that name "
                "(slack-webhook, ms-teams-webhook, sendgrid-email, ...), or delete it"
            )
    return sorted(blocks, key=lambda block: str(block["id"]))


def _told(block: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Return the action that tells a block a text; a webhook gets `{"text": ...}`, which Slack and others take."""
    if block["block_type"]["slug"] == "webhook":
        payload = json.dumps({"text": f"{SUBJECT_LINE}: {text}"})
        return {"type": "call-webhook", "block_document_id": block["id"], "payload": payload}
    return {"type": "send-notification", "block_document_id": block["id"], "subject": SUBJECT_LINE, "body": text}


def _ensure_webhook(api_url: str, url: str) -> None:
    """Store an address, which may hold a secret, in the block `webhook/brainloom-notify`; the server encrypts it."""
    data = {"method": "POST", "url": url, "headers": {"Content-Type": "application/json"}}
    kind = request_json(f"{api_url}/block_types/slug/webhook")
    named = f"{api_url}/block_types/slug/webhook/block_documents/name/{NOTIFY_BLOCK}"
    try:
        there = request_json(f"{named}?include_secrets=true")
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        body = {"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}}
        schema = request_json(f"{api_url}/block_schemas/filter", body)[0]
        document = {
            "name": NOTIFY_BLOCK,
            "data": data,
            "block_schema_id": schema["id"],
            "block_type_id": kind["id"],
        }
        request_json(f"{api_url}/block_documents/", document)
        return
    if there["data"].get("url") != url:
        request_json(f"{api_url}/block_documents/{there['id']}", {"data": data}, method="PATCH")
