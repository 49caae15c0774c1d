"""Our own Prefect server: started detached on loopback, found again, stopped; or somebody else's, by `api_url`.

Works before Prefect is imported: Prefect reads its settings when it is imported, and without `PREFECT_API_URL` it
would silently start a private temporary server whose runs nobody ever sees.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from infra.api import request_json
from infra.automations import ensure_automation, zombie_automation
from infra.detached import Detached
from infra.environments import api_environment, export_storage, server_environment, storage_environment
from infra.log_lines import log_environment
from infra.settings import Settings, private_environment
from infra.storage import write_json

START_TIMEOUT_S = 120.0
HEARTBEAT_S = 30
_log = logging.getLogger(__name__)
_CREDENTIALS = ("PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH")


class ServerError(RuntimeError):
    """The Prefect server did not come up, or cannot be reached."""


@dataclass(frozen=True)
class ServerInfo:
    """A live Prefect server."""

    api_url: str
    ui_url: str
    pid: int | None
    """Leader of the server's own process group; None when the server is not ours."""


def ensure_server(settings: Settings, timeout_s: float = START_TIMEOUT_S) -> ServerInfo:
    """Return the live server, starting our own when none runs; safe to call from several processes at once.

    Raises ServerError with the end of the server's log when it does not answer within `timeout_s` seconds, or naming
    the address when `settings.api_url` does not answer, or when our own server is to ask for a password.
    """
    if settings.api_url:
        os.environ.update(api_environment(settings))
        if not _healthy(settings.api_url):
            raise ServerError(
                f"no Prefect server answers at {settings.api_url} (asked {settings.api_url}/health); "
                "start it, or unset BRAINLOOM_API_URL to use the embedded one"
            )
        return _info(settings.api_url, None)
    if settings.api_auth:
        raise ServerError(
            "BRAINLOOM_API_AUTH is set without BRAINLOOM_API_URL: our own server binds to loopback and asks for no "
            "password; unset it, or run a server with authentication (docs/compose.md)"
        )
    process = _process(settings)
    with process.lock():
        if process.pid() is not None:
            # Perhaps another process was killed while it waited for the server that it had started.
            api_url = _recorded_url(settings)
            if api_url and _wait_until_healthy(process, api_url, timeout_s):
                ensure_automation(api_url, zombie_automation())
                return _info(api_url, process.pid())
            process.stop()
        former = _recorded_port(settings)
        port = _free_port(former)
        if former and port != former:
            _log.warning("port %d is taken by another program: the server uses %d from now on", former, port)
        api_url = f"http://127.0.0.1:{port}/api"
        write_json(settings.server_dir / "server.json", {"api_url": api_url})
        _start(settings, process, api_url)
        if not _wait_until_healthy(process, api_url, timeout_s):
            process.stop()
            raise ServerError(
                f"the Prefect server did not answer at {api_url}/health within {timeout_s:.0f} s; "
                f"its log {process.log} ends with:\n{process.log_tail()}"
            )
        ensure_automation(api_url, zombie_automation())
        return _info(api_url, process.pid())


def server_status(settings: Settings) -> ServerInfo | None:
    """Return the live server, or None when it does not run or does not answer."""
    if settings.api_url:
        os.environ.update(api_environment(settings))
        return _info(settings.api_url, None) if _healthy(settings.api_url) else None
    pid, api_url = _process(settings).pid(), _recorded_url(settings)
    return _info(api_url, pid) if pid and api_url and _healthy(api_url) else None


def stop_server(settings: Settings) -> bool:
    """Stop our own server and wait until all its processes ended; False when it was not running.

    A server given by `api_url` is never touched.
    """
    process = _process(settings)
    if settings.api_url or not settings.server_dir.exists():
        return False
    with process.lock():
        return process.stop()


