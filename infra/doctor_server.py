"""What `brainloom doctor` asks the Prefect server: version, clock, workers, deployments, automations, failures."""

from __future__ import annotations

import subprocess
import urllib.error
from collections.abc import Collection, Mapping
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from infra.api import clock_skew_s, request_json
from infra.automations import AutomationError, find_automations, holds, wanted_automations
from infra.deploy import (
    PROJECT_FILE,
    DeployError,
    dead_workers,
    find_project,
    registered_deployments,
    start_folder,
    with_pools,
)
from infra.detached import OTHERS
from infra.findings import Finding
from infra.form_schemas import FormError, form_schemas
from infra.server import server_status
from infra.settings import Settings

SKEW_S = 5.0
"""Schedules, leases of concurrency slots and ages compare the clocks of server and workers."""


def check_server(settings: Settings) -> list[Finding]:
    """All that a live server can be asked; without one, how to start it."""
    info = server_status(settings)
    if info is None:
        where = settings.api_url or "this machine"
        mend = "start it, correct BRAINLOOM_API_URL, or unset it for our own" if settings.api_url else "brainloom up"
        return [Finding("server", f"no Prefect server answers at {where}", mend)]
    url = info.api_url
    try:
        asked = [*check_version(url), *check_clock(url), *check_content(url, settings), *check_failures(url, settings)]
        return [*asked, *check_rights(settings)]
    except (OSError, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code in {401, 403}:
            mend = "export BRAINLOOM_API_AUTH=user:password, as the server asks for it"
            return [Finding("server", f"{url} refused us: {error}", mend)]
        again = "start it again where it runs" if settings.api_url else "brainloom down; brainloom up"
        return [Finding("server", f"{url} did not answer: {error}", again)]


def check_rights(settings: Settings) -> list[Finding]:
    """May others of this machine read the database of our own server, with the key of its blocks, and the logs?"""
    folder = settings.server_dir
    if not folder.exists() or not folder.stat().st_mode & OTHERS:
        return []
    text = f"{folder} has database, keys and logs, and others may read it or look into it"
    return [Finding("server", text, f"chmod 700 {folder}")]


def check_version(api_url: str) -> list[Finding]:
    """The server's version of Prefect against that of this machine."""
    theirs, ours = str(request_json(f"{api_url}/admin/version")), metadata.version("prefect")
    mend = f"pip install prefect=={ours} where the server runs, and start it again" if theirs != ours else ""
    return [Finding("server", f"Prefect {theirs} at {api_url}, {ours} here", mend)]


def check_clock(api_url: str, allowed_s: float = SKEW_S) -> list[Finding]:
    """How far the clocks of this machine and the server are apart."""
    skew = clock_skew_s(api_url)
    mend = "timedatectl set-ntp true, on both machines" if abs(skew) > allowed_s else ""
    return [Finding("clock", f"{skew:+.1f} s against the server, {allowed_s:g} s are allowed", mend)]


def check_content(api_url: str, settings: Settings) -> list[Finding]:
    """Deployments, workers of their pools, and automations."""
    try:
        folder = find_project()
        content = with_pools(yaml.safe_load((folder / PROJECT_FILE).read_text()), settings)
    except DeployError as error:
        return [Finding("deployments", str(error), f"cd to the folder with {PROJECT_FILE}")]
    pools = sorted({deployment["work_pool"]["name"] for deployment in content["deployments"]})
    dead = dead_workers(settings)
    workers = [finding for pool in pools for finding in check_pool(api_url, pool, dead)]
    there = registered_deployments(api_url, content)
    deployments = [*check_deployments(api_url, content, there), *check_forms(content, there)]
    return [*deployments, *check_folders(folder, content, there), *workers, *check_automations(api_url, settings)]


def check_deployments(api_url: str, content: Mapping[str, Any], there: Mapping[str, Any]) -> list[Finding]:
    """Deployments of prefect.yaml that are missing or registered otherwise, and paused ones."""
    problems = []
    for wanted in content["deployments"]:
        name, found = wanted["name"], there.get(wanted["name"])
        if found is None:
            problems.append(Finding("deployments", f"{name} is not registered", "brainloom deploy"))
        elif differs := deployment_differences(wanted, found):
            text = f"{name} is registered otherwise than in {PROJECT_FILE}: {', '.join(differs)}"
            problems.append(Finding("deployments", text, "brainloom deploy"))
        elif found["paused"]:
            command = f"its switch in the UI, or: curl -X POST {api_url}/deployments/{found['id']}/resume_deployment"
            problems.append(Finding("deployments", f"{name} is paused", command))
    return problems or [Finding("deployments", f"{len(there)} are registered as in {PROJECT_FILE}")]


def check_folders(folder: Path, content: Mapping[str, Any], there: Mapping[str, Any]) -> list[Finding]:
    """Deployments that start in another folder than that of our prefect.yaml: relative paths lead elsewhere then."""
    own = {one["name"] for one in content["deployments"] if one.get("pull") or content.get("pull")}
    elsewhere: dict[str, list[str]] = {}
    for name in set(there) - own:  # the others say themselves where they start
        if (start := start_folder(there[name])) != str(folder):
            elsewhere.setdefault(start or "", []).append(name)
    found = []
    for start, names in sorted(elsewhere.items()):
        where = start or "a temporary folder"
        text = f"{', '.join(sorted(names))}: flow runs and their relative paths start in {where}, not in {folder}"
        instead = f"; or, when {start} is meant: run the doctor there" if start else ""
        found.append(Finding("deployments", text, f"cd {folder}; brainloom deploy{instead}"))
    return found


def check_forms(content: Mapping[str, Any], there: Mapping[str, Any]) -> list[Finding]:
    """Deployments whose form on the server is another one than this version's flows have.

    A server that was not told of an upgrade refuses new parameters and shows old ones.
    """
    try:
        forms = form_schemas([one["entrypoint"] for one in content["deployments"]])
    except (FormError, subprocess.TimeoutExpired) as error:
        return [Finding("forms", str(error), "pip install the version that the deployments are of")]
    stale = [
        name
        for name, entrypoint in ((one["name"], one["entrypoint"]) for one in content["deployments"])
        if name in there and there[name]["parameter_openapi_schema"] != forms[entrypoint]
    ]
    if stale:
        text = f"the forms of {', '.join(stale)} on the server are not those of this version"
        return [Finding("forms", text, "brainloom deploy")]
    return [Finding("forms", "those on the server are those of this version")]


def deployment_differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return the fields in which a registered deployment is not what prefect.yaml says."""
    pool = wanted["work_pool"]
    limit = (found.get("global_concurrency_limit") or {}).get("limit")
    pairs = {
        "entrypoint": (wanted["entrypoint"], found["entrypoint"]),
        "work pool": (pool["name"], found["work_pool_name"]),
        "work queue": (pool.get("work_queue_name", "default"), found["work_queue_name"]),
        "parameters": (wanted.get("parameters", {}), found["parameters"]),
        "description": (wanted.get("description"), found["description"]),
        "limit": (wanted.get("concurrency_limit"), limit),
        "tags": (sorted(wanted.get("tags", [])), sorted(found["tags"])),
        "schedules": (
            sorted((one["cron"], one["active"]) for one in wanted.get("schedules", [])),
            sorted((str(one["schedule"].get("cron")), one["active"]) for one in found["schedules"]),
        ),
    }
    return [name for name, (ours, theirs) in pairs.items() if ours != theirs]


def check_pool(api_url: str, pool: str, dead: Collection[str] = ()) -> list[Finding]:
    """Is the pool there, open, and served by a living worker? Are its queues open?

    dead: pools whose worker of this machine is gone, which the server notices late.
    """
    try:
        state = request_json(f"{api_url}/work_pools/{pool}")
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        return [Finding("workers", f"there is no work pool {pool}", "brainloom deploy")]
    workers = request_json(f"{api_url}/work_pools/{pool}/workers/filter", {})
    alive = [worker["name"] for worker in workers if worker["status"] == "ONLINE"]
    queues = request_json(f"{api_url}/work_pools/{pool}/queues/filter", {})
    problems = [
        Finding(
            "workers",
            f"the queue {queue['name']} of {pool} is paused",
            f"prefect work-queue resume {queue['name']} --pool {pool}",
        )
        for queue in queues
        if queue["is_paused"]
    ]
    if state["is_paused"]:
        problems.append(Finding("workers", f"the work pool {pool} is paused", f"prefect work-pool resume {pool}"))
    if pool in dead:
        text = f"the worker of {pool} that was started here was killed, or the machine restarted"
        problems.append(Finding("workers", text, f"brainloom up --pool {pool}"))
    elif not alive:
        text = f"no worker is alive in {pool}, its flow runs stay Late"
        problems.append(Finding("workers", text, f"brainloom up --pool {pool}, on the machine that shall run them"))
    return problems or [Finding("workers", f"{len(alive)} alive in {pool}: {', '.join(alive)}")]


def check_automations(api_url: str, settings: Settings) -> list[Finding]:
    """Automations that are missing, changed or switched off."""
    try:
        wanted = wanted_automations(api_url, settings)
    except AutomationError as error:
        return [Finding("automations", str(error), "then: brainloom deploy")]
    there = {one["name"]: one for one in reversed(find_automations(api_url))}
    problems = []
    for one in wanted:
        name, found = one["name"], there.get(one["name"])
        if found is None:
            problems.append(Finding("automations", f"{name!r} is missing", "brainloom deploy"))
        elif not holds(found, one):
            problems.append(Finding("automations", f"{name!r} was changed", "brainloom deploy"))
        elif not found["enabled"]:
            problems.append(
                Finding("automations", f"{name!r} is switched off", f"prefect automation resume --id {found['id']}")
            )
    return problems or [Finding("automations", f"{len(wanted)} are there and switched on")]


def check_failures(api_url: str, settings: Settings) -> list[Finding]:
    """Flow runs of deployments that failed or crashed within the alarm's window."""
    since = datetime.now(UTC) - timedelta(minutes=settings.alarm_minutes)
    body = {
        "flow_runs": {
            "state": {"type": {"any_": ["FAILED", "CRASHED"]}},
            "tags": {"all_": ["brainloom"]},
            "end_time": {"after_": since.isoformat()},
        }
    }
    count = int(request_json(f"{api_url}/flow_runs/count", body))
    text = f"{count} flow runs failed or crashed within {settings.alarm_minutes} min"
    mend = (
        f"read them at {api_url.removesuffix('/api')}/runs and docs/operating.md"
        if count >= settings.alarm_failures
        else ""
    )
    return [Finding("failures", text, mend)]
