"""Regional descriptors at a source: the tables of each case become one file in the workspace (tasks.descriptors).

Tables that cannot be used are rows of the catalog with their reason; the image of the case stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from infra import storage
from models.anatomy import Atlas, Basis, DescriptorError, check_values
from models.reasons import Reason
from models.records import DescriptorTable, Scan
from tasks.descriptors import descriptor_folder, file_bytes, identity_of
from tasks.sources.base import Candidate, Root, SourceBase, left_out

READ_THREADS = 16
MAX_TABLE_BYTES = 4 << 20
"""Of one statistics file or array of regions: FreeSurfer's take 10 kB."""


class RegionalSource(SourceBase):
    """What sources with descriptors share."""

    atlas: Atlas = Field(
        "desikan_killiany",
        title="Atlas",
        description="desikan_killiany (68 regions) or destrieux (148). A dataset has one atlas.",
    )
    missing_regions: int = Field(
        0,
        title="Missing regions",
        description="How many regions of a subject may lack a measure, 0 to 148; they are stored as not measured.",
        ge=0,
        le=148,
    )

    @property
    def layout(self) -> tuple[Atlas, Basis] | None:
        """Atlas and basis of the descriptors that it yields; None: it yields none."""
        return self.atlas, "freesurfer"


@dataclass(frozen=True)
class Regional:
    """The tables of one case, before they are read."""

    files: tuple[Candidate, ...]
    """The first one names the row of the catalog; empty problems are found when it is looked at."""
    make: Callable[[], DescriptorTable]
    """Raises DescriptorError, FileNotFoundError or OSError."""


def convert(root: Root, cases: Sequence[Regional], workspace: str) -> list[Scan]:
    """Return the rows of descriptors, each a file of the workspace or left out with its reason.

    workspace: folder or URL; empty, as in a dry run: nothing is read or written, and rows name the tables themselves.
    """
    folder = descriptor_folder(workspace, root.source.dataset) if workspace else ""
    there = storage.find_or_empty(folder) if workspace else {}
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="descriptors") as pool:
        return list(pool.map(lambda case: _row(root, case, folder, there), cases))


def _row(root: Root, case: Regional, folder: str, there: Mapping[str, Mapping[str, Any]]) -> Scan:
    scans = [root.scan(candidate) for candidate in case.files]
    bad = next((scan for scan in scans if scan.status != "ok"), None)
    if bad is not None or not folder:
        return bad or scans[0]
    first = scans[0]
    try:
        raw = file_bytes(case.make())
    except DescriptorError as error:
        return left_out(first, error.reason, str(error))
    except FileNotFoundError:
        return left_out(first, Reason.MISSING_FILE, f"{first.path} is not there any more")
    except storage.StorageError:
        raise  # the storage is away, which says nothing about the file
    except OSError as error:
        return left_out(first, Reason.UNREADABLE, f"{first.path} cannot be read: {error.strerror or error}")
    size, identity = identity_of(raw)
    # Named by its content: a file of that name and size is the file.
    name = f"{first.case}-{identity[-16:]}.json"
    path = storage.join(folder, name)
    if int(there.get(name, {}).get("size") or 0) != size:
        storage.write_bytes(path, raw)
    return first.replace(path=path, size_bytes=size, etag=identity)


def table_of(
    source: RegionalSource, basis: Basis, values: Mapping[str, Sequence[float | None]], names: Sequence[str]
) -> DescriptorTable:
    """Return the checked table of a case; values: by measure, in the order of the atlas. Raises DescriptorError."""
    check_values(values, source.atlas, source.missing_regions)
    return DescriptorTable(
        atlas=source.atlas,
        basis=basis,
        values={measure: tuple(row) for measure, row in values.items()},
        missing_regions=source.missing_regions,
        sources=tuple(name.rsplit("/", 1)[-1] for name in names),
    )


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put the file (and line) before what is wrong with descriptors."""
    try:
        yield
    except DescriptorError as error:
        raise DescriptorError(error.reason, f"{where}: {error}") from None


def read_small(root: Root, relative: str) -> bytes:
    """Return the bytes of a table; raises DescriptorError for one that is too large, FileNotFoundError without it."""
    url, raw = storage.join(root.url, relative), b""
    size = int((root.listing or {}).get(relative, {}).get("size") or 0)  # before it fills the memory
    if size <= MAX_TABLE_BYTES:
        raw = storage.read_bytes(url)
    if (size := max(size, len(raw))) > MAX_TABLE_BYTES:
        raise DescriptorError(
            Reason.UNREADABLE, f"{url} has {size:,} bytes, {MAX_TABLE_BYTES:,} are allowed for a table of regions"
        )
    return raw


def refuse_mixed(sources: Sequence[SourceBase]) -> None:
    """Raise ValueError when two sources of one dataset give descriptors of another atlas or basis."""
    seen: dict[str, tuple[Atlas, Basis]] = {}
    for source in sources:
        layout = source.layout if isinstance(source, RegionalSource) else None
        if layout is None:
            continue
        if (first := seen.setdefault(source.dataset, layout)) != layout:
            raise ValueError(
                f"dataset {source.dataset}: one source gives descriptors of atlas {first[0]} by {first[1]}, another of "
                f"{layout[0]} by {layout[1]}; a dataset has one atlas and one basis, so name another dataset"
            )
