from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from infra import server
from infra.automations import ZOMBIES
from infra.server import ServerError, ServerInfo, ensure_server, request_json, server_status, stop_server
from infra.settings import Settings

ENSURE_TWICE_AT_ONCE = """
import sys, threading
from pathlib import Path
from infra.server import ensure_server
from infra.settings import Settings
found = []
threads = [
    threading.Thread(target=lambda: found.append(ensure_server(Settings(state_dir=Path(sys.argv[1]))).pid))
    for _ in range(2)
]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(*found, "prefect" in sys.modules)
"""


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    settings = Settings(state_dir=tmp_path)
    yield settings
    stop_server(settings)


@pytest.fixture
def other_api() -> Iterator[str]:
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/health" else 404)
            self.end_headers()
            self.wfile.write(b"true")

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"[]")  # no automation is there, and one is made

        def log_message(self, *_: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Healthy) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/api"
        httpd.shutdown()


def test_start_reuse_restart_on_the_same_port_and_stop(settings: Settings) -> None:
    # Four callers in two processes start one server, and Prefect is not imported for it.
    command = [sys.executable, "-c", ENSURE_TWICE_AT_ONCE, str(settings.state_dir)]
    callers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lines = [caller.communicate(timeout=120)[0].split() for caller in callers]
    pids = {word for line in lines for word in line[:-1]}
    assert [line[-1] for line in lines] == ["False", "False"]
    assert len(pids) == 1
    info = ensure_server(settings)
    assert info == server_status(settings)
    assert info.pid == int(pids.pop())
    assert info.api_url.startswith("http://127.0.0.1:")

    # It listens on loopback alone, and lives in the home that it was given.
    listening = [c.laddr.ip for c in psutil.Process(info.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert set(listening) == {"127.0.0.1"}
    assert (settings.server_dir / "prefect.db").exists()
    seen = psutil.Process(info.pid).environ()
    assert (seen["PREFECT_SERVER_ANALYTICS_ENABLED"], seen["DO_NOT_TRACK"]) == ("false", "1")

    (automation,) = request_json(f"{info.api_url}/automations/filter", {})
    assert automation["name"] == ZOMBIES
    assert (automation["enabled"], automation["trigger"]["within"]) == (True, 540.0)
    # As a start leaves it that was killed before: the next one makes it.
    request_json(f"{info.api_url}/automations/{automation['id']}", method="DELETE")
    assert ensure_server(settings) == info
    assert [one["name"] for one in request_json(f"{info.api_url}/automations/filter", {})] == [ZOMBIES]

    assert settings.server_dir.stat().st_mode & 0o777 == 0o700, "the database has the key of its blocks"
    assert stop_server(settings) is True
    assert server_status(settings) is None
    assert stop_server(settings) is False


def test_a_former_port_that_is_taken_is_told(
    other_api: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings.server_dir.mkdir()
    (settings.server_dir / "server.json").write_text(json.dumps({"api_url": other_api}))
    monkeypatch.setattr(server, "_start", lambda *_: None)
    monkeypatch.setattr(server, "_wait_until_healthy", lambda *_: True)
    monkeypatch.setattr(server, "ensure_automation", lambda *_: None)
    info = ensure_server(settings)
    former, port = (url.removesuffix("/api").rsplit(":", 1)[1] for url in (other_api, info.api_url))
    assert caplog.messages == [f"port {former} is taken by another program: the server uses {port} from now on"]


def test_a_server_that_does_not_come_up_is_reported_with_its_log(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false-python")
    with pytest.raises(ServerError, match=r"did not answer at .*/health within .*server\.log ends with:\n.*not found"):
        ensure_server(settings)
    assert server_status(settings) is None


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"api_url": "http://127.0.0.1/api"}'])
def test_a_broken_server_file_is_no_server(settings: Settings, content: str) -> None:
    settings.server_dir.mkdir()
    (settings.server_dir / "server.json").write_text(content)
    assert server_status(settings) is None
    assert stop_server(settings) is False


def test_a_given_server_is_used_and_never_stopped(other_api: str, tmp_path: Path) -> None:
    settings = Settings(api_url=other_api, state_dir=tmp_path)
    assert ensure_server(settings) == ServerInfo(other_api, other_api.removesuffix("/api"), None)
    assert server_status(settings) is not None
    assert stop_server(settings) is False
    assert list(tmp_path.iterdir()) == []


def test_a_given_server_that_does_not_answer_is_an_error() -> None:
    with pytest.raises(ServerError, match=r"no Prefect server answers at http://127\.0\.0\.1:9/api.*BRAINLOOM_API_URL"):
        ensure_server(Settings(api_url="http://127.0.0.1:9/api"))


def test_a_taken_port_is_replaced() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert server._free_port(port) not in {0, port}
    assert server._free_port(port) == port


def test_the_environment_of_children_has_no_foreign_prefect_setting(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    monkeypatch.setenv("PREFECT_API_KEY", "secret of the caller")
    monkeypatch.setenv("PREFECT_PROFILE", "cloud")
    monkeypatch.setenv("NO_PROXY", "example.org")
    info = ServerInfo("http://127.0.0.1:1/api", "http://127.0.0.1:1", 1)
    environment = server.child_environment(settings, info)
    assert "PREFECT_API_KEY" not in environment
    assert "PREFECT_PROFILE" not in environment
    assert environment["PREFECT_HOME"] == str(settings.server_dir)
    assert environment["PREFECT_API_URL"] == info.api_url
    assert environment["NO_PROXY"] == "127.0.0.1,example.org,localhost"
    other = server.child_environment(Settings(api_url="https://prefect.example/api"), info)
    assert other["PREFECT_API_KEY"] == "secret of the caller"


CONNECT = """
import json, os, sys
from infra.settings import Settings
if sys.argv[2] == "late":
    import prefect.context
from infra.server import connect
info = connect(Settings())
from prefect.settings import get_current_settings
print(json.dumps([get_current_settings().api.url, str(get_current_settings().home), os.environ.get("PREFECT_API_KEY")]))
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_connect_points_prefect_at_the_server(other_api: str, tmp_path: Path, when: str) -> None:
    # The pretended server passes for our own: its address is recorded beside the pid of a living marked process.
    home = tmp_path / "server"
    home.mkdir()
    (home / "server.json").write_text(json.dumps({"api_url": other_api}))
    stand_in = subprocess.Popen(
        [sys.executable, "-c", "input()", f"brainloom-server={home}"], stdin=subprocess.PIPE, start_new_session=True
    )
    (home / "server.pid").write_text(str(stand_in.pid))
    environment = {**os.environ, "BRAINLOOM_STATE_DIR": str(tmp_path), "PREFECT_API_KEY": "secret"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", CONNECT, "x", when], env=environment, capture_output=True, text=True, check=True
        )
    finally:
        stand_in.kill()
        stand_in.communicate()
    assert json.loads(done.stdout) == [other_api, str(home), None]


def test_connect_refuses_pinned_settings(other_api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setattr(os, "environ", os.environ.copy())
    pinned = temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"})
    with pinned, pytest.raises(ServerError, match=r"already in use with API http://127\.0\.0\.1:1/api"):
        server.connect(Settings(api_url=other_api))
