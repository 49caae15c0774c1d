"""What settings mean to Prefect, its database and S3 clients, and that no secret goes to Dask's workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infra.environments import database_url, export_storage, server_environment, service_environment
from infra.log_lines import log_environment
from infra.server import ServerError, ensure_server
from infra.settings import Settings
from infra.storage import s3_options

SECRET = "user:planted-secret"
DATABASE = "postgresql+asyncpg://prefect@db:5432/prefect"


def test_a_client_gets_address_and_password_and_nothing_of_the_server() -> None:
    settings = Settings(api_url="http://server:4200/api", api_auth=SECRET)
    environment = service_environment(settings, {"PATH": "p"})
    assert environment["PREFECT_API_URL"] == "http://server:4200/api"
    assert environment["PREFECT_API_AUTH_STRING"] == SECRET
    assert environment["PATH"] == "p"
    assert environment["DO_NOT_TRACK"] == "1"
    assert not [name for name in environment if name.startswith("PREFECT_SERVER_API")]


def test_the_server_gets_its_database_and_asks_for_the_password() -> None:
    settings = Settings(api_auth=SECRET, database_url=DATABASE, database_password="p@ss/w:rd")
    environment = service_environment(settings, {})
    url = "postgresql+asyncpg://prefect:p%40ss%2Fw%3Ard@db:5432/prefect"
    assert environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] == url == database_url(settings)
    assert environment["PREFECT_SERVER_API_AUTH_STRING"] == SECRET
    assert database_url(Settings()) == ""


def test_the_server_logs_as_it_is_asked_to() -> None:
    environment = server_environment(Settings(log="json"))
    assert environment.items() >= log_environment("json").items()
    assert server_environment(Settings()) == {}


def test_our_own_server_on_loopback_takes_no_password(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"BRAINLOOM_API_AUTH is set without BRAINLOOM_API_URL.*docs/compose\.md"):
        ensure_server(Settings(state_dir=tmp_path, api_auth=SECRET))


def test_s3_settings_become_the_variables_of_its_clients(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("planted\n")
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "")  # so that what the code sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("BRAINLOOM_S3_ENDPOINT", "http://s3:8333")
    monkeypatch.setenv("BRAINLOOM_S3_ACCESS_KEY", "key")
    monkeypatch.setenv("BRAINLOOM_S3_SECRET_KEY_FILE", str(tmp_path / "secret"))
    assert s3_options()["endpoint_url"] == "http://s3:8333"
    assert (os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]) == ("key", "planted")
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", "http://other:1")
    with pytest.raises(ValueError, match="FSSPEC_S3_ENDPOINT_URL is set to something else than BRAINLOOM_S3_ENDPOINT"):
        export_storage(Settings())


def test_the_entry_point_becomes_the_command_and_refuses_wrong_settings(tmp_path: Path) -> None:
    (tmp_path / "auth").write_text(SECRET)
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    command = [sys.executable, "-m", "infra.environments", sys.executable, "-c", code]
    environment = {**os.environ, "BRAINLOOM_API_AUTH_FILE": str(tmp_path / "auth")}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert json.loads(shown)["PREFECT_SERVER_API_AUTH_STRING"] == SECRET
    wrong = subprocess.run(
        command, env={**environment, "BRAINLOOM_API_UTH": "x"}, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 1
    assert "brainloom: the environment variable BRAINLOOM_API_UTH is no setting of brainloom" in wrong.stderr
    wrong = subprocess.run(
        command, env={**environment, "BRAINLOOM_LOG": "xml"}, capture_output=True, text=True, check=False
    )
    assert wrong.stderr == "brainloom: BRAINLOOM_LOG: Input should be 'text' or 'json'\n"


def test_no_secret_travels_with_a_task_and_a_worker_takes_its_own() -> None:
    """In a process of its own: Prefect reads the environment when it is imported."""
    code = """
import os, pickle
import prefect.main
from prefect.context import SettingsContext, serialize_context
from infra.shielding import shielded_settings
assert b"planted" in pickle.dumps(serialize_context()["settings_context"])
with shielded_settings():
    assert prefect.settings.get_current_settings().api.auth_string.get_secret_value() == "u:planted-auth"
    sent = serialize_context()["settings_context"]
assert b"planted" not in pickle.dumps(sent)
os.environ["PREFECT_API_AUTH_STRING"] = "u:of the worker"
there = SettingsContext(**sent).settings.api
assert (there.auth_string.get_secret_value(), there.url) == ("u:of the worker", "http://server:4200/api")
"""
    environment = {
        **os.environ,
        "PREFECT_API_URL": "http://server:4200/api",
        "PREFECT_API_AUTH_STRING": "u:planted-auth",
        "PREFECT_API_KEY": "planted-key",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg://u:planted-db@h/d",
        "PREFECT_CLIENT_CUSTOM_HEADERS": '{"X-Token": "planted-token"}',
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