def connect(settings: Settings) -> ServerInfo:
    """Ensure the server and point this process and its children at it through the environment.

    Call it before Prefect is imported. When Prefect was imported earlier its settings are read again; raises
    ServerError when they are pinned to another API (inside `temporary_settings` or a flow run).
    """
    info = ensure_server(settings)
    if settings.api_url is None:
        for name in _CREDENTIALS:
            os.environ.pop(name, None)
    os.environ.update(client_environment(settings, info))
    export_storage(settings)
    if "prefect" in sys.modules:
        _refresh_prefect(info.api_url)
    return info


def client_environment(settings: Settings, info: ServerInfo) -> dict[str, str]:
    """Return what a Prefect client, worker or flow run needs in its environment to talk to this server only."""
    environment = {
        **private_environment(),
        **log_environment(settings.log),
        "PREFECT_API_URL": info.api_url,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
        **api_environment(settings),
        **storage_environment(settings),
    }
    if settings.api_url is None:
        proxy_free = {*os.environ.get("NO_PROXY", "").split(","), "127.0.0.1", "localhost"} - {""}
        environment |= {"PREFECT_HOME": str(settings.server_dir), "NO_PROXY": ",".join(sorted(proxy_free))}
    return environment


def child_environment(settings: Settings, info: ServerInfo) -> dict[str, str]:
    """Return a child's whole environment: ours without foreign Prefect settings, and the client's."""
    kept = dict(os.environ) if settings.api_url else without_prefect(os.environ)
    return {**kept, **client_environment(settings, info)}


def without_prefect(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without any `PREFECT_*` variable: the caller's profile and keys stay the caller's."""
    return {name: value for name, value in environment.items() if not name.startswith("PREFECT_")}


def _process(settings: Settings) -> Detached:
    # The home on the command line tells our server from every other one; Prefect ignores the variable's value there.
    return Detached(settings.server_dir, "server", marker=_marker(settings))


def _marker(settings: Settings) -> str:
    return f"brainloom-server={settings.server_dir}"


def _start(settings: Settings, process: Detached, api_url: str) -> None:
    port = api_url.removesuffix("/api").rsplit(":", 1)[1]
    environment = {
        **without_prefect(os.environ),
        **private_environment(),
        "PREFECT_HOME": str(settings.server_dir),
        "PREFECT_API_URL": api_url,
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": port,
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events",
        "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": "P7D",
    }
    environment |= server_environment(settings)
    program = "import sys; from prefect.cli import app; sys.argv = ['prefect', *sys.argv[2:]]; "
    program += "from infra.sqlite_turns import take_turns; take_turns(); app()"
    command = [sys.executable, "-c", program, _marker(settings), "server", "start", "--host", "127.0.0.1"]
    process.start([*command, "--port", port], environment)


def _wait_until_healthy(process: Detached, api_url: str, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while process.pid() is not None and time.monotonic() < deadline:
        if _healthy(api_url):
            return True
        time.sleep(0.2)
    return False


def _healthy(api_url: str) -> bool:
    try:
        return request_json(f"{api_url}/health", timeout_s=5.0) is True
    except (OSError, ValueError):
        return False


def _info(api_url: str, pid: int | None) -> ServerInfo:
    return ServerInfo(api_url=api_url, ui_url=api_url.removesuffix("/api"), pid=pid)


def _recorded_url(settings: Settings) -> str | None:
    try:
        return str(json.loads((settings.server_dir / "server.json").read_text())["api_url"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _recorded_port(settings: Settings) -> int:
    digits = (_recorded_url(settings) or "").removesuffix("/api").rsplit(":", 1)[-1]
    return int(digits) if digits.isdigit() else 0


def _free_port(wanted: int) -> int:
    """Return the wanted port when it is free (bookmarks keep working), else a free one."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ServerError("no free port on 127.0.0.1")


def _refresh_prefect(api_url: str) -> None:
    from prefect.context import refresh_global_settings_context
    from prefect.settings import get_current_settings

    refresh_global_settings_context()
    if (current := get_current_settings().api.url) != api_url:
        raise ServerError(
            f"Prefect is already in use with API {current}, wanted {api_url}; "
            "call infra.server.connect before any flow runs and outside of temporary_settings"
        )
