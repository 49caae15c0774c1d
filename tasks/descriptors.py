"""Files of regional descriptors: the one format into which every source's tables are turned, one file per case.

The catalog writes them into `<workspace>/descriptors/<dataset>/`, preprocessing reads them. Their identity in the
catalog is the SHA-256 of their bytes: making them again from the same tables changes nothing.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from typing import TYPE_CHECKING

from pydantic import ValidationError

from infra import storage
from models.anatomy import DescriptorError
from models.reasons import Reason
from models.records import DescriptorTable
from tasks.affines import BadScanError
from tasks.headers import CHECKSUM_PREFIX

if TYPE_CHECKING:  # it brings zarr, which the catalog does not need
    from models.store_descriptors import Descriptors

FOLDER = "descriptors"
MAX_BYTES = 1 << 20
"""Of such a file: 148 regions of 3 measures take 10 kB."""


def descriptor_folder(workspace: str, dataset: str) -> str:
    """Return the URL or resolved path of the descriptor files of a dataset."""
    return storage.join(storage.resolved(workspace), FOLDER, dataset)


def file_bytes(table: DescriptorTable) -> bytes:
    """Return a table as it is written: the same bytes for the same values."""
    return json.dumps(table.model_dump(mode="json"), sort_keys=True, allow_nan=False).encode()


def identity_of(raw: bytes) -> tuple[int, str]:
    """Return size and identity of a descriptor file for the catalog."""
    return len(raw), CHECKSUM_PREFIX + hashlib.sha256(raw).hexdigest()


def parse_table(raw: bytes, name: str) -> DescriptorTable:
    """Read a descriptor file; raises BadScanError with the rule that its values break."""
    if len(raw) > MAX_BYTES:
        raise BadScanError(
            Reason.UNREADABLE, f"{name}: {len(raw):,} bytes, a file of descriptors has at most {MAX_BYTES:,}"
        )
    try:
        return DescriptorTable.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, DescriptorError):
            raise BadScanError(cause.reason, f"{name}: {cause}") from None
        where = ".".join(map(str, first["loc"]))
        raise BadScanError(
            Reason.UNREADABLE, f"{name}: no file of descriptors ({where}: {first['msg']}); build the catalog again"
        ) from None


def table_text(descriptors: Descriptors, row: int) -> str:
    """Return the descriptors of a row as tab-separated text: a line per region, a column per measure; n/a: absent."""
    sink = io.StringIO()
    writer = csv.writer(sink, delimiter="\t", lineterminator="\n")
    writer.writerow(["region", *descriptors.measures, "atlas", "basis"])
    for n, region in enumerate(descriptors.regions):
        # The digits of float32, not those of its nearest double.
        cells = ["n/a" if value != value else str(value) for value in descriptors.values[row, :, n]]
        writer.writerow([region, *cells, descriptors.atlas, descriptors.basis])
    return sink.getvalue()
