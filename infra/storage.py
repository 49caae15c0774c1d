"""A URL becomes a filesystem, a Zarr store or bytes: one place for time-outs, retries and S3 options.

Local paths (plain or `file://`) and `s3://bucket/path` are known. S3 is configured by the environment alone:
`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, and `FSSPEC_S3_ENDPOINT_URL` or `AWS_ENDPOINT_URL` for servers that
are not Amazon's. No credential passes through an argument, so none can reach a log, a parameter or the store.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import fsspec

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30
ATTEMPTS = 4
ZARR_TIMEOUT_S = 600.0
"""Bound of one Zarr call on S3: zarr's own default is to wait for ever for a dead endpoint."""
ZARR_S3_CONCURRENCY = 32
ENDPOINT_VARIABLES = ("FSSPEC_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")

Mode = Literal["r", "r+", "a", "w", "w-"]


class StorageError(OSError):
    """A storage call failed after its retries; the message names the URL and the cause."""


def is_local(url: str | os.PathLike[str]) -> bool:
    """Say whether a URL is a path of this machine; raises ValueError for a scheme that is neither file nor s3."""
    scheme = urlsplit(os.fspath(url)).scheme
    if scheme not in {"", "file", "s3"}:
        raise ValueError(f"storage URL {os.fspath(url)!r}: the scheme must be file or s3, got {scheme!r}")
    return scheme != "s3"


