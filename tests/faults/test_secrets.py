"""Secrets of S3, database, server and notifications are planted; the tiny chain runs; nothing left holds one."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from demo_runs import environment
from distributed import Client
from s3_server import BUCKET, S3Server, free_ports
from secret_hunt import CommandLines, Wire, files_below, objects_below, places_of

from infra import storage
from infra.api import request_json
from models.store import open_store
from tasks.phantom import TINY
from tasks.phantom.cohort import write_cohort
from tasks.splits import people_of, workspace_split

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
COHORT = TINY.replace(bids_subjects=16, datalist_subjects=0)
STORE = f"s3://{BUCKET}/work/store.zarr"
START_S = 120.0


@dataclass(frozen=True)
class Chain:
    """One finished chain: what was planted, and all that it left, by place."""

    secrets: Mapping[str, str]
    evidence: Mapping[str, bytes]


@contextmanager
def program(name: str, log: Path, variables: Mapping[str, str], *command: str) -> Iterator[None]:
    """Run a module through the entry point of our images; raises AssertionError when it ended by itself."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "infra.environments", sys.executable, "-m", *command],
            env=dict(variables),
            cwd=log.parent,
            stdout=output,
            stderr=output,
        )
        try:
            yield
            assert process.poll() is None, f"{name} ended: {log.read_text()[-3000:]}"
        finally:
            process.terminate()
            process.wait(30)


def wait_for_server(api_url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            if request_json(f"{api_url}/health", timeout_s=2.0) is True:
                return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"no Prefect server at {api_url}: {log.read_text()[-3000:]}")


def configs(folder: Path) -> dict[str, dict[str, object]]:
    """Return the parameters of the chain's flows: sources and store on S3, trainings and tables on disk."""
    source = {
        "kind": "bids",
        "dataset": COHORT.bids_name,
        "root": f"s3://{BUCKET}/sources/{COHORT.bids_name}",
        "label_scheme": "brats2023",
    }
    return {
        "ingest": {
            "catalog": {"sources": [source], "workspace": str(folder / "ws")},
            "preprocess": {"catalog": str(folder / "ws"), "store": STORE, "spec": "demo", "max_quarantined_share": 0.5},
        },
        "pretrain": {
            "workspace": str(folder / "ws"),
            "store": STORE,
            "recipe": "brainmvp_tiny",
            "epochs": 1,
            "ranks": 1,
            "stage_dir": str(folder / "stage"),
        },
        "evaluate": {
            "workspace": str(folder / "ws"),
            "pretrained": "brainmvp_tiny",
            "benchmarks": ["phantom-control"],
            "seeds": 1,
            "epochs": 1,
            "lanes": 1,
            "replicates": 200,
        },
    }


def copy_down(url: str, folder: Path) -> None:
    """Copy a store from S3 to disk: evaluations read the workspace's own."""
    for name in storage.find(url):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(storage.read_bytes(storage.join(url, name)))


