"""A URL becomes a filesystem, a Zarr store or bytes: one place for time-outs, retries and S3 options.

Local paths (plain or `file://`) and `s3://bucket/path` are known. S3 is configured by the environment alone:
`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, and `FSSPEC_S3_ENDPOINT_URL` or `AWS_ENDPOINT_URL` for servers that
are not Amazon's; the settings `BRAINLOOM_S3_*` stand for these. No credential passes through an argument, so none can
reach a log, a parameter or the store; a URL or an endpoint with user info is refused, in words that do not repeat it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import fsspec

from infra.environments import STANDS_FOR, export_storage
from infra.settings import Settings

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 20
ATTEMPTS = 8
"""Of every S3 request; between them a random share of 1, 2, 4, 8, 16, 20, 20 s: a server may be away for half a minute.
botocore repeats what failed to connect, timed out or was answered with 500, 502, 503, 504 or `SlowDown`."""
BODY_ATTEMPTS = 2
"""s3fs repeats on top of that when a connection breaks within an answer."""
ZARR_TIMEOUT_S = 600.0
"""Bound of one Zarr call on S3: zarr's own default is to wait for ever for a dead endpoint."""
ZARR_S3_CONCURRENCY = 32
ENDPOINT_VARIABLES = ("FSSPEC_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
FULL_CODES = frozenset({"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull"})
"""What S3 servers call a full bucket, beside the status 507."""
KEY_CODES = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"})
"""With what S3 servers answer to a key that they do not know, or to a wrong secret."""
FULL = "it is full: make room, then start again; what is finished stays"
_one_attempt: ContextVar[bool] = ContextVar("one_attempt", default=False)

Kind = Literal["", "full", "no keys", "wrong keys", "clock", "rights", "bucket", "refused", "away"]
Mode = Literal["r", "r+", "a", "w", "w-"]


class StorageError(OSError):
    """A storage call failed after its retries; the message names the URL, the cause and what to do."""

    kind: Kind = ""
    advice: str = ""


def is_local(url: str | os.PathLike[str]) -> bool:
    """Say whether a URL is a path of this machine.

    Raises ValueError for a scheme that is neither file nor s3, and for a user or password in the URL.
    """
    _refuse_user_info(url)
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


def resolved(url: str) -> str:
    """Return a URL of S3 as it is, and the path of a local one without links and relative parts."""
    return str(local_path(url).resolve()) if is_local(url) else url


def _refuse_user_info(url: str | os.PathLike[str]) -> None:
    """Raise ValueError for `s3://KEY:SECRET@bucket` without repeating any of it: URLs stand in logs and error texts."""
    scheme, mark, rest = os.fspath(url).partition("://")
    if mark and "@" in rest.split("/", 1)[0]:
        raise ValueError(
            f"a storage URL of scheme {scheme} has user info before its bucket or host (not repeated here); write "
            "s3://bucket/path and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
        )


def s3_endpoint() -> str | None:
    """Return the endpoint in the environment, None for Amazon's S3; raises ValueError when it holds user info."""
    for name in ENDPOINT_VARIABLES:
        if "@" in os.environ.get(name, ""):
            raise ValueError(
                f"{name} holds user info (not repeated here); give scheme, host and port alone and set "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
    return next((os.environ[name] for name in ENDPOINT_VARIABLES if os.environ.get(name)), None)


@contextmanager
def one_attempt() -> Iterator[None]:
    """Ask S3 once only inside: somebody waits for the answer, and nothing is lost with it."""
    token = _one_attempt.set(True)
    try:
        yield
    finally:
        _one_attempt.reset(token)


def s3_host() -> str:
    """Return the host of the endpoint, for messages."""
    endpoint = s3_endpoint()
    return urlsplit(endpoint).netloc or endpoint if endpoint else "Amazon's S3"


def endpoint_variable() -> str:
    """Return the name of the variable in which the user gave the endpoint, or may give one."""
    return next((_variable(name) for name in ENDPOINT_VARIABLES if os.environ.get(name)), "BRAINLOOM_S3_ENDPOINT")


def _variable(name: str) -> str:
    """Return the name of our setting where that is what the user set, else the S3 clients' own."""
    ours = STANDS_FOR[name]
    return next((one for one in (ours, f"{ours}_FILE") if os.environ.get(one)), name)


def s3_options() -> dict[str, Any]:
    """Return s3fs options: time-outs, retries, no listing cache (another process may write), the endpoint if set.

    Raises ValueError for an endpoint with user info.
    """
    if any(name.startswith("BRAINLOOM_S3_") for name in os.environ):
        export_storage(Settings())  # S3 clients read variables of their own
    endpoint = s3_endpoint()
    return {
        "use_listings_cache": False,
        "config_kwargs": {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"mode": "standard", "total_max_attempts": 1 if _one_attempt.get() else ATTEMPTS},
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
    fs = fsspec.filesystem("s3", **s3_options())
    fs.retries = 1 if _one_attempt.get() else BODY_ATTEMPTS
    return fs, f"{parts.netloc}{parts.path}".rstrip("/")


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
    store = FsspecStore.from_url(os.fspath(url).rstrip("/"), storage_options=s3_options(), read_only=mode == "r")
    store.fs.retries = BODY_ATTEMPTS
    return store


def join(url: str | os.PathLike[str], *parts: str) -> str:
    """Append parts to a URL. A part that is absolute or climbs with `..` is refused with ValueError."""
    _refuse_user_info(url)
    for part in parts:
        path = PurePosixPath(part)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"path {part!r} leaves its root {os.fspath(url)!r}; give a relative path without '..'")
    return "/".join([os.fspath(url).rstrip("/") or "/", *(part.strip("/") for part in parts if part)])


def read_bytes(url: str | os.PathLike[str]) -> bytes:
    """Return a whole object; raises FileNotFoundError when it is absent."""
    fs, path = filesystem(url)
    with explained("read", url):
        return bytes(fs.cat_file(path))


def write_bytes(url: str | os.PathLike[str], data: bytes) -> None:
    """Write a whole object, or nothing: readers see the old or the new bytes, also after a power cut."""
    with explained("write", url):
        if not is_local(url):
            fs, path = filesystem(url)
            fs.pipe_file(path, data)
            return
        target = local_path(url)
        temporary = _temporary(target, data, durable=True)
        try:
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)


def create_exclusive(url: str | os.PathLike[str], data: bytes, durable: bool = True) -> bool:
    """Create an object with these bytes unless it exists; of several callers exactly one gets True at most.

    durable: forced to disk; without it the object survives the death of processes, but not a power cut. On S3 a
    creation whose answer was lost is retried and then reported as False: put a token of your own into the data and
    compare it when that matters.
    """
    with explained("create", url):
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
        temporary = _temporary(target, data, durable)
        try:
            # A link is atomic and refuses an existing name, so no reader ever sees a half-written object.
            os.link(temporary, target)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        if durable:
            _sync_folder(target.parent)
        return True


def exists(url: str | os.PathLike[str]) -> bool:
    """Say whether an object or folder is there."""
    fs, path = filesystem(url)
    with explained("look up", url):
        return bool(fs.exists(path))


def listdir(url: str | os.PathLike[str]) -> list[str]:
    """Return the sorted names in a folder; a folder that is not there is an empty one."""
    fs, path = filesystem(url)
    with explained("list", url):
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
    with explained("list", url):
        # An object of the same name would be listed as if it were the folder's only file.
        if not fs.isdir(path):
            raise FileNotFoundError(f"{os.fspath(url)} is not a folder")
        entries = fs.find(path, detail=True)
    return {name[len(path) :].lstrip("/"): info for name, info in entries.items() if not name.endswith("/")}


def find_or_empty(url: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """Return what `find` returns, and nothing for a folder that is not there."""
    try:
        return find(url)
    except FileNotFoundError:
        return {}


def age_seconds(url: str | os.PathLike[str]) -> float:
    """Return how long ago an object was written, by the storage's clock alone: that of this machine may be wrong.

    A probe is written beside the object, and their times are compared. Raises FileNotFoundError when it is absent.
    """
    fs, path = filesystem(url)
    mark = f".clock-{uuid.uuid4().hex}"
    with explained("look up", url):
        written = fs.modified(path)
    write_bytes(f"{os.fspath(url)}{mark}", b"clock")
    try:
        with explained("look up", url):
            age = fs.modified(f"{path}{mark}") - written
    finally:
        delete(f"{os.fspath(url)}{mark}")
    return max(0.0, float(age.total_seconds()))


def delete(url: str | os.PathLike[str]) -> None:
    """Delete an object or a folder with all in it; what is absent is no error. A root or a bucket is refused."""
    if is_local(url):
        path = local_path(url)
        if path == Path(path.anchor):
            raise ValueError(f"refusing to delete the root {path}")
        with explained("delete", url):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        return
    fs, key = filesystem(url)
    if "/" not in key:
        raise ValueError(f"refusing to delete the bucket {key!r}; name a path inside it")
    with explained("delete", url):
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
    return isinstance(error, FileExistsError) or _answer(error)[0] == "PreconditionFailed"


def _delete_folder_markers(fs: Any, root: str, keys: list[str]) -> None:
    """Delete the empty folders that SeaweedFS keeps for a while after their objects; Amazon's S3 has none."""
    folders = {parent for key in keys for parent in PurePosixPath(key).parents if parent.is_relative_to(root)}
    bucket = root.split("/", 1)[0]
    for folder in sorted({PurePosixPath(root), *folders}, key=lambda path: -len(path.parts)):
        fs.call_s3("delete_object", Bucket=bucket, Key=f"{folder.relative_to(bucket)}/")


def _temporary(target: Path, data: bytes, durable: bool) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        # On a full disk the half that was written takes the room that others need.
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(action: str, url: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the many errors of storage into one that names the URL, the cause and what to do.

    Absent and existing objects keep their own type, and so do the errors of local paths, which name the path already;
    a full disk does not.
    """
    try:
        yield
    except (FileExistsError, StorageError):
        raise
    except Exception as error:
        code, status = _answer(error)
        absent = isinstance(error, FileNotFoundError) and not (code == "NoSuchBucket" and action in {"write", "create"})
        # By its module: importing botocore takes a while, and a local path never needs it.
        from_s3 = isinstance(error, OSError) or type(error).__module__.startswith("botocore")
        full = getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT} or status == 507 or code in FULL_CODES
        if absent or not (full or (from_s3 and not is_local(url))):
            raise
        kind: Kind = "full" if full else _kind(error, code, status)
        what = f"{type(error).__name__}: {error}".rstrip(". ")
        advice = _advice(kind)
        told = StorageError(f"could not {action} {os.fspath(url)}: {what}; {advice}")
        told.kind, told.advice = kind, advice
        raise told from error


def _answer(error: BaseException) -> tuple[str, int]:
    """Return the code and HTTP status with which an S3 server answered; empty and 0 when it did not."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(response.get("Error", {}).get("Code", "")), int(status)


def _kind(error: BaseException, code: str, status: int) -> Kind:
    if type(error).__name__ in {"NoCredentialsError", "PartialCredentialsError"}:
        return "no keys"
    if code in KEY_CODES:
        return "wrong keys"
    if code == "RequestTimeTooSkewed":
        return "clock"
    if isinstance(error, PermissionError):
        return "rights"
    if code == "NoSuchBucket":
        return "bucket"
    return "refused" if code and status and status < 500 else "away"


def _advice(kind: Kind) -> str:
    if kind == "full":
        return FULL
    key, secret, host = _variable("AWS_ACCESS_KEY_ID"), _variable("AWS_SECRET_ACCESS_KEY"), s3_host()
    tries = "" if _one_attempt.get() else f"{ATTEMPTS} tries: "
    advice: dict[Kind, str] = {
        "no keys": f"set {key} and {secret} in the environment of this process and of its workers",
        "wrong keys": f"check {key} and {secret}: {host} does not know this key, or its secret is another",
        "clock": f"set the clock of this machine: it differs from that of {host}",
        "rights": f"check {key}, {secret} and what they may do in this bucket",
        "bucket": "make the bucket first",
        "refused": "the server refused the request",
        "away": f"{tries}see that {host} answers, then start again; what is finished stays",
    }
    return advice[kind]
