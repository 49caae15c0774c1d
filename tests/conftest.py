"""Shared by all tests: a private environment set before Prefect is imported, servers on loopback, strict skips."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# pytest puts `tests/` first on sys.path, where the folders `infra`, `flows`, ... would pass for the packages.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from prefect_connection import connected

from infra.server import ServerInfo, stop_server, without_prefect
from infra.settings import Settings, private_environment

if TYPE_CHECKING:
    from demo_runs import DemoRun

THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
KEPT = ("BRAINLOOM_EXPECT_NO_SKIPS", "BRAINLOOM_SCREENSHOTS")
"""Variables of ours that are meant for the tests."""
DEMO_FILES = ("test_end_to_end.py", "test_browser.py")
"""Fast tests that use `tiny_demo`."""
LONG_FILES = ("test_ui.py", "test_compose_native.py", "test_demo_kill.py")
"""Full tests of several minutes each, and last by their names: one process would end minutes after the other."""
ALLOWED_SKIPS = (
    "needs a CUDA device",
    "needs the extra slurm",
    "needs the extra kubernetes",
    "needs network namespaces",
)
"""Starts of skip reasons that do not fail a run with BRAINLOOM_EXPECT_NO_SKIPS=1."""


def pytest_configure(config: pytest.Config) -> None:
    """Isolate the tests from the caller's Prefect profile, settings, credentials and thread counts."""
    home = tempfile.mkdtemp(prefix="brainloom-tests-")
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    kept = {name: value for name, value in without_prefect(os.environ).items() if _is_foreign_free(name)}
    os.environ.clear()
    os.environ.update(kept)
    os.environ.update(private_environment())
    os.environ.update(dict.fromkeys(THREAD_LIMITS, "1"))
    os.environ.update({"PREFECT_HOME": home, "MPLBACKEND": "Agg", "BRAINLOOM_STATE_DIR": f"{home}/state"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests of the demo, then with long ones: two processes share the tests, a file each."""
    items.sort(key=lambda item: (item.path.name not in DEMO_FILES, item.path.name not in LONG_FILES))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep a file's tests in one process, and all that share the demo.

    That is what `--dist loadgroup` is for; pytest 9.2 no longer lets xdist 3.8 mark the groups.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "demo" if Path(file).name in DEMO_FILES else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


def _is_foreign_free(name: str) -> bool:
    return name in KEPT or not name.startswith(("BRAINLOOM_", "AWS_", "FSSPEC_"))


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerInfo]:
    """Return one real Prefect server for the whole session; this process is connected to it."""
    settings = Settings(state_dir=tmp_path_factory.mktemp("prefect"))
    try:
        with connected(settings) as info:
            yield info
    finally:
        stop_server(settings)


@pytest.fixture(scope="session")
def tiny_demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoRun]:
    """Return the finished tiny demo, run once a session by the command line; its server runs until the end."""
    from demo_runs import run_demo

    folder = tmp_path_factory.mktemp("demo")
    try:
        yield run_demo(folder / "ws", folder / "state")
    finally:
        stop_server(Settings(state_dir=folder / "state"))


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return the environment of a real S3 server (SeaweedFS) on loopback, with the bucket `brainloom`."""
    from s3_server import S3Server

    server = S3Server(tmp_path_factory.mktemp("s3"))
    try:
        server.start()
        yield server.environment
    finally:
        server.kill()


@pytest.fixture
def s3_url(s3_endpoint: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Return an empty `s3://` folder on the real S3 server; its endpoint and keys are in the environment."""
    for name, value in s3_endpoint.items():
        monkeypatch.setenv(name, value)
    return f"s3://brainloom/{request.node.name.replace('[', '-').rstrip(']')}-{secrets.token_hex(4)}"


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.full)])
def root_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return an empty folder on disk and, in the full tests, on the real S3 server: the same test runs on both."""
    return str(tmp_path / "root") if request.param == "local" else request.getfixturevalue("s3_url")


@pytest.fixture
def store_url(root_url: str) -> str:
    """Return where a store may be made, on disk and on S3."""
    return f"{root_url}/s.zarr"


def unexpected_skip(reason: str) -> bool:
    """Say whether a skip must fail: where all tools are installed a skip hides a test that should have run."""
    return os.environ.get("BRAINLOOM_EXPECT_NO_SKIPS") == "1" and not reason.startswith(ALLOWED_SKIPS)


def _fail_unexpected_skip(report: Any) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        where = report.longrepr
        reason = where[2].removeprefix("Skipped: ") if isinstance(where, tuple) else str(where)
        if unexpected_skip(reason):
            report.outcome = "failed"
            report.longrepr = f"unexpected skip (BRAINLOOM_EXPECT_NO_SKIPS=1): {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Turn an unexpected skip of a test into a failure."""
    report = yield
    _fail_unexpected_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    """Turn an unexpected skip of a whole module into a failure."""
    report = yield
    _fail_unexpected_skip(report)
    return report