def local_path(url: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a local URL; raises ValueError for an S3 one."""
    if not is_local(url):
        raise ValueError(f"storage URL {os.fspath(url)!r} is not a path of this machine")
    text = os.fspath(url)
    return Path(unquote(urlsplit(text).path) if text.startswith("file:") else text).absolute()


def s3_options() -> dict[str, Any]:
    """Return s3fs options: time-outs, retries, no listing cache (another process may write), the endpoint if set."""
    endpoint = next((os.environ[name] for name in ENDPOINT_VARIABLES if os.environ.get(name)), None)
    return {
        "use_listings_cache": False,
        "config_kwargs": {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"mode": "standard", "max_attempts": ATTEMPTS},
        },
        **({"endpoint_url": endpoint} if endpoint else {}),
    }


def filesystem(url: str | os.PathLike[str]) -> tuple[Any, str]:
    """Return the fsspec filesystem of a URL and the path inside it."""
    if is_local(url):
        return fsspec.filesystem("file"), str(local_path(url))
    parts = urlsplit(os.fspath(url))
    if not parts.netloc:
        raise ValueError(f"storage URL {os.fspath(url)!r} names no bucket; write s3://bucket/path")
    return fsspec.filesystem("s3", **s3_options()), f"{parts.netloc}{parts.path}".rstrip("/")


def zarr_store(url: str | os.PathLike[str], mode: Mode = "r") -> Any:
    """Return a zarr store for a URL, read-only for mode `r`.

    On S3 zarr's time-out and concurrency are set for this process; the Rust codec pipeline serves local stores only.
    """
    from zarr.storage import FsspecStore, LocalStore

    if is_local(url):
        return LocalStore(local_path(url), read_only=mode == "r")
    import zarr

    zarr.config.set({"async.timeout": ZARR_TIMEOUT_S, "async.concurrency": ZARR_S3_CONCURRENCY})
    filesystem(url)  # refuses a URL without a bucket
    return FsspecStore.from_url(os.fspath(url).rstrip("/"), storage_options=s3_options(), read_only=mode == "r")


def join(url: str | os.PathLike[str], *parts: str) -> str:
    """Append parts to a URL. A part that is absolute or climbs with `..` is refused with ValueError."""
    for part in parts:
        path = PurePosixPath(part)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"path {part!r} leaves its root {os.fspath(url)!r}; give a relative path without '..'")
    return "/".join([os.fspath(url).rstrip("/") or "/", *(part.strip("/") for part in parts if part)])


def read_bytes(url: str | os.PathLike[str]) -> bytes:
    """Return a whole object; raises FileNotFoundError when it is absent."""
    fs, path = filesystem(url)
    with _named("read", url):
        return bytes(fs.cat_file(path))


def write_bytes(url: str | os.PathLike[str], data: bytes) -> None:
    """Write a whole object, or nothing: readers see the old or the new bytes, also after a power cut."""
    with _named("write", url):
        if not is_local(url):
            fs, path = filesystem(url)
            fs.pipe_file(path, data)
            return
        target = local_path(url)
        temporary = _synced_temporary(target, data)
        try:
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)


def create_exclusive(url: str | os.PathLike[str], data: bytes) -> bool:
    """Create an object with these bytes unless it exists; of several callers exactly one gets True at most.

    On S3 a creation whose answer was lost is retried and then reported as False: put a token of your own into the
    data and compare it when that matters.
    """
    with _named("create", url):
        if not is_local(url):
            fs, path = filesystem(url)
            try:
                fs.pipe_file(path, data, mode="create")
            except OSError as error:
                if _precondition_failed(error):
                    return False
                raise
            return True
        target = local_path(url)
        temporary = _synced_temporary(target, data)
        try:
            # A link is atomic and refuses an existing name, so no reader ever sees a half-written object.
            os.link(temporary, target)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)
        return True


def exists(url: str | os.PathLike[str]) -> bool:
    """Say whether an object or folder is there."""
    fs, path = filesystem(url)
    with _named("look up", url):
        return bool(fs.exists(path))


def listdir(url: str | os.PathLike[str]) -> list[str]:
    """Return the sorted names in a folder; a folder that is not there is an empty one."""
    fs, path = filesystem(url)
    with _named("list", url):
        try:
            found = fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
    # S3 keeps an empty object of the folder's own name for folders made by some tools.
    return sorted({str(name).rstrip("/").rsplit("/", 1)[-1] for name in found if str(name).rstrip("/") != path})


def find(url: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Return every file below a folder: path relative to it -> entry of fsspec's listing (size, ETag on S3, links).

    On S3 this is one request per 1,000 objects. Raises FileNotFoundError when nothing is there.
    """
    fs, path = filesystem(url)
    with _named("list", url):
        # An object of the same name would be listed as if it were the folder's only file.
        if not fs.isdir(path):
            raise FileNotFoundError(f"{os.fspath(url)} is not a folder")
        entries = fs.find(path, detail=True)
    return {name[len(path) :].lstrip("/"): info for name, info in entries.items() if not name.endswith("/")}


def delete(url: str | os.PathLike[str]) -> None:
    """Delete an object or a folder with all in it; what is absent is no error. A root or a bucket is refused."""
    if is_local(url):
        path = local_path(url)
        if path == Path(path.anchor):
            raise ValueError(f"refusing to delete the root {path}")
        with _named("delete", url):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        return
    fs, key = filesystem(url)
    if "/" not in key:
        raise ValueError(f"refusing to delete the bucket {key!r}; name a path inside it")
    with _named("delete", url):
        try:
            keys = fs.find(key)
            fs.rm(key, recursive=True)
        except FileNotFoundError:
            return
        if keys and fs.exists(key):
            _delete_folder_markers(fs, key, keys)


def read_json(url: str | os.PathLike[str]) -> Any:
    """Return the JSON value of an object; raises ValueError naming the URL when it is no JSON."""
    data = read_bytes(url)
    try:
        return json.loads(data)
    except ValueError as error:
        raise ValueError(f"{os.fspath(url)} is not valid JSON: {error}") from error


def write_json(url: str | os.PathLike[str], value: Any) -> None:
    """Write a value as indented JSON; NaN and infinities are refused with ValueError."""
    write_bytes(url, json.dumps(value, indent=1, allow_nan=False).encode() + b"\n")


def _precondition_failed(error: OSError) -> bool:
    """Say whether S3 refused a conditional creation. s3fs gives an OSError with the answer as its cause."""
    answer = getattr(error.__cause__, "response", {})
    return isinstance(error, FileExistsError) or answer.get("Error", {}).get("Code") == "PreconditionFailed"


def _delete_folder_markers(fs: Any, root: str, keys: list[str]) -> None:
    """Delete the empty folders that SeaweedFS keeps for a while after their objects; Amazon's S3 has none."""
    folders = {parent for key in keys for parent in PurePosixPath(key).parents if parent.is_relative_to(root)}
    bucket = root.split("/", 1)[0]
    for folder in sorted({PurePosixPath(root), *folders}, key=lambda path: -len(path.parts)):
        fs.call_s3("delete_object", Bucket=bucket, Key=f"{folder.relative_to(bucket)}/")


def _synced_temporary(target: Path, data: bytes) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    with temporary.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _named(action: str, url: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the many errors of S3 into one that names the URL; absent and existing objects keep their own type."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:
        # By its module: importing botocore takes a while, and a local path never needs it.
        from_s3 = isinstance(error, OSError) or type(error).__module__.startswith("botocore")
        if is_local(url) or not from_s3:
            raise
        raise StorageError(f"could not {action} {os.fspath(url)}: {type(error).__name__}: {error}") from error
