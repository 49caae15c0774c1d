"""Tables that are corrected over time (phenotypes, splits): every version that ever counted is kept.

    <folder>/<name>.parquet                                  the current one; what people and flows read
    <folder>/versions/<name>-<start of its digest>.parquet   the same bytes, never changed again

So a corrected diagnosis rewrites no voxel and loses nothing: a training names the digests that it was made with, and
the tables are found by them.
"""

from __future__ import annotations

from infra import storage

FOLDER = "versions"
SUFFIX = ".parquet"
SHOWN = 12
"""Characters of a digest in a file name."""


def version_url(url: str, digest: str) -> str:
    """Return where a version of a table is kept; url: of the current one, digest: of the version's content."""
    folder, _, name = url.rpartition("/")
    return storage.join(folder or ".", FOLDER, f"{name.removesuffix(SUFFIX)}-{digest[:SHOWN]}{SUFFIX}")


def keep_version(url: str, digest: str) -> str:
    """Copy the current table to its version, unless that is there, and return where; raises FileNotFoundError."""
    kept = version_url(url, digest)
    if not storage.exists(kept):
        storage.write_bytes(kept, storage.read_bytes(url))
    return kept
