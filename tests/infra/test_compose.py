"""docker-compose.yml against the compose specification's own JSON schema.

tests/golden/compose-spec.json is the schema of https://github.com/compose-spec/compose-spec (Apache-2.0), unchanged,
as the PyPI package check-jsonschema 0.39.0 carries it.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from infra.clusters import DASK_CONFIG
from infra.settings import Settings, private_environment

ROOT = Path(__file__).resolve().parents[2]
SECRETS = ("POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY")


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "docker-compose.yml").read_text()


@pytest.fixture
def compose(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads((ROOT / "tests/golden/compose-spec.json").read_text())
    return jsonschema.Draft202012Validator(schema)


def test_it_is_valid(compose: dict[str, Any], validator: jsonschema.Draft202012Validator) -> None:
    assert [error.message for error in validator.iter_errors(compose)] == []


@pytest.mark.parametrize("broken", ["unknown key", "wrong condition", "number as command"])
def test_the_schema_finds_mistakes(
    compose: dict[str, Any], validator: jsonschema.Draft202012Validator, broken: str
) -> None:
    wrong = copy.deepcopy(compose)
    if broken == "unknown key":
        wrong["services"]["server"]["healthchek"] = {}
    elif broken == "wrong condition":
        wrong["services"]["server"]["depends_on"]["postgres"]["condition"] = "healthy"
    else:
        wrong["services"]["server"]["command"] = 5
    assert not validator.is_valid(wrong)


def test_what_a_service_waits_for_exists_and_can_become_healthy(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for other, how in service.get("depends_on", {}).items():
            assert other in compose["services"], f"{name} waits for {other}"
            if how["condition"] == "service_healthy":
                assert "healthcheck" in compose["services"][other], f"{name} waits for the health of {other}"
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in compose["volumes"]


def test_ports_are_bound_to_loopback(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_secrets_have_no_default_and_are_required(text: str) -> None:
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for name in SECRETS:
        uses = re.findall(rf"\$\{{{name}([^}}]*)\}}", body)
        assert uses
        assert all(use == f":?set {name}" for use in uses)


def test_our_services_have_every_opt_out(compose: dict[str, Any]) -> None:
    ours = [s for s in compose["services"].values() if s["image"].startswith("brainloom")]
    assert len(ours) == 5
    for service in ours:
        assert private_environment().items() <= service["environment"].items()
        assert service["cap_drop"] == ["ALL"]


def test_the_cluster_and_pool_are_those_of_the_code(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert Settings().work_pool in services["worker"]["command"]
    allowed = services["scheduler"]["environment"]["DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES"]
    assert int(allowed) == DASK_CONFIG["distributed.scheduler.allowed-failures"]


def test_the_image_is_built_from_what_is_there_and_runs_unprivileged(compose: dict[str, Any]) -> None:
    dockerfile = (ROOT / compose["services"]["server"]["build"]["dockerfile"]).read_text()
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", dockerfile, re.MULTILINE)
    for source in " ".join(copied).split():
        assert (ROOT / source).exists(), source
        assert f"!{source}" in (ROOT / ".dockerignore").read_text().split()
    assert re.search(r"^USER brainloom$", dockerfile, re.MULTILINE)
