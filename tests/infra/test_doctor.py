from __future__ import annotations

import json
import threading
import urllib.error
from collections import namedtuple
from collections.abc import Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from infra import doctor, doctor_server, storage
from infra.findings import Finding
from infra.form_schemas import FormError, form_schemas
from infra.settings import Settings

GIB = 2**30


def problems(found: list[Finding]) -> list[str]:
    return [f"{one.text} -> {one.mend}" for one in found if one.is_problem]


def test_the_installed_versions_are_within_the_bounds_and_one_outside_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(doctor.check_versions()) == []
    real = metadata.version

    def version(name: str) -> str:
        if name == "zarr":
            raise metadata.PackageNotFoundError(name)
        return "0.155.0" if name == "fastapi" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    assert problems(doctor.check_versions()) == [
        "fastapi is 0.155.0, tested is fastapi<0.151 -> pip install 'fastapi<0.151'",
        "zarr is absent, tested is zarr==3.1.6 -> pip install 'zarr==3.1.6'",
    ]


def test_a_package_from_elsewhere_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert problems(doctor.check_packages()) == []
    spec = namedtuple("Spec", "origin")
    real = doctor.util.find_spec
    foreign = spec(str(tmp_path / "models/__init__.py"))
    monkeypatch.setattr(doctor.util, "find_spec", lambda name: foreign if name == "models" else real(name))
    (told,) = problems(doctor.check_packages())
    assert told.startswith(f"package `models` comes from {tmp_path}, not from ")


def test_little_disk_and_a_folder_of_somebody_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent = tmp_path / "not/there/yet"
    assert problems(doctor.check_disk({"stores": absent}, minimum_gb=0)) == []
    (told,) = problems(doctor.check_disk({"stores": absent}, minimum_gb=1e6))
    assert told.endswith(f"GB free for stores at {absent} -> make room, or put it elsewhere; 1e+06 GB are needed")
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    (told,) = problems(doctor.check_disk({"stores": tmp_path}))
    assert f"stores at {tmp_path} cannot be written -> chown " in told


def test_little_shared_memory(tmp_path: Path) -> None:
    (told,) = problems(doctor.check_shared_memory(tmp_path, minimum_mib=1e9))
    assert "docker run --shm-size 2g" in told
    assert problems(doctor.check_shared_memory(tmp_path, minimum_mib=1)) == []
    assert len(problems(doctor.check_shared_memory(tmp_path / "absent"))) == 1


@pytest.mark.parametrize(
    ("machine", "settings", "words"),
    [
        (16, {"workers": 4}, ""),
        (4, {"workers": 8}, "export BRAINLOOM_WORKERS=3; a worker needs 1 GiB"),
        (8, {"workers": 4, "worker_memory": "3GiB"}, "are more than there is -> export BRAINLOOM_WORKERS=2"),
        (1, {"cluster": "address", "cluster_address": "tcp://h:1", "workers": 8}, ""),
    ],
)
def test_memory_against_the_workers(
    monkeypatch: pytest.MonkeyPatch, machine: int, settings: dict[str, Any], words: str
) -> None:
    for module in ("doctor", "settings"):
        monkeypatch.setattr(f"infra.{module}.machine_memory", lambda: machine * GIB)
    told = problems(doctor.check_memory(Settings(**settings)))
    assert len(told) == bool(words)
    assert words in "".join(told)


def test_a_driver_without_gpus_and_a_cluster_without_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = namedtuple("Cuda", "is_available")(lambda: False)
    torch = namedtuple("Torch", "cuda")(cuda)
    monkeypatch.setattr(doctor.importlib, "import_module", lambda _: torch)
    assert problems(doctor.check_gpus(Settings(), driver=tmp_path / "absent")) == []
    (told,) = problems(doctor.check_gpus(Settings(), driver=tmp_path))
    assert "there is an NVIDIA driver, but torch sees no GPU -> install the CUDA build of torch" in told

    def none_there(_: Settings) -> int:
        raise doctor.ClusterError("cluster 'cuda' needs a GPU")

    monkeypatch.setattr(doctor, "worker_count", none_there)
    (told,) = problems(doctor.check_gpus(Settings(cluster="cuda"), driver=tmp_path / "absent"))
    assert told.startswith("cluster 'cuda' needs a GPU -> export BRAINLOOM_CLUSTER=local")


