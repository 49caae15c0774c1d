from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from infra import settings as module
from infra.settings import Settings, machine_memory, private_environment


def test_fields_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BRAINLOOM_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("BRAINLOOM_WORKERS", "3")
    monkeypatch.setenv("BRAINLOOM_WORKER_MEMORY", "2GiB")
    monkeypatch.setenv("BRAINLOOM_API_URL", "http://server:4200/api/")
    settings = Settings()
    assert settings.server_dir == tmp_path / "server"
    assert settings.memory_per_worker() == 2 * 2**30
    assert settings.api_url == "http://server:4200/api"


def test_the_state_folder_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings(state_dir=Path("state")).state_dir == tmp_path / "state"


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("api_url", "http://server:4200", "must look like http://host:4200/api"),
        ("api_url", "file:///etc/passwd/api", "must look like http://host:4200/api"),
        ("cluster", "address", "set BRAINLOOM_CLUSTER=address and BRAINLOOM_CLUSTER_ADDRESS"),
        ("cluster_address", "tcp://x:1", "refused otherwise"),
        ("workers", 0, "greater than or equal to 1"),
    ],
)
def test_bad_settings_say_the_rule(field: str, value: object, text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        Settings.model_validate({field: value})


@pytest.mark.parametrize(("content", "expected"), [("1048576\n", 1048576), ("max\n", None)])
def test_a_container_limit_lowers_the_memory(
    content: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text(content)
    monkeypatch.setattr(module, "CGROUP_MEMORY_LIMIT", tmp_path / "absent")
    whole = machine_memory()
    monkeypatch.setattr(module, "CGROUP_MEMORY_LIMIT", tmp_path / "memory.max")
    assert machine_memory() == (expected or whole)


def test_all_opt_outs_are_there() -> None:
    environment = private_environment()
    assert environment["PYTHONSAFEPATH"] == "1"
    assert environment["DO_NOT_TRACK"] == "1"
    off = [name for name, value in environment.items() if value == "false"]
    assert sorted(off) == [
        "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY",
        "PREFECT_SERVER_ANALYTICS_ENABLED",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT",
        "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS",
    ]


def test_prefect_understands_every_opt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import Settings as PrefectSettings

    for name, value in private_environment().items():
        monkeypatch.setenv(name, value)
    seen = PrefectSettings()
    assert seen.server.analytics_enabled is False
    assert seen.cloud.enable_orchestration_telemetry is False
    assert seen.server.ui.show_promotional_content is False
    assert seen.telemetry.enable_resource_metrics is False
