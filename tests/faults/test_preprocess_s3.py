"""A real S3 server that is killed, slow, full or denies: retried, or a clear error, and never half a case."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nifti_files import SMALL, write_dataset
from s3_server import BUCKET, Answer, S3Proxy, S3Server
from store_builds import catalog_of, ingest

from flows.preprocess import PreprocessError, PreprocessParams, preprocess
from infra import storage
from infra.storage import StorageError
from models import records
from models.spec import SPECS
from models.store import StoreError, open_store, store_digest
from tasks.lease import Lease
from tasks.verify import verify

pytestmark = pytest.mark.full
CASES = 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Return a server of our own: it is killed."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    """Return a proxy before the server; this process and its workers see nothing else."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    with S3Proxy(server) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        yield proxy
    S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[records.Scan]:
    return write_dataset(tmp_path_factory.mktemp("sources"), CASES, labels=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, sources: list[records.Scan]) -> str:
    """Return the digest of the same store on disk."""
    url = str(tmp_path_factory.mktemp("undisturbed") / "s.zarr")
    ingest(url, sources)
    return store_digest(url)


@pytest.fixture
def run(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    proxy: S3Proxy,
    sources: list[records.Scan],
    prefect_server: object,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[], tuple[str, str]]:
    """Return what runs the flow into one store on S3, and gives the store's URL and the digest."""
    monkeypatch.setitem(SPECS, "small", SMALL)
    url = f"s3://{BUCKET}/{request.node.name}/s.zarr"
    catalog = catalog_of(tmp_path / "ws", sources)
    params = PreprocessParams(catalog=catalog, store=url, spec="small", case_batch=2, workers=1)

    def start() -> tuple[str, str]:
        return url, preprocess(params)["digest"]

    return start


def is_voxels(path: str) -> bool:
    return "/image/c/" in path


def test_a_server_that_is_killed_in_mid_run_and_comes_back(
    run: Callable[[], tuple[str, str]], proxy: S3Proxy, server: S3Server, undisturbed: str
) -> None:
    written, refused = itertools.count(1), itertools.count(1)
    away = threading.Event()
    back = threading.Thread(target=server.start)

    def fault(method: str, path: str) -> Answer | None:
        if not away.is_set() and method == "PUT" and "/receipts/" in path and next(written) == 3:
            away.set()
            server.kill()
        if away.is_set() and back.ident is None and next(refused) == 4:
            back.start()
        return None

    proxy.fault = fault
    url, digest = run()
    back.join()
    assert away.is_set()
    assert digest == undisturbed
    assert verify(url, deep=True) == []


def test_a_slow_server_that_loses_requests_and_answers(
    run: Callable[[], tuple[str, str]], proxy: S3Proxy, undisturbed: str, capfd: pytest.CaptureFixture[str]
) -> None:
    numbers = itertools.count(1)
    never = threading.Event()

    def fault(method: str, path: str) -> Answer | None:
        number = next(numbers)
        never.wait(0.03)  # how slow it is
        if number % 13 == 0:
            return Answer()
        if number % 17 == 0:
            return Answer(after=True)
        return Answer(503, "SlowDown") if number % 29 == 0 else None

    proxy.fault = fault
    url, digest = run()
    assert digest == undisturbed
    proxy.fault = lambda method, path: None
    assert verify(url, deep=True) == []

    # Two flows on one store: the second is refused.
    with Lease(url, "nightly ingest"), pytest.raises(StoreError, match="is being written by 'nightly ingest'"):
        run()
    secret = proxy.environment["AWS_SECRET_ACCESS_KEY"]
    assert secret not in "".join(capfd.readouterr())
    assert places_of(secret, url) == []


def places_of(secret: str, url: str) -> list[str]:
    """Return the objects of the store and the files of the Prefect server (database, logs) that hold a text."""
    objects = [storage.join(url, name) for name in storage.find(url)]
    home = [str(path) for path in Path(os.environ["PREFECT_HOME"]).rglob("*") if path.is_file()]
    assert any(name.endswith(".db") for name in home)
    return [place for place in [*objects, *home] if secret.encode() in storage.read_bytes(place)]


def test_a_full_bucket(run: Callable[[], tuple[str, str]], proxy: S3Proxy, undisturbed: str) -> None:
    written = itertools.count()

    def fault(method: str, path: str) -> Answer | None:
        full = method == "PUT" and is_voxels(path) and next(written) >= 3
        return Answer(507, "InsufficientStorage") if full else None

    proxy.fault = fault
    with pytest.raises(
        PreprocessError, match=r"case batches failed, 3 cases are stored and stay.*could not write s3://.*it is full"
    ):
        run()
    url = f"s3://{BUCKET}/test_a_full_bucket/s.zarr"
    left = verify(url, deep=True)
    assert len(left) == 5
    assert all(problem.endswith("neither stored nor in quarantine; preprocess again") for problem in left)
    assert {line["status"] for line in open_store(url).cases().to_pylist()} == {"stored"}
    proxy.fault = lambda method, path: None
    assert run() == (url, undisturbed)
    assert verify(url, deep=True) == []


def test_a_bucket_that_is_full_before_anything_is_published(run: Callable[[], tuple[str, str]], proxy: S3Proxy) -> None:
    proxy.fault = lambda method, path: Answer(403, "QuotaExceeded") if method == "PUT" else None
    with pytest.raises(StorageError, match=r"could not write s3://.*s\.zarr/zarr\.json.*it is full: make room"):
        run()


def test_wrong_credentials(run: Callable[[], tuple[str, str]], proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(StorageError, match=r"could not look up s3://.*check AWS_ACCESS_KEY_ID") as caught:
        run()
    assert "not-the-secret" not in str(caught.value)


def test_a_bucket_that_is_not_there(proxy: S3Proxy) -> None:
    # The server makes buckets on demand, Amazon's does not.
    proxy.fault = lambda method, path: Answer(404, "NoSuchBucket")
    with pytest.raises(StorageError, match=r"could not write s3://nowhere/x: .*make the bucket first"):
        storage.write_bytes("s3://nowhere/x", b"x")


def test_no_credentials(proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    with pytest.raises(StorageError, match=r"could not write s3://.*set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        storage.write_bytes(f"s3://{BUCKET}/x", b"x")


def test_a_server_that_never_answers(proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "READ_TIMEOUT_S", 0.2)
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    released = threading.Event()

    def fault(method: str, path: str) -> Answer | None:
        released.wait()
        return None

    proxy.fault = fault
    try:
        with pytest.raises(StorageError, match=r"could not read s3://.*2 tries: see that 127.0.0.1:\d+ answers"):
            storage.read_bytes(f"s3://{BUCKET}/ready")
    finally:
        released.set()