def test_the_rights_below_a_url_are_tried_and_nothing_stays(root_url: str) -> None:
    (found,) = doctor.check_storage(root_url)
    assert not found.is_problem, found
    assert storage.listdir(root_url) == []


@pytest.mark.parametrize(
    ("call", "verb"),
    [
        ("create_exclusive", "create"),
        ("write_bytes", "write"),
        ("read_bytes", "read"),
        ("listdir", "list"),
        ("delete", "delete"),
    ],
)
def test_a_right_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str, verb: str
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(storage, call, denied)
    (told,) = problems(doctor.check_storage(str(tmp_path)))
    assert told.startswith(
        f"cannot {verb} a probe below {tmp_path}: AccessDenied -> give this user the right to {verb}"
    )


@pytest.mark.parametrize("fails", [False, True])
def test_folders_that_are_not_there_yet_are_removed_again(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = tmp_path / "typo" / "stores"
    if fails:
        monkeypatch.setattr(storage, "read_bytes", lambda _: b"")
    (found,) = doctor.check_storage(str(url))
    assert found.is_problem == fails
    assert fails or found.text.endswith(f"{url} is not there yet, and was removed again")
    # The probe of a store that does not read stays for the one who looks into it, with its folder.
    assert [path.name for path in tmp_path.iterdir()] == (["typo"] if fails else [])


@pytest.mark.parametrize("place", ["/proc/nothing/x", "file/x"])
def test_a_folder_that_cannot_be_made_is_to_be_corrected(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (told,) = problems(doctor.check_storage(str(tmp_path / place)))
    assert told.endswith(" -> correct the path: no folder can be made there")


@pytest.mark.parametrize("url", ["ftp://host/x", "s3://KEY:SECRET@bucket/x", "s3:///x"])
def test_what_is_no_storage_is_told(url: str) -> None:
    (told,) = problems(doctor.check_storage(url))
    assert told.endswith("-> correct what is named")
    assert "KEY:" not in told


class S3Answers(BaseHTTPRequestHandler):
    """An S3 server that answers every request with one error."""

    status, code = 403, "AccessDenied"
    asked = 0

    def do_PUT(self) -> None:
        type(self).asked += 1
        body = f"<Error><Code>{self.code}</Code><Message>no</Message></Error>".encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", *storage.ENDPOINT_VARIABLES):
        monkeypatch.setenv(name, "")  # what is exported from the settings goes again
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("BRAINLOOM_S3_ACCESS_KEY", "someone")
    monkeypatch.setenv("BRAINLOOM_S3_SECRET_KEY", "very-secret")
    return monkeypatch


@pytest.mark.parametrize(
    ("status", "code", "mend"),
    [
        (403, "AccessDenied", "give this user the right to create objects there"),
        (403, "InvalidAccessKeyId", "check BRAINLOOM_S3_ACCESS_KEY and BRAINLOOM_S3_SECRET_KEY: 127.0.0.1:"),
        (403, "SignatureDoesNotMatch", "check BRAINLOOM_S3_ACCESS_KEY and BRAINLOOM_S3_SECRET_KEY: 127.0.0.1:"),
        (403, "RequestTimeTooSkewed", "set the clock of this machine"),
        (404, "NoSuchBucket", "make the bucket first"),
        (503, "SlowDown", "start 127.0.0.1:"),
    ],
)
def test_each_error_of_s3_has_its_own_mend_and_is_asked_for_once(
    status: int, code: str, mend: str, keys: pytest.MonkeyPatch
) -> None:
    answers = type("Refuses", (S3Answers,), {"status": status, "code": code})
    with HTTPServer(("127.0.0.1", 0), answers) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        keys.setenv("BRAINLOOM_S3_ENDPOINT", f"http://127.0.0.1:{httpd.server_port}")
        (told,) = problems(doctor.check_storage("s3://bucket/stores"))
        httpd.shutdown()
    assert told.split(" -> ")[1].startswith(mend)
    assert "very-secret" not in told
    assert answers.asked == 1


def test_an_endpoint_where_nobody_answers_is_to_be_started_or_corrected(keys: pytest.MonkeyPatch) -> None:
    keys.setenv("BRAINLOOM_S3_ENDPOINT", "http://127.0.0.1:9")
    (told,) = problems(doctor.check_storage("s3://bucket/stores"))
    assert told.startswith("cannot create a probe below s3://bucket/stores: could not create s3://bucket/stores/")
    assert told.endswith("-> start 127.0.0.1:9, or correct BRAINLOOM_S3_ENDPOINT")


def test_a_storage_that_creates_twice_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "create_exclusive", lambda *_: True)
    (told,) = problems(doctor.check_storage(str(tmp_path)))
    assert "cannot refuse a second creation of a probe" in told


class Answers(dict[str, Any]):
    """What a pretended server answers, by path below /api; `date` is its clock."""

    date: str | None = None


@pytest.fixture
def server() -> Iterator[tuple[str, Answers]]:
    answers = Answers({"health": True})

    class Pretended(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.removeprefix("/api/")
            self.send_response(200 if path in answers else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answers.get(path)).encode())

        def do_POST(self) -> None:
            self.do_GET()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return answers.date or super().date_time_string(timestamp)

        def log_message(self, *_: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Pretended) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/api", answers
        httpd.shutdown()


def test_without_a_server_it_says_how_to_start_one(tmp_path: Path) -> None:
    told = problems(doctor_server.check_server(Settings(state_dir=tmp_path)))
    assert told == ["no Prefect server answers at this machine -> brainloom up"]
    (told_of_ours,) = problems(doctor_server.check_server(Settings(api_url="http://127.0.0.1:9/api")))
    assert told_of_ours == (
        "no Prefect server answers at http://127.0.0.1:9/api -> "
        "start it, correct BRAINLOOM_API_URL, or unset it for our own"
    )


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (
            401,
            " refused us: HTTP Error 401: no -> export BRAINLOOM_API_AUTH=user:password, as the server asks for it",
        ),
        (500, " did not answer: HTTP Error 500: no -> start it again where it runs"),
    ],
)
def test_a_server_of_others_that_refuses_us_is_not_ours_to_start(
    server: tuple[str, Answers], monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    url, _ = server

    def refuse(_: str) -> None:
        raise urllib.error.HTTPError(url, code, "no", Message(), None)

    monkeypatch.setattr(doctor_server, "check_version", refuse)
    assert problems(doctor_server.check_server(Settings(api_url=url))) == [url + words]


def test_a_folder_of_the_server_that_others_may_read(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path)
    assert doctor_server.check_rights(settings) == []
    settings.server_dir.mkdir(mode=0o755)
    settings.server_dir.chmod(0o755)
    (told,) = problems(doctor_server.check_rights(settings))
    assert told.endswith(f" -> chmod 700 {settings.server_dir}")
    settings.server_dir.chmod(0o700)
    assert doctor_server.check_rights(settings) == []


def test_a_server_of_another_version(server: tuple[str, Answers]) -> None:
    url, answers = server
    answers["admin/version"] = "3.1.0"
    (told,) = problems(doctor_server.check_version(url))
    assert told.startswith(f"Prefect 3.1.0 at {url}, {metadata.version('prefect')} here -> pip install prefect==")


def test_clocks_that_disagree(server: tuple[str, Answers]) -> None:
    url, answers = server
    assert problems(doctor_server.check_clock(url)) == []
    answers.date = "Sun, 01 Jan 2023 00:00:00 GMT"
    (told,) = problems(doctor_server.check_clock(url))
    assert "against the server, 5 s are allowed -> timedatectl set-ntp true" in told


def test_pools_without_workers_or_paused(server: tuple[str, Answers]) -> None:
    url, answers = server
    (told,) = problems(doctor_server.check_pool(url, "gpu"))
    assert told == "there is no work pool gpu -> brainloom deploy"
    workers = [{"name": "w1", "status": "OFFLINE"}]
    answers |= {
        "work_pools/gpu": {"is_paused": True},
        "work_pools/gpu/workers/filter": workers,
        "work_pools/gpu/queues/filter": [{"name": "trainings", "is_paused": True}],
    }
    assert problems(doctor_server.check_pool(url, "gpu")) == [
        "the queue trainings of gpu is paused -> prefect work-queue resume trainings --pool gpu",
        "the work pool gpu is paused -> prefect work-pool resume gpu",
        "no worker is alive in gpu, its flow runs stay Late -> "
        "brainloom up --pool gpu, on the machine that shall run them",
    ]
    workers[0]["status"] = "ONLINE"
    answers["work_pools/gpu"] = {"is_paused": False}
    answers["work_pools/gpu/queues/filter"] = [{"name": "trainings", "is_paused": False}]
    (found,) = doctor_server.check_pool(url, "gpu")
    assert (found.text, found.is_problem) == ("1 alive in gpu: w1", False)
    assert problems(doctor_server.check_pool(url, "gpu", {"cpu"})) == []
    assert problems(doctor_server.check_pool(url, "gpu", {"gpu"})) == [
        "the worker of gpu that was started here was killed, or the machine restarted -> brainloom up --pool gpu"
    ]


def deployed() -> tuple[dict[str, Any], dict[str, Any]]:
    wanted = {
        "name": "weekly",
        "entrypoint": "flows.verify.verify",
        "description": "Words.",
        "tags": ["b", "a"],
        "work_pool": {"name": "cpu"},
        "schedules": [{"cron": "0 4 * * 0", "active": True}],
    }
    found = {
        **{key: wanted[key] for key in ("name", "entrypoint", "description")},
        "tags": ["a", "b"],
        "parameters": {},
        "paused": False,
        "flow_id": "1",
        "id": "2",
        "work_pool_name": "cpu",
        "work_queue_name": "default",
        "schedules": [{"schedule": {"cron": "0 4 * * 0"}, "active": True}],
    }
    return wanted, found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"entrypoint": "flows.old.old"}, "weekly is registered otherwise than in prefect.yaml: entrypoint -> "),
        ({"schedules": []}, "prefect.yaml: schedules -> brainloom deploy"),
        ({"work_pool_name": "gpu", "parameters": {"params": {}}}, "prefect.yaml: work pool, parameters -> "),
        ({"global_concurrency_limit": {"limit": 4}}, "prefect.yaml: limit -> brainloom deploy"),
        ({"paused": True}, "weekly is paused -> its switch in the UI, or: curl -X POST http"),
        (None, "weekly is not registered -> brainloom deploy"),
    ],
)
def test_deployments_against_prefect_yaml(
    server: tuple[str, Answers], change: dict[str, Any] | None, words: str
) -> None:
    url, answers = server
    wanted, found = deployed()
    answers["deployments/filter"] = [] if change is None else [{**found, **change}]
    answers["flows/filter"] = [{"id": "1", "name": "verify"}]
    content = {"deployments": [wanted]}
    told = problems(doctor_server.check_deployments(url, content, doctor_server.registered_deployments(url, content)))
    assert len(told) == bool(words)
    assert words in "".join(told)


