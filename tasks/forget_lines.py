"""The lines of tables and texts that hold a forgotten subject: found, and the file written without them.

An id of fewer than SHORTEST characters would be found in every text: it is looked for in columns of ids only.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra import storage
from tasks.crosswalk import FOLDER as CROSSWALKS
from tasks.folds import folds_digest
from tasks.forget_reach import Person
from tasks.splits import METADATA_KEY, ROLES, split_digest

SEPARATORS = {".csv": ",", ".tsv": "\t"}
LINE_TEXTS = frozenset({*SEPARATORS, ".jsonl", ".log", ".txt"})
SIDES = ("", "_a", "_b")
"""Ends of the names of columns of ids; pairs have two of each."""
DIGESTS = ("digest", "case_digest")
"""Columns that tell a case by its content, as embeddings are kept."""


def is_line_text(path: Path) -> bool:
    """Say whether a file is text whose lines stand for themselves."""
    return path.suffix in LINE_TEXTS


def mine_in(path: Path, person: Person) -> list[bool]:
    """Return which lines of a Parquet table hold a subject, by its ids and case digests; empty when none does."""
    names = pq.read_schema(path).names
    wanted = [f"{name}{side}" for name in ("dataset", "subject", "case") for side in SIDES]
    columns = [name for name in (*wanted, *DIGESTS) if name in names]
    table = pq.read_table(path, columns=columns)
    mine = np.zeros(table.num_rows, dtype=bool)
    for side in SIDES:
        here = _among(table, f"subject{side}", (person.subject, person.mark))
        here |= _among(table, f"case{side}", person.cases)
        if f"dataset{side}" in columns:
            here &= _among(table, f"dataset{side}", (person.dataset,))
        mine |= here
    for name in DIGESTS:
        mine |= _among(table, name, person.digests)
    return mine.tolist() if mine.any() else []


def _among(table: pa.Table, name: str, values: Sequence[str]) -> np.ndarray:
    if name not in table.column_names or not values:
        return np.zeros(table.num_rows, dtype=bool)
    texts = pc.fill_null(pc.cast(table.column(name), pa.string()), "")
    return np.asarray(pc.is_in(texts, value_set=pa.array(values)).to_numpy(), dtype=bool)


def lines_of(path: Path, person: Person, relative: Path) -> bool:
    """Say whether a text has lines that hold a subject; relative: its place in the workspace."""
    text = path.read_text("utf-8", errors="replace")
    return _without(path, text, person, relative.parts[0] == CROSSWALKS) != text


def without_subject(path: Path, person: Person) -> None:
    """Write a table or text without the lines of a subject, as a whole; a table keeps its metadata."""
    if path.suffix == ".parquet":
        _rewrite_table(path, person)
        return
    text = path.read_text("utf-8", errors="replace")
    kept = _without(path, text, person, CROSSWALKS in path.parts)
    storage.write_bytes(str(path), kept.encode())


def logs_with(folder: Path, person: Person) -> list[Path]:
    """Return the logs of a server and its worker that name a subject."""
    return [path for path in sorted(folder.glob("*.log*")) if person.is_in(path.read_text("utf-8", errors="replace"))]


def erase_from_log(path: Path, person: Person) -> None:
    """Take the lines that name a subject out of a log, in its place: who writes it goes on at its end."""
    with path.open("r+b") as log:
        kept = [line for line in log.readlines() if not person.is_in(line.decode("utf-8", errors="replace"))]
        log.seek(0)
        log.writelines(kept)
        log.truncate()


def _without(path: Path, text: str, person: Person, crosswalk: bool) -> str:
    separator = SEPARATORS.get(path.suffix) or ("\t" if crosswalk else "")
    if not separator:
        return "".join(line for line in text.splitlines(keepends=True) if not person.is_in(line))
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    kept = [
        new for number, row in enumerate(rows) if (new := _row(rows[0], row, number, person, crosswalk)) is not None
    ]
    if kept == rows:
        return text
    sink = io.StringIO(newline="")
    csv.writer(sink, delimiter=separator, lineterminator="\n").writerows(kept)
    return sink.getvalue()


def _row(header: Sequence[str], row: list[str], number: int, person: Person, crosswalk: bool) -> list[str] | None:
    """Return a line without the subject: None for one that is its own, a wide crosswalk's line without its ids."""
    if number == 0:
        return row
    cells = dict(zip(header, row, strict=False))
    if crosswalk and "subject" not in header:
        return ["" if cell.strip() == person.subject else cell for cell in row]
    if "dataset" in cells and cells["dataset"] != person.dataset:
        return row
    own = cells.get("subject") == person.subject or cells.get("case") in person.cases
    return None if own or any(person.is_in(cell) for cell in row) else row


def _rewrite_table(path: Path, person: Person) -> None:
    mine = mine_in(path, person)
    if not mine:
        return
    table = pq.read_table(path)
    kept = table.filter(pa.array([not gone for gone in mine]))
    metadata = dict(table.schema.metadata or {})
    if METADATA_KEY in metadata:
        record = _record(kept, json.loads(metadata[METADATA_KEY]))
        metadata[METADATA_KEY] = json.dumps(record, sort_keys=True).encode()
        copy = path.with_suffix(".json")
        if copy.exists():
            storage.write_bytes(str(copy), json.dumps(record, indent=1, sort_keys=True).encode())
    sink = io.BytesIO()
    pq.write_table(kept.replace_schema_metadata(metadata), sink)
    storage.write_bytes(str(path), sink.getvalue())


def _record(kept: pa.Table, record: dict[str, object]) -> dict[str, object]:
    """Return the record of a split or of folds for the lines that are left: its digest and its counts."""
    frame = kept.to_pandas()
    if "fold" in frame:
        sizes = frame["fold"].value_counts().sort_index()
        return {
            **record,
            "digest": folds_digest(frame),
            "subjects": {str(fold): int(size) for fold, size in sizes.items()},
        }
    counts = {role: int((frame["split"] == role).sum()) for role in ROLES}
    return {**record, "digest": split_digest(frame), "subjects": counts}
