from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from infra import settings as module
from infra.settings import Settings, error_text, machine_memory, private_environment


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
        ("cluster", "slurm", "cluster 'slurm' needs a limit for each worker: set BRAINLOOM_WORKER_MEMORY, e.g. 8GiB"),
        ("kubernetes_image", "a/b:1", "kubernetes_.* are for cluster 'kubernetes', got cluster 'local'"),
        ("kubernetes_secret", "My_Keys", "names in Kubernetes have small letters, digits and dashes, got 'My_Keys'"),
        ("nodes", 2, "2 nodes need launch 'pool' or 'slurm', got 'local'; set BRAINLOOM_LAUNCH"),
        ("launch", "slurm", "SLURM needs a time limit: set BRAINLOOM_SLURM_TIME, e.g. 1-00:00:00"),
        ("slurm_time", "2h", r"must be \[days-\]hours:minutes:seconds, e.g. 1-00:00:00, got '2h'"),
        ("slurm_options", ["--qos=a; rm"], "an option of sbatch starts with -- and is one word, got '--qos=a; rm'"),
        ("slurm_partition", "a\nb", "one word of letters, digits"),
        ("s3_endpoint", "s3:8333", r"must be http\(s\)://host:port without user info \(the value is not repeated"),
        ("s3_access_key", "k", "belong together; set both BRAINLOOM_S3_ACCESS_KEY and BRAINLOOM_S3_SECRET_KEY"),
        ("api_auth", "planted", r"must be user:password \(the value is not repeated here\)"),
        ("database_password", "p", "needs a BRAINLOOM_DATABASE_URL with a user and without a password"),
        ("nonsense", 1, "Extra inputs are not permitted"),
    ],
)
def test_bad_settings_say_the_rule(field: str, value: object, text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        Settings.model_validate({field: value})


@pytest.mark.parametrize("field", ["PATH_KEY", "API_AUTH"])
def test_no_error_repeats_a_secret(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"BRAINLOOM_{field}", "planted")
    with pytest.raises(ValidationError, match="the value is not repeated here") as refused:
        Settings()
    assert "planted" not in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("WORKERS", "zero", "BRAINLOOM_WORKERS: Input should be a valid integer, unable to parse string as an integer"),
        ("WORKER_MEMORY", "lots", "BRAINLOOM_WORKER_MEMORY: a size such as 3GiB is wanted"),
        ("LOG", "xml", "BRAINLOOM_LOG: Input should be 'text' or 'json'"),
        ("SLURM_OPTIONS", "foo", "BRAINLOOM_SLURM_OPTIONS: a JSON list of texts is wanted, e.g. "),
        ("SLURM_SETUP", '{"a": 1}', "BRAINLOOM_SLURM_SETUP: a JSON list of texts is wanted, e.g. "),
        ("SLURM_SETUP", "[1]", "BRAINLOOM_SLURM_SETUP, entry 0: Input should be a valid string"),
        ("CLUSTER", "slurm", "cluster 'slurm' needs a limit for each worker: set BRAINLOOM_WORKER_MEMORY"),
    ],
)
def test_the_text_of_an_error_names_the_variable(
    field: str, value: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"BRAINLOOM_{field}", value)
    with pytest.raises(ValidationError) as refused:
        Settings()
    assert error_text(refused.value).startswith(text)


def test_the_text_of_several_errors_is_a_line_each_without_a_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "auth").write_text("planted")
    monkeypatch.setenv("BRAINLOOM_API_AUTH_FILE", str(tmp_path / "auth"))
    monkeypatch.setenv("BRAINLOOM_WORKERS", "planted")
    with pytest.raises(ValidationError) as refused:
        Settings()
    lines = error_text(refused.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["BRAINLOOM_API_AUTH_FILE", "BRAINLOOM_WORKERS"]
    assert "planted" not in error_text(refused.value)
    assert error_text(ValueError("as it is")) == "as it is"


def test_lists_come_from_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINLOOM_SLURM_OPTIONS", '["--qos=long"]')
    assert Settings().slurm_options == ["--qos=long"]


def test_spaces_at_the_ends_of_a_secret_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINLOOM_PATH_KEY", " sixteen letters and more\n")
    found = Settings().path_key
    assert found is not None
    assert found.get_secret_value() == "sixteen letters and more"
    monkeypatch.setenv("BRAINLOOM_PATH_KEY", " " * 17)
    assert Settings().path_key is None


def test_contradictions_name_what_to_set() -> None:
    remote = {"cluster": "kubernetes", "worker_memory": "1GiB"}
    with pytest.raises(ValidationError, match="cluster 'kubernetes' needs an image: set BRAINLOOM_KUBERNETES_IMAGE"):
        Settings.model_validate(remote)
    own = {"database_url": "postgresql+asyncpg://u@h/d", "api_url": "http://h:4200/api"}
    with pytest.raises(ValidationError, match="database_url is for our own server, and BRAINLOOM_API_URL names anoth"):
        Settings.model_validate(own)
    two = {"database_url": "postgresql+asyncpg://u:p@h/d", "database_password": "p"}
    with pytest.raises(ValidationError, match="with a user and without a password"):
        Settings.model_validate(two)


def test_a_misspelt_variable_is_refused_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRAINLOOM_WORKER_MEMROY", "2GiB")
    with pytest.raises(
        ValueError, match=r"BRAINLOOM_WORKER_MEMROY is no setting .* did you mean BRAINLOOM_WORKER_MEMORY"
    ):
        Settings()


def test_secrets_may_stand_in_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "auth"
    file.write_text("user:planted secret\n")
    monkeypatch.setenv("BRAINLOOM_API_AUTH_FILE", str(file))
    settings = Settings()
    assert settings.api_auth is not None
    assert settings.api_auth.get_secret_value() == "user:planted secret"
    assert "planted" not in repr(settings) + settings.model_dump_json()
    monkeypatch.setenv("BRAINLOOM_API_AUTH", "user:other")
    with pytest.raises(ValueError, match="BRAINLOOM_API_AUTH and BRAINLOOM_API_AUTH_FILE are both set; keep one"):
        Settings()
    monkeypatch.delenv("BRAINLOOM_API_AUTH")
    file.write_text("\n")
    with pytest.raises(ValueError, match="which is empty; write the secret into it"):
        Settings()
    monkeypatch.setenv("BRAINLOOM_API_AUTH_FILE", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="absent, which cannot be read: No such file"):
        Settings()


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