def test_deployments_that_start_in_another_folder(tmp_path: Path) -> None:
    def started_in(folder: str) -> dict[str, Any]:
        return {"pull_steps": [{"prefect.deployments.steps.set_working_directory": {"directory": folder}}]}

    content: dict[str, Any] = {"deployments": [{"name": name} for name in ("a", "b", "c")]}
    there = {"a": started_in("/elsewhere"), "b": started_in(str(tmp_path)), "c": {"pull_steps": None}}
    assert problems(doctor_server.check_folders(tmp_path, content, there)) == [
        f"{name}: flow runs and their relative paths start in {start}, not in {tmp_path} -> "
        f"cd {tmp_path}; brainloom deploy{instead}"
        for name, start, instead in (
            ("c", "a temporary folder", ""),
            ("a", "/elsewhere", "; or, when /elsewhere is meant: run the doctor there"),
        )
    ]
    content["deployments"][2]["pull"] = [{"own": {}}]
    del there["a"]
    assert doctor_server.check_folders(tmp_path, content, there) == []


def test_a_form_that_is_not_of_this_version(server: tuple[str, Answers], monkeypatch: pytest.MonkeyPatch) -> None:
    url, answers = server
    wanted, found = deployed()
    content = {"deployments": [wanted]}
    answers["deployments/filter"] = [{**found, "parameter_openapi_schema": {"required": ["params"]}}]
    answers["flows/filter"] = [{"id": "1", "name": "verify"}]
    there = doctor_server.registered_deployments(url, content)
    monkeypatch.setattr(doctor_server, "form_schemas", lambda _: {"flows.verify.verify": {"required": ["params"]}})
    assert problems(doctor_server.check_forms(content, there)) == []
    monkeypatch.setattr(doctor_server, "form_schemas", lambda _: {"flows.verify.verify": {"required": []}})
    assert problems(doctor_server.check_forms(content, there)) == [
        "the forms of weekly on the server are not those of this version -> brainloom deploy"
    ]


