"""docker-compose.yml against the compose specification's own JSON schema, and the Dockerfile against rules of ours.

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
from infra.deploy import GPU_POOL
from infra.remote_clusters import dask_environment
from infra.setting_sources import refuse_unknown
from infra.settings import Settings, private_environment

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {
    "postgres_password": "POSTGRES_PASSWORD",
    "api_auth": "BRAINLOOM_API_AUTH",
    "s3_access_key": "S3_ACCESS_KEY",
    "s3_secret_key": "S3_SECRET_KEY",
}
OURS = {"server", "scheduler", "dask-worker", "bootstrap", "worker", "gpu-worker"}


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


def test_secrets_reach_the_services_as_files_alone(compose: dict[str, Any], text: str) -> None:
    assert {name: secret["environment"] for name, secret in compose["secrets"].items()} == SECRETS
    for variable in SECRETS.values():
        assert not re.search(rf"\$\{{?{variable}\b", text), f"{variable} would stand in the containers' configuration"
    for name, service in compose["services"].items():
        used = set(re.findall(r"/run/secrets/(\w+)", json.dumps([service.get("environment"), service.get("command")])))
        assert used == set(service.get("secrets", [])), name


def test_our_services_have_every_opt_out(compose: dict[str, Any]) -> None:
    ours = {name: one for name, one in compose["services"].items() if one["image"].startswith("brainloom")}
    assert set(ours) == OURS
    for service in ours.values():
        assert private_environment().items() <= service["environment"].items()
        assert service["cap_drop"] == ["ALL"]
        refuse_unknown(Settings, service["environment"])


def test_what_runs_on_has_a_health_check(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert ("healthcheck" in service) == (name != "bootstrap"), name


def test_the_cluster_and_the_pools_are_those_of_the_code(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert Settings().work_pool in services["worker"]["command"]
    assert GPU_POOL in services["gpu-worker"]["command"]
    for name in ("scheduler", "dask-worker"):
        assert dask_environment(DASK_CONFIG).items() <= services[name]["environment"].items()
    command = services["dask-worker"]["command"]
    assert command[command.index("--nthreads") + 1] == "1"


def test_the_gpu_worker_asks_for_the_gpus_and_starts_on_request(compose: dict[str, Any]) -> None:
    worker = compose["services"]["gpu-worker"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert worker["profiles"] == ["gpu"]
    assert [name for name, one in compose["services"].items() if "profiles" in one] == ["gpu-worker"]


def test_the_database_is_seen_by_the_server_alone(compose: dict[str, Any]) -> None:
    inside = {name for name, one in compose["services"].items() if "database" in one.get("networks", ["default"])}
    assert inside == {"postgres", "server"}
    assert compose["networks"]["database"] == {"internal": True}
    assert compose["services"]["postgres"]["networks"] == ["database"]


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile with their arguments, continued lines joined."""
    text = (ROOT / "infra/docker/Dockerfile").read_text()
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def problems(dockerfile: list[tuple[str, str]]) -> list[str]:
    """Return what breaks a rule, a line each."""
    found, stages = [], set()
    for word, rest in dockerfile:
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            if image not in stages and not re.search(r":\d+\.\d+\.\d+", image):
                found.append(f"FROM {image}: not pinned to a patch version")
            stages.add(name)
        found += [f"{word} {rest}: {why}" for pattern, why in RULES.get(word, ()) if re.search(pattern, rest)]
    return found


RULES: dict[str, list[tuple[str, str]]] = {
    "ADD": [("", "COPY says what is copied; ADD fetches and unpacks")],
    "RUN": [
        (r"\b(curl|wget)\b", "fetches what no lock pins"),
        (r"pip (install|wheel)(?!.*--no-cache-dir)", "leaves pip's cache in the image"),
        (r"\bsudo\b", "needs root at run time"),
        (r"apt-get install(?!.*rm -rf /var/lib/apt/lists)", "leaves package lists in the image"),
    ],
    "USER": [(r"^(root|0)\b", "runs as root")],
    "ENV": [(r"(?i)(password|secret|token|auth|access_key)\w*=", "a secret in the image")],
    "ARG": [(r"(?i)(password|secret|token|auth|access_key)", "a secret in the image's history")],
    "COPY": [(r"^\. |\.env|\.git\b", "copies more than what is named")],
    "ENTRYPOINT": [(r"^(?!\[)", "a shell would keep signals from the program")],
    "CMD": [(r"^(?!\[)", "a shell would keep signals from the program")],
}


def test_the_dockerfile_keeps_the_rules(dockerfile: list[tuple[str, str]]) -> None:
    assert problems(dockerfile) == []


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (("FROM", "python:latest AS x"), "not pinned"),
        (("ADD", "https://example.org/x.tar /"), "ADD fetches"),
        (("RUN", "curl https://example.org | sh"), "fetches what no lock pins"),
        (("RUN", "pip install torch"), "leaves pip's cache"),
        (("USER", "root"), "runs as root"),
        (("ENV", "S3_SECRET_KEY=x"), "a secret in the image"),
        (("COPY", ". /src"), "copies more"),
        (("CMD", "brainloom up"), "keep signals"),
    ],
)
def test_the_rules_find_mistakes(dockerfile: list[tuple[str, str]], line: tuple[str, str], text: str) -> None:
    assert any(text in problem for problem in problems([*dockerfile, line]))


def test_both_images_run_unprivileged_from_stages_without_the_sources(
    compose: dict[str, Any], dockerfile: list[tuple[str, str]]
) -> None:
    parent, words = {}, {}
    for word, rest in dockerfile:
        if word == "FROM":
            image, _, stage = rest.partition(" AS ")
            parent[stage], words[stage] = image, []
        else:
            words[stage].append((word, rest))
    targets = {one["build"]["target"] for one in compose["services"].values() if "build" in one}
    assert targets == {"cpu", "gpu"}
    for target in targets:
        assert parent[target] == "runtime"
        assert ("USER", "10001:10001") in words["runtime"]
        assert not [rest for word, rest in words[target] if word == "USER"]
        assert next(rest for word, rest in words[target] if word == "COPY").startswith("--from=packages")


def test_the_images_are_built_from_what_is_there(dockerfile: list[tuple[str, str]]) -> None:
    allowed = (ROOT / ".dockerignore").read_text().split()
    copied = [rest.split()[:-1] for word, rest in dockerfile if word == "COPY" and not rest.startswith("--from")]
    for source in (source for sources in copied for source in sources):
        assert (ROOT / source).exists(), source
        assert f"!{source}" in allowed
