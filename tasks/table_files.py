"""CSV, TSV and Parquet files as columns of text: one strict reader for tables of scans, phenotypes and crosswalks."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from infra import storage
from tasks.headers import file_identity

MAX_BYTES = 256 << 20
MAX_ROWS = 5_000_000
MISSING = frozenset({"n/a", "N/A", "NA", "nan", "NaN", "NULL", "null", "None", ""})


def read_table(url: str, size_bytes: int | None = None) -> pd.DataFrame:
    """Return a table as columns of stripped text, absent cells as empty text; the suffix says the format.

    `size_bytes` saves a request when a listing gave it already.

    Raises FileNotFoundError without the file, and ValueError naming file, rule and value for what is no plain table:
    more than 256 MB, invalid UTF-8, a column name twice, rows of unequal length.
    """
    size = file_identity(url)[0] if size_bytes is None else size_bytes
    if size > MAX_BYTES:
        raise ValueError(f"{url} has {size:,} bytes, {MAX_BYTES:,} are allowed for a table")
    raw = storage.read_bytes(url)
    if url.endswith(".parquet"):
        return _read_parquet(raw, url)
    if not url.endswith((".csv", ".tsv", ".txt")):
        raise ValueError(f"{url} is no table: its name must end in .csv, .tsv, .txt (tabs) or .parquet")
    return _read_text(raw, url, "," if url.endswith(".csv") else "\t")


def _read_text(raw: bytes, url: str, separator: str) -> pd.DataFrame:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{url} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if "\x00" in text:
        raise ValueError(f"{url} holds a NUL character at position {text.index(chr(0))}; it is no text table")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"{url}, line {reader.line_num}: {error}") from None
    if not rows:
        raise ValueError(f"{url} is empty; a line of column names is expected")
    names = [name.strip() for name in rows[0]]
    check_names(names, url)
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(names):
            raise ValueError(f"{url}, row {number}: {len(row)} cells, the first line names {len(names)} columns")
    columns = zip(*rows[1:], strict=True) if len(rows) > 1 else ([] for _ in names)
    return pd.DataFrame({name: _texts(cells) for name, cells in zip(names, columns, strict=True)}, dtype=object)


def _read_parquet(raw: bytes, url: str) -> pd.DataFrame:
    try:
        file = pq.ParquetFile(pa.BufferReader(raw))
        rows, names = file.metadata.num_rows, file.schema_arrow.names
        claimed = sum(file.metadata.row_group(n).total_byte_size for n in range(file.metadata.num_row_groups))
        check_names(names, url)
        if rows > MAX_ROWS or claimed > 4 * MAX_BYTES:
            raise ValueError(f"{url} claims {rows:,} rows in {claimed:,} bytes; {MAX_ROWS:,} rows are allowed")
        plain = [column.name for column in file.schema_arrow if not pa.types.is_nested(column.type)]
        table = file.read(columns=plain)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{url} is no readable Parquet file: {error}") from None
    return pd.DataFrame({name: _texts(table[name].to_pylist()) for name in plain}, dtype=object)


def check_names(names: list[str], url: str) -> None:
    """Raise ValueError when a column has no name that is its own."""
    counts = Counter(names)
    if doubled := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{url} has more than one column {doubled[0][:80]!r}; rename them")


def pick(table: pd.DataFrame, column: str, url: str) -> list[str]:
    """Return the cells of a column; raises ValueError listing the columns that are there."""
    if column not in table:
        there = ", ".join(map(str, table.columns))[:500] or "none"
        raise ValueError(f"{url} has no column {column!r}; its columns: {there}")
    return list(table[column])


def _texts(cells: Iterable[object]) -> list[str]:
    return [_text(cell) for cell in cells]


def _text(cell: object) -> str:
    if isinstance(cell, bytes):
        cell = cell.decode("utf-8", "backslashreplace")
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)  # pandas makes floats of integers with a gap
    text = "" if cell is None else str(cell).strip()
    return "" if text in MISSING else text