@pytest.mark.full
def test_the_form_of_a_flow_is_made_apart_and_a_flow_that_is_not_there_is_said() -> None:
    schema = form_schemas(["flows.verify.verify"])["flows.verify.verify"]
    assert schema["required"] == ["params"]
    assert "VerifyParams" in schema["definitions"]
    with pytest.raises(FormError, match="the flows cannot be imported here: ModuleNotFoundError: No module named 'flo"):
        form_schemas(["flowers.verify.verify"])


def test_automations_that_are_missing_changed_or_off(server: tuple[str, Answers]) -> None:
    url, answers = server
    settings = Settings()
    answers |= {"block_documents/filter": [], "deployments/filter": [], "automations/filter": []}
    told = problems(doctor_server.check_automations(url, settings))
    assert [text.rsplit("' ", 1)[1] for text in told] == ["is missing -> brainloom deploy"] * 2
    there = [{**one, "id": str(k), "created": str(k), "enabled": True} for k, one in enumerate(wanted_of(url))]
    answers["automations/filter"] = there
    assert problems(doctor_server.check_automations(url, settings)) == []
    there[0]["enabled"] = False
    there[1]["trigger"] = {}
    told = problems(doctor_server.check_automations(url, settings))
    assert told[0].endswith("is switched off -> prefect automation resume --id 0")
    assert told[1].endswith("was changed -> brainloom deploy")


def wanted_of(url: str) -> list[dict[str, Any]]:
    return doctor_server.wanted_automations(url, Settings())


def test_many_failures_are_a_problem(server: tuple[str, Answers]) -> None:
    url, answers = server
    answers["flow_runs/count"] = 2
    assert problems(doctor_server.check_failures(url, Settings())) == []
    answers["flow_runs/count"] = 3
    (told,) = problems(doctor_server.check_failures(url, Settings()))
    assert told.startswith("3 flow runs failed or crashed within 60 min -> read them at http://127.0.0.1")
