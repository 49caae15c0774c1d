"""A disk that is full at any write: the error says where and what to do, nothing half-made is seen, a resume ends."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from nifti_files import write_case
from store_builds import ingest, scans_of, three_subjects

from infra import storage
from infra.storage import StorageError
from models.store import StoreError, open_store, store_digest
from tasks.verify import verify

FULL = r"could not write .*s\.zarr.*: OSError: \[Errno 28\] No space left on device; it is full: make room, then start"


def fill(patch: pytest.MonkeyPatch, writes: int) -> None:
    """Let so many files reach the disk, and none after them."""
    real, left = os.fsync, iter(range(writes))

    def fsync(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    patch.setattr("infra.storage.os.fsync", fsync)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list, str, int]:
    """Return the scans of three subjects, the digest of their store, and how many writes it took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    scans, writes = three_subjects(folder), 0
    real = storage.write_bytes
    with pytest.MonkeyPatch.context() as patch:

        def counted(url: str, data: bytes) -> None:
            nonlocal writes
            writes += 1
            real(url, data)

        patch.setattr(storage, "write_bytes", counted)
        ingest(str(folder / "s.zarr"), scans)
    return scans, store_digest(str(folder / "s.zarr")), writes


def half_written(url: str) -> list[Path]:
    return [path for pattern in ("*.partial", ".*.tmp") for path in Path(url).rglob(pattern)]


# The group, the plan, image, label and receipt of the first case and of the last, pairs, the table, publication.
@pytest.mark.parametrize("writes", [0, 2, 4, -1, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 3, 8, -3, -2))])
def test_a_full_disk_is_told_and_a_resume_ends_with_the_same_store(
    tmp_path: Path, undisturbed: tuple[list, str, int], writes: int
) -> None:
    scans, digest, total = undisturbed
    url = str(tmp_path / "s.zarr")
    with pytest.MonkeyPatch.context() as patch:
        fill(patch, writes % total)
        with pytest.raises(StorageError, match=FULL):
            ingest(url, scans, "full")
    assert half_written(url) == []
    with pytest.raises(StoreError):  # nothing was published
        open_store(url)
    ingest(url, scans, "room")
    assert store_digest(url) == digest
    assert verify(url, deep=True) == []


def test_what_was_published_stays_readable(tmp_path: Path) -> None:
    url, scans = str(tmp_path / "s.zarr"), three_subjects(tmp_path)
    ingest(url, scans)
    digest = store_digest(url)
    more = [*scans, *scans_of(write_case(tmp_path, "d", 5, label=True), "d")]
    # The plan, image, label, receipt, image again, the table fail: what was written before is not written again.
    for number, writes in enumerate((0, 1, 1, 2, 0, 3)):
        with pytest.MonkeyPatch.context() as patch:
            fill(patch, writes)
            with pytest.raises(StorageError, match=FULL):
                ingest(url, more, f"full-{number}")
        assert store_digest(url) == digest
        assert open_store(url).dataset("toy").rows == [0, 1, 2]
        assert half_written(url) == []
    ingest(url, more, "room")
    assert open_store(url).dataset("toy").rows == [0, 1, 2, 3]
    assert verify(url, deep=True) == []
