from __future__ import annotations

import concurrent.futures
import pickle
from pathlib import Path

import numpy as np
import pytest
import zarr

from infra import storage


@pytest.fixture
def root(root_url: str) -> str:
    return root_url


def test_bytes_round_trip_and_replace(root: str) -> None:
    url = storage.join(root, "a", "b.bin")
    assert not storage.exists(url)
    storage.write_bytes(url, b"one")
    storage.write_bytes(url, b"two")
    assert storage.exists(url)
    assert storage.read_bytes(url) == b"two"
    assert storage.listdir(storage.join(root, "a")) == ["b.bin"]
    assert storage.listdir(root) == ["a"]


def test_absent_objects(root: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "nothing"))
    assert storage.listdir(storage.join(root, "nowhere")) == []
    assert storage.find_or_empty(storage.join(root, "nowhere")) == {}
    storage.delete(storage.join(root, "nothing"))


def test_create_exclusive_refuses_a_second_creation(root: str) -> None:
    url = storage.join(root, "lease")
    assert storage.create_exclusive(url, b"first") is True
    assert storage.create_exclusive(url, b"second") is False
    assert storage.read_bytes(url) == b"first"
    assert storage.listdir(root) == ["lease"]


def test_create_exclusive_has_one_winner(root: str) -> None:
    url = storage.join(root, "lease")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: storage.create_exclusive(url, b"%d" % n), range(8)))
    assert won.count(True) == 1
    assert storage.read_bytes(url) == b"%d" % won.index(True)


def test_delete_removes_a_folder_and_spares_its_neighbour(root: str) -> None:
    for name in ("case/1", "case/2/deep", "case-other"):
        storage.write_bytes(storage.join(root, name), b"x")
    storage.delete(storage.join(root, "case"))
    assert storage.listdir(root) == ["case-other"]


def test_json(root: str) -> None:
    url = storage.join(root, "x.json")
    storage.write_json(url, {"a": [1, 2.5]})
    assert storage.read_json(url) == {"a": [1, 2.5]}
    with pytest.raises(ValueError, match="JSON compliant"):
        storage.write_json(url, {"a": float("inf")})
    storage.write_bytes(url, b"{")
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON"):
        storage.read_json(url)


def test_zarr_store_round_trip(root: str) -> None:
    url = storage.join(root, "x.zarr")
    group = zarr.create_group(storage.zarr_store(url, "w"))
    array = group.create_array("image", shape=(2, 8, 8), shards=(1, 8, 8), chunks=(1, 4, 4), dtype="f4")
    array[1] = np.arange(64).reshape(8, 8)
    store = pickle.loads(pickle.dumps(storage.zarr_store(url, "r")))
    again = zarr.open_group(store, mode="r")["image"]
    assert np.array_equal(again[1], np.arange(64).reshape(8, 8))
    assert not np.any(again[0])
    with pytest.raises(ValueError, match="read-only"):
        zarr.open_group(storage.zarr_store(url, "r"), mode="a").create_array("y", shape=(1,), dtype="f4")


def test_no_temporary_file_is_left_when_a_write_fails(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        storage.write_bytes(tmp_path / "folder", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_file_url_is_the_path(tmp_path: Path) -> None:
    storage.write_bytes(f"file://{tmp_path}/a%20b", b"x")
    assert storage.read_bytes(tmp_path / "a b") == b"x"
    assert storage.is_local(tmp_path)


@pytest.mark.parametrize("part", ["/etc/passwd", "../x", "a/../../x"])
def test_join_refuses_to_leave_the_root(part: str) -> None:
    with pytest.raises(ValueError, match="leaves its root"):
        storage.join("s3://bucket/root", part)


def test_join() -> None:
    assert storage.join("s3://b/x/", "y/", "z") == "s3://b/x/y/z"
    assert storage.join("/tmp", "y") == "/tmp/y"


@pytest.mark.parametrize(
    ("url", "text"), [("ftp://host/x", "scheme must be file or s3"), ("s3:///key", "names no bucket")]
)
def test_bad_urls(url: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        storage.filesystem(url)


@pytest.mark.parametrize("scheme", ["s3", "file", "http"])
def test_user_info_in_a_url_is_refused_and_not_repeated(scheme: str) -> None:
    url = f"{scheme}://KEY:SECRET@bucket/x"
    for call in (storage.filesystem, storage.local_path, storage.read_bytes, lambda url: storage.join(url, "..")):
        with pytest.raises(ValueError, match=r"has user info before its bucket or host .*AWS_ACCESS_KEY_ID") as caught:
            call(url)
        assert "KEY:" not in str(caught.value)
        assert "SECRET@" not in str(caught.value)
    assert storage.filesystem("s3://bucket/a@b")[1] == "bucket/a@b"
    assert storage.is_local("/data/me:x@y/z")


@pytest.mark.parametrize("name", storage.ENDPOINT_VARIABLES)
def test_user_info_in_the_endpoint_is_refused_and_not_repeated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "http://me:hunter2@127.0.0.1:9")
    with pytest.raises(ValueError, match=f"{name} holds user info .* give scheme, host and port alone") as caught:
        storage.read_bytes("s3://bucket/x")
    assert "hunter2" not in str(caught.value)


def test_advice_names_the_host_of_the_endpoint_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", "https://s3.lan:9000/tenant?token=hunter2")

    def refused() -> None:
        with storage.explained("read", "s3://bucket/x"):
            raise ConnectionRefusedError("no")

    with pytest.raises(storage.StorageError, match=r"8 tries: see that s3\.lan:9000 answers, then start again"):
        refused()


def test_roots_are_not_deleted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refusing to delete the root"):
        storage.delete("/")
    with pytest.raises(ValueError, match="refusing to delete the bucket"):
        storage.delete("s3://bucket")


@pytest.mark.full
def test_a_dead_endpoint_fails_with_the_url_and_without_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    with pytest.raises(storage.StorageError, match="could not read s3://bucket/x") as caught:
        storage.read_bytes("s3://bucket/x")
    assert "very-secret" not in str(caught.value)


@pytest.mark.full
def test_denied_credentials_fail_with_the_url(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(storage.StorageError, match=f"could not write {s3_url}/x: PermissionError"):
        storage.write_bytes(storage.join(s3_url, "x"), b"x")
    S3FileSystem.clear_instance_cache()
