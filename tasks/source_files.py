"""The bytes of a case's files, and what is wrong when there are none."""

from __future__ import annotations

from infra import storage
from models.records import Reason, SourceFile
from models.stopwatch import step
from tasks.affines import BadScanError


@step("read")
def bytes_of(file: SourceFile) -> bytes:
    """Return the bytes of a source file, local or on S3.

    Raises BadScanError for one that is gone, cannot be read or has another size than the catalog says, and StorageError
    when the storage is away: that says nothing about the file.
    """
    try:
        raw = storage.read_bytes(file.path)
    except FileNotFoundError:
        raise BadScanError(Reason.MISSING_FILE, f"{file.path} is not there any more") from None
    except storage.StorageError:
        raise
    except OSError as error:
        raise BadScanError(Reason.UNREADABLE, f"{file.path} cannot be read: {error.strerror or error}") from error
    if file.size_bytes and len(raw) != file.size_bytes:
        raise BadScanError(
            Reason.UNREADABLE,
            f"{file.path} has {len(raw)} bytes, the catalog says {file.size_bytes}; build the catalog again",
        )
    return raw


def name_of(file: SourceFile) -> str:
    """Return the last part of a file's path."""
    return file.path.rsplit("/", 1)[-1]
