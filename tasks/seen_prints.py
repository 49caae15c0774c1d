"""Fingerprints that a pre-training keeps of its images, so that copies of its people are found from other stores.

`<training>/fingerprints.parquet` is written when a training starts, a line a case. Near-duplicates inside a store are
known (tasks.duplicates); a training that was copied from another workspace, or made on another store of this one, has
seen people who are not in the store that is evaluated, and there these lines are compared with its cases. A training
without them (older than this file, or imported) can be compared by id alone, which a sentence under the table says.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infra.storage import write_bytes
from models.records import SelectedCase
from models.selection import read_selection
from tasks.crosswalk import Link
from tasks.duplicates import MIN_SUBJECTS, find_duplicates, reference_of
from tasks.fingerprint import DECIMALS, EDGE, fingerprints_of
from tasks.splits import Subject

if TYPE_CHECKING:
    from models.store import Store

FILE = "fingerprints.parquet"
"""In the folder of a training."""
SCALE = 10**DECIMALS
"""Stored values are whole numbers of 1 / SCALE, as fingerprints are rounded."""
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("dataset", "subject", "case", "reference")),
        ("fingerprint", pa.list_(pa.int16())),
    ]
)
ELSEWHERE = "elsewhere/"
"""Before the dataset of a subject of another store while both are compared; no dataset has a slash in its name."""
_COLUMNS = ["dataset", "subject", "case", "status", "modalities", "fingerprint"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Elsewhere:
    """What pre-trainings have seen in other stores, as far as it bears on this one."""

    links: tuple[Link, ...] = ()
    """A subject that a pre-training has seen there, and one of this store that looks like it."""
    notes: tuple[str, ...] = ()
    """Sentences on what could not be compared."""


def keep_fingerprints(folder: Path, store: Store, selection: Sequence[SelectedCase]) -> None:
    """Write the fingerprints of the cases that a training sees into its folder, unless they are there.

    Cases that the store no longer holds as they were selected, and those without an image, have no line.
    """
    path = folder / FILE
    if path.exists():
        return
    wanted = {(case.dataset, case.row): case.digest for case in selection if case.role != "test"}
    table = store.cases().select([*_COLUMNS, "row", "digest"])
    lines = []
    for line, values in zip(table.drop_columns("fingerprint").to_pylist(), fingerprints_of(table), strict=True):
        if wanted.get((line["dataset"], line["row"])) == line["digest"] and len(values) == EDGE**3:
            reference = reference_of(line, store.spec.reference_order)
            stored = np.rint(values * SCALE).astype(np.int16)
            lines.append(
                {**{name: line[name] for name in SCHEMA.names[:3]}, "reference": reference, "fingerprint": stored}
            )
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(lines, schema=SCHEMA), sink, compression="zstd")
    write_bytes(str(path), sink.getvalue())


def read_fingerprints(folder: Path) -> pa.Table:
    """Return the fingerprints that a training kept; an empty table where there are none, or they cannot be read."""
    path = folder / FILE
    try:
        return pq.read_table(path, schema=SCHEMA) if path.exists() else SCHEMA.empty_table()
    except (OSError, pa.ArrowException) as error:
        _log.warning("%s cannot be read (%s): its subjects are compared by id alone", path, error)
        return SCHEMA.empty_table()


def seen_elsewhere(trainings: Mapping[str, Sequence[Path]], store: Store) -> Elsewhere:
    """Return who of a store looks like a subject that pre-trainings have seen in another one.

    trainings: folders by the name of their row. Compared are subjects that are not in the store, by fingerprints of the
    same modality; fewer than MIN_SUBJECTS of both together tell nothing.
    """
    cases = store.cases()
    cases = cases.filter(pc.equal(cases["status"], "stored")).select(_COLUMNS)
    here = set(_subjects(cases))
    kept: dict[tuple[Subject, str], dict[str, Any]] = {}
    missing: dict[str, tuple[set[Subject], int]] = {}
    for row, folders in trainings.items():
        seen = {
            (case.dataset, case.subject)
            for folder in folders
            for case in read_selection(folder / "selection.parquet")
            if case.role != "test"
        }
        foreign = seen - here
        for table in map(read_fingerprints, folders) if foreign else ():
            kept |= {
                ((line["dataset"], line["subject"]), line["case"]): line
                for line in table.to_pylist()
                if (line["dataset"], line["subject"]) in foreign
            }
        missing[row] = (foreign, len(seen))
    comparable = _comparable(cases, list(kept.values()), store.spec.reference_order)
    told = {subject for (subject, _), line in kept.items() if line["reference"] in comparable}
    lines = [line for line in kept.values() if line["reference"] in comparable]
    links = _links(cases, lines, store.spec.reference_order) if lines else ()
    notes = tuple(_note(row, foreign, told, total) for row, (foreign, total) in missing.items() if foreign - told)
    return Elsewhere(links, notes)


def _subjects(table: pa.Table) -> list[Subject]:
    return list(zip(table["dataset"].to_pylist(), table["subject"].to_pylist(), strict=True))


def _comparable(cases: pa.Table, lines: Sequence[Mapping[str, Any]], order: Sequence[str]) -> set[str]:
    """Return the reference modalities of which there are images here, and enough subjects in all."""
    here: dict[str, set[Subject]] = {}
    for line in cases.select(["dataset", "subject", "modalities"]).to_pylist():
        here.setdefault(reference_of(line, order), set()).add((line["dataset"], line["subject"]))
    there: dict[str, set[Subject]] = {}
    for line in lines:
        there.setdefault(line["reference"], set()).add((line["dataset"], line["subject"]))
    return {name for name, own in here.items() if name and len(own) + len(there.get(name, ())) >= MIN_SUBJECTS}


def _links(cases: pa.Table, lines: Sequence[Mapping[str, Any]], order: Sequence[str]) -> tuple[Link, ...]:
    others = pa.Table.from_pylist(
        [
            {
                **{name: line[name] for name in ("subject", "case")},
                "dataset": f"{ELSEWHERE}{line['dataset']}",
                "status": "stored",
                "modalities": [line["reference"]],
                "fingerprint": np.asarray(line["fingerprint"], np.float32) / SCALE,
            }
            for line in lines
        ],
        schema=cases.schema,
    )
    pairs = find_duplicates(pa.concat_tables([cases, others]), order)
    found = [[(pair[f"dataset_{side}"], pair[f"subject_{side}"]) for side in "ab"] for pair in pairs]
    crossing = [pair for pair in found if sum(dataset.startswith(ELSEWHERE) for dataset, _ in pair) == 1]
    return tuple(sorted(_named(pair) for pair in crossing))


def _named(pair: Sequence[Subject]) -> Link:
    """Return the subject of the other store under its own name, then that of this one."""
    there, here = sorted(pair, key=lambda subject: not subject[0].startswith(ELSEWHERE))
    return (there[0].removeprefix(ELSEWHERE), there[1]), here


def _note(row: str, foreign: set[Subject], told: set[Subject], total: int) -> str:
    left = len(foreign - told)
    return (
        f"{row}: {left} of {total} subjects that it was trained on are not in this store, and no fingerprints of their "
        "images are kept with it that can be compared with the images here. They were looked for by id and crosswalk "
        "alone: copies under other ids would not be noticed."
    )