def run_chain(folder: Path, variables: Mapping[str, str]) -> str:
    """Run deploy and the flows as people do, with the planted environment; return all that they wrote."""
    said = ""
    flows = configs(folder)
    for verb in ("deploy", *flows):
        config = folder / f"{verb}.yaml"
        config.write_text(yaml.safe_dump(flows.get(verb)))
        if verb == "pretrain":
            people = people_of(open_store(STORE).cases().to_pandas(), folder / "ws")
            workspace_split(folder / "ws", "default", STORE, people, (0.5, 0.15, 0.35))
        if verb == "evaluate":
            copy_down(STORE, folder / "ws" / "store.zarr")
        done = subprocess.run(
            [Path(sys.executable).with_name("brainloom"), verb, *(["-c", str(config)] if verb in flows else [])],
            env={**variables, "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "DEBUG", "PREFECT_LOGGING_LEVEL": "DEBUG"},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        said += done.stdout + done.stderr
        assert done.returncode == 0, f"{verb}: {said[-6000:]}"
    return said


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    folder = tmp_path_factory.mktemp("secrets")
    s3 = S3Server(tmp_path_factory.mktemp("s3"))
    ports = dict(zip(("api", "dask"), free_ports(2), strict=True))
    api_url = f"http://127.0.0.1:{ports['api']}/api"
    secrets = {
        "s3": s3.environment["AWS_SECRET_ACCESS_KEY"],
        "api": "planted-api-9f31c7",
        "database": "planted-database-5e2a44",
        "notification": "planted-notification-c08d1b",
    }
    variables = {
        **environment(folder / "state"),
        **s3.environment,
        "BRAINLOOM_API_AUTH": f"user:{secrets['api']}",
        "PREFECT_SERVER_DATABASE_PASSWORD": secrets["database"],
        "PREFECT_HOME": str(folder / "prefect"),
        "DASK_DISTRIBUTED__COMM__COMPRESSION": "False",
    }
    served = f"sqlite+aiosqlite:///{folder}/prefect/prefect.db"
    server = ["prefect", "server", "start", "--port", str(ports["api"])]
    with ExitStack() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        (folder / "prefect").mkdir()
        s3.start()
        running.callback(s3.kill)
        lines = running.enter_context(CommandLines())
        log = folder / "server.log"
        running.enter_context(program("server", log, {**variables, "BRAINLOOM_DATABASE_URL": served}, *server))
        wait_for_server(api_url, log)
        for path in write_cohort(COHORT, folder / "local").bids.rglob("*"):
            if path.is_file():
                storage.write_bytes(f"s3://{BUCKET}/sources/{path.relative_to(folder / 'local')}", path.read_bytes())
        variables |= {
            "BRAINLOOM_API_URL": api_url,
            "BRAINLOOM_NOTIFY_URL": f"http://127.0.0.1:9/hook/{secrets['notification']}",
        }
        dask = ["distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(ports["dask"])]
        dask += ["--dashboard-address", "127.0.0.1:0"]
        running.enter_context(program("scheduler", folder / "scheduler.log", variables, *dask))
        wire = running.enter_context(Wire(ports["dask"]))
        address = f"tcp://127.0.0.1:{wire.port}"
        work = ["distributed.cli.dask_worker", address, "--nthreads", "1", "--memory-limit", "3GiB"]
        work += ["--preload", "infra.worker", "--local-directory", str(folder / "dask"), "--host", "127.0.0.1"]
        with Client(f"tcp://127.0.0.1:{ports['dask']}", timeout=START_S, set_as_default=False) as client:
            running.enter_context(program("worker", folder / "worker.log", variables, *work))
            client.wait_for_workers(1, timeout=START_S)
        variables |= {"BRAINLOOM_CLUSTER": "address", "BRAINLOOM_CLUSTER_ADDRESS": address}
        said = run_chain(folder, variables)
        evidence = {
            "terminal": said.encode(),
            "command lines": "\n".join(sorted(lines.seen)).encode(),
            **dict(objects_below(f"s3://{BUCKET}/work")),
        }
        running.pop_all().close()
        yield Chain(secrets, {**evidence, "wire": wire.seen(), **dict(files_below(folder))})


def test_no_secret_is_left_anywhere(chain: Chain) -> None:
    assert places_of(chain.secrets, chain.evidence) == []


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("wire", "sub-0001"),
        ("wire", "preprocess_batch"),
        ("terminal", "preprocess: "),
        ("command lines", "models.train"),
        ("run.json", STORE),
        ("prefect.db (dump)", "pretrain brainmvp_tiny on store.zarr"),
        ("cases.parquet", "sub-0001"),
        ("receipts/", "sub-0001"),
        ("report/index.html", "phantom"),
        ("worker.log", "distributed"),
        ("server.log", "Configure Prefect"),
    ],
)
def test_the_search_reaches_what_is_there(chain: Chain, place: str, words: str) -> None:
    assert [name for name, data in chain.evidence.items() if place in name and words.encode() in data]
