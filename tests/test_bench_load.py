"""What happens under load is measured with tools that count right; a small load loses nothing on either database."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bench import load
from bench.catalog import write_cohort
from bench.growth import Growth, age, sizes, vacuum
from bench.postgres import program
from bench.watching import Watcher, errors_in, latency_table
from infra.server import ServerInfo
from infra.settings import Settings
from tasks.catalog import build_catalog, write_catalog


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Return a database with some tables of Prefect's; `flow_run` has one that ended this year."""
    path = tmp_path / "prefect.db"
    with contextlib.closing(sqlite3.connect(path)) as base, base:
        base.execute("CREATE TABLE flow_run (id TEXT, end_time TEXT)")
        base.execute("CREATE TABLE artifact (id INTEGER PRIMARY KEY, key TEXT, data TEXT)")
        base.execute("CREATE INDEX keys ON artifact (key)")
        base.execute("CREATE TABLE deployment (id TEXT)")
        base.execute("INSERT INTO flow_run VALUES ('a', '2026-11-22 10:00:00.123456'), ('b', NULL)")
    return path


def test_growth_tells_what_each_stage_added(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.growth.SETTLE_S", 0.0)
    growth = Growth(database)
    growth.note("start")
    with contextlib.closing(sqlite3.connect(database)) as base, base:
        base.executemany("INSERT INTO artifact (key, data) VALUES (?, ?)", [("qc", "x" * 100_000)] * 10)
    growth.note("a page")
    with contextlib.closing(sqlite3.connect(database)) as base, base:
        base.execute("DELETE FROM artifact")
    growth.note("retention")
    vacuum(database)
    growth.stages.append(("vacuum", sizes(database)))
    _, with_page, without, small = (size for _, size in growth.stages)
    assert with_page.kinds["artifacts"] > 1_000_000
    assert (with_page.kinds["other"], with_page.free) == (growth.stages[0][1].kinds["other"], 0)
    assert without.total == with_page.total
    assert without.free > 1_000_000
    assert small.total < 50_000
    lines = growth.table().splitlines()
    assert lines[0] == "| after | database | free in it | added | events | artifacts | logs | runs | other |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| start", "| a page", "| retention", "| vacuum"]
    assert [float(line.split(" | ")[5]) for line in lines[2:]] == pytest.approx([0.01, 1.0, -1.0, 0.0], abs=0.05)


def test_flow_runs_are_made_old_in_the_form_in_which_prefect_writes_times(database: Path) -> None:
    age(database, 100)
    with contextlib.closing(sqlite3.connect(database)) as base:
        assert base.execute("SELECT end_time FROM flow_run").fetchall() == [("2026-08-14 10:00:00.123000",), (None,)]


class Api(BaseHTTPRequestHandler):
    """Has one flow run, and is too busy for its logs."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(503 if self.path == "/api/logs/filter" else 200)
        self.end_headers()
        self.wfile.write(json.dumps([{"id": "one"}]).encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def api() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Api) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/api"
        server.shutdown()


def test_a_watcher_notes_latencies_and_refusals_by_route(api: str) -> None:
    watcher = Watcher(api)
    watcher.look()
    watcher.look()
    assert {route: len(seconds) for route, seconds in watcher.seconds.items()} == {
        "flow_runs/filter": 2,
        "task_runs/filter": 2,
        "artifacts/filter": 2,
        "logs/filter": 2,
    }
    assert watcher.refused == {"logs/filter: 503": 2}
    rows = latency_table({"x": watcher}).splitlines()[2:]
    assert [(row.split(" | ")[1], row.split(" | ")[-1]) for row in rows[-2:]] == [
        ("artifacts/filter", "0 |"),
        ("logs/filter", "2 |"),
    ]


def test_a_server_that_is_gone_is_counted() -> None:
    watcher = Watcher("http://127.0.0.1:9/api")
    watcher.look()
    assert watcher.refused == {"flow_runs/filter: ConnectError": 1}


def test_errors_of_a_server_are_counted_once(tmp_path: Path) -> None:
    locked = "sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) database is locked\n"
    told, again = "00:10:12.285 | ERROR   | prefect.server - Encountered", "ERROR:    Exception in ASGI application\n"
    answered = f"{told} retryable exception in request:\n{locked}{again}{locked}"
    failed = f"{told} exception in request:\nValueError\n{again}ValueError\n"
    log = tmp_path / "server.log"
    log.write_text(f"{2 * answered}{failed}00:10:13.285 | ERROR   | prefect.server.services - Failed:\n{locked}")
    assert errors_in(log) == {"503": 2, "500": 1, "locked": 1}


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("postgres", [False, True], ids=["sqlite", "postgresql"])
def test_flow_runs_that_start_at_once_all_end_well(postgres: bool, tmp_path: Path) -> None:
    if postgres and not program("initdb"):
        pytest.skip("needs PostgreSQL's server (Debian's postgresql)")
    with load.place(tmp_path, postgres, places=4) as where:
        found = load.measure(where, runs=len(load.MIX))
    assert found.whole, (found.states, found.wrong)
    assert found.watcher.seconds["flow_runs/filter"]
    assert found.errors["500"] == 0
    assert f"| x | {found.seconds:.0f} | {found.processor_s:.0f} | 4 of 4 | 0 | 0 |" in load.table({"x": found})


def test_what_a_load_left_is_compared_with_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = build_catalog(write_cohort(tmp_path / "cohort", 0.0))
    for name in ("ws", "ws-0"):
        write_catalog(catalog, str(tmp_path / name))
    digests = {"reference.zarr": "a", "3.zarr": "b", "4.zarr": "a"}
    monkeypatch.setattr(load, "store_digest", lambda url: digests[Path(url).name])
    (tmp_path / "sources.yaml").write_text("[]")
    where = load.Place(tmp_path, Settings(state_dir=tmp_path), ServerInfo("", "", None), None)
    wanted = [("catalog/catalog", 0), ("catalog/catalog", 1), ("verify/verify", 2)]
    wanted += [("preprocess/preprocess", 3), ("preprocess/preprocess", 4)]
    left, differs = load._wrong_results(where, wanted)
    assert left.startswith("catalog/catalog left nothing: ")
    assert differs == "the store of 3 differs from the reference"
