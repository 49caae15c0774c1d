"""Near-duplicate subjects: the same person under two ids, in two datasets or in one, found by fingerprint.

Brains are alike, so the plain correlation of two fingerprints says little. What all subjects share is taken out first:
the mean picture, what a small move, turn or change of contrast would do to it, a smooth bias field, and the strongest
common variations. What is left belongs to one person; it is compared by cosine in one matrix product.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from infra import storage
from models.spec import PreprocessSpec
from tasks.fingerprint import EDGE, fingerprints_of

TABLE = "duplicates.parquet"
"""In the root of the store, beside cases.parquet."""
THRESHOLD = 0.45
"""Measured separation: docs/store.md, section near-duplicates."""
MIN_SUBJECTS = 12
"""Of one reference modality: of fewer it cannot be said what they share."""
ROBUST_SUBJECTS, FEW_THRESHOLD = 24, 0.6
"""With fewer subjects what they share is a guess and strangers come near THRESHOLD: more is asked of a pair."""
SUBJECTS_PER_COMPONENT = 12
MAX_COMPONENTS = 32
COMMON = 0.8
"""Share of the subjects that have tissue in a cell which is compared."""
BLOCK = 1024
"""Rows of the matrix product at once: bounds its memory."""
SCHEMA = pa.schema(
    [
        *[(f"{column}_{side}", pa.string()) for side in "ab" for column in ("dataset", "subject", "case")],
        ("similarity", pa.float64()),
    ]
)

Subject = tuple[str, str]
"""Dataset and subject."""
Pair = dict[str, Any]


def refresh(url: str, cases: pa.Table, spec: PreprocessSpec) -> list[Pair]:
    """Search all stored cases and write duplicates.parquet beside cases.parquet; returns its lines."""
    pairs = find_duplicates(cases, spec.reference_order)
    _write(url, pairs)
    return pairs


def read_duplicates(url: str) -> list[Pair]:
    """Return the lines of duplicates.parquet, the most alike first; empty when no search was made yet."""
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(url, TABLE))))
    except FileNotFoundError:
        return []
    return table.to_pylist()


def links(url: str) -> list[tuple[Subject, Subject]]:
    """Return the linked subjects as splits want them."""
    return [
        ((line["dataset_a"], line["subject_a"]), (line["dataset_b"], line["subject_b"]))
        for line in read_duplicates(url)
    ]


def linked_to(url: str, dataset: str, subject: str) -> list[Subject]:
    """Return the subjects that look like this one."""
    me = (dataset, subject)
    return sorted(b if a == me else a for a, b in links(url) if me in (a, b))


def remove_subject(url: str, dataset: str, subject: str) -> None:
    """Erase a subject from the table."""
    me = (dataset, subject)
    lines = read_duplicates(url)
    kept = [x for x in lines if me not in ((x["dataset_a"], x["subject_a"]), (x["dataset_b"], x["subject_b"]))]
    if len(kept) < len(lines):
        _write(url, kept)


def find_duplicates(cases: pa.Table, reference_order: Sequence[str], threshold: float | None = None) -> list[Pair]:
    """Return pairs of different subjects whose fingerprints are alike: one line a pair, the most alike first.

    cases: cases.parquet. Fingerprints are of a case's reference modality, so only cases with the same one are compared;
    groups of fewer than MIN_SUBJECTS subjects are passed over. threshold: None: THRESHOLD, and FEW_THRESHOLD in groups
    of fewer than ROBUST_SUBJECTS subjects. Cost: one product of (cases, cells) with itself.
    """
    groups = _groups(cases, reference_order)
    best: dict[tuple[Subject, Subject], Pair] = {}
    for group in groups.values():
        subjects = len({_subject(line) for line in group})
        if subjects >= MIN_SUBJECTS:
            for pair in _pairs(group, threshold_for(subjects) if threshold is None else threshold):
                key = ((pair["dataset_a"], pair["subject_a"]), (pair["dataset_b"], pair["subject_b"]))
                if key not in best or pair["similarity"] > best[key]["similarity"]:
                    best[key] = pair
    return sorted(best.values(), key=lambda p: (-p["similarity"], p["dataset_a"], p["subject_a"], p["subject_b"]))


def threshold_for(subjects: int) -> float:
    """Return the similarity from which on two of so many subjects count as one person."""
    return THRESHOLD if subjects >= ROBUST_SUBJECTS else FEW_THRESHOLD


def passed_over(cases: pa.Table, reference_order: Sequence[str]) -> dict[str, int]:
    """Return the subjects by reference modality that are too few to be compared."""
    subjects: dict[str, set[Subject]] = {}
    for line in cases.select(["dataset", "subject", "status", "modalities"]).to_pylist():
        if line["status"] == "stored" and line["modalities"]:  # a connectome alone has no fingerprint
            subjects.setdefault(reference_of(line, reference_order), set()).add(_subject(line))
    return {reference: len(some) for reference, some in sorted(subjects.items()) if len(some) < MIN_SUBJECTS}


def _groups(cases: pa.Table, reference_order: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the stored cases that have a fingerprint by their reference modality."""
    lines = cases.select(["dataset", "subject", "case", "status", "modalities"]).to_pylist()
    groups: dict[str, list[dict[str, Any]]] = {}
    for line, print_ in zip(lines, fingerprints_of(cases), strict=True):
        if line["status"] == "stored" and len(print_) == EDGE**3 and print_.any():
            groups.setdefault(reference_of(line, reference_order), []).append({**line, "fingerprint": print_})
    return groups


def reference_of(line: Mapping[str, Any], reference_order: Sequence[str]) -> str:
    """Return the modality that the fingerprint of a case (with its `modalities`) was taken from; empty without one."""
    return next((m for m in reference_order if m in line["modalities"]), "")


def signatures(prints: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return what is particular in each fingerprint as unit vectors, (cases, cells) float32.

    prints: (cases, EDGE^3). first: indices of one case per subject, from which the common part is taken.
    """
    own = prints if len(first) == len(prints) else prints[first]
    cells = (own != 0).mean(axis=0) > COMMON
    mean = own.mean(axis=0)
    rest = prints[:, cells]
    rest -= mean[cells]
    _remove(rest, _basis(_shared_patterns(mean)[cells]))
    count = min(MAX_COMPONENTS, len(first) // SUBJECTS_PER_COMPONENT)
    own = rest if len(first) == len(prints) else rest[first]
    # The eigenvectors of the smaller Gram matrix would do as well; cells are at most EDGE^3.
    with threadpool_limits(1):  # the threads of BLAS wait by spinning: on busy cores that took twenty times as long
        _, vectors = np.linalg.eigh(own.T @ own)
    _remove(rest, vectors[:, ::-1][:, :count])
    rest /= np.maximum(np.linalg.norm(rest, axis=1, keepdims=True), 1e-9)
    return rest


def _remove(rest: np.ndarray, basis: np.ndarray) -> None:
    """Take what lies in the span of orthonormal columns out of every row, block by block: without copies of it all."""
    for begin in range(0, len(rest), BLOCK):
        block = rest[begin : begin + BLOCK]
        block -= (block @ basis) @ basis.T


def _pairs(group: list[dict[str, Any]], threshold: float) -> Iterator[Pair]:
    prints = np.stack([line["fingerprint"] for line in group])
    numbers: dict[Subject, int] = {}
    owner = np.array([numbers.setdefault(_subject(line), len(numbers)) for line in group])
    _, first = np.unique(owner, return_index=True)
    alike = signatures(prints, first)
    for begin in range(0, len(group), BLOCK):
        block = alike[begin : begin + BLOCK] @ alike[begin:].T
        for i, j in np.argwhere(np.triu(block, 1) >= threshold):
            one, other = sorted((group[begin + i], group[begin + j]), key=lambda x: (*_subject(x), x["case"]))
            if _subject(one) != _subject(other):
                yield {
                    **{f"{name}_a": one[name] for name in ("dataset", "subject", "case")},
                    **{f"{name}_b": other[name] for name in ("dataset", "subject", "case")},
                    "similarity": round(float(block[i, j]), 4),
                }


def _shared_patterns(mean: np.ndarray) -> np.ndarray:
    """Return what may differ between two pictures of one person, (EDGE^3, patterns)."""
    v = mean.reshape(EDGE, EDGE, EDGE).astype(np.float64)
    gx, gy, gz = np.gradient(v)
    ax = (np.arange(EDGE) - (EDGE - 1) / 2) / EDGE
    x, y, z = np.meshgrid(ax, ax, ax, indexing="ij")
    moves = [gx, gy, gz]
    turns_and_scales = [x * gy, y * gx, y * gz, z * gy, x * gz, z * gx, x * gx, y * gy, z * gz]
    contrast = [np.ones_like(v), v, v * v, v**3]
    bias = [x, y, z, x * x, y * y, z * z, x * y, y * z, x * z]
    return np.stack([pattern.ravel() for pattern in (*moves, *turns_and_scales, *contrast, *bias)], axis=1)


def _basis(patterns: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis of the columns, (cells, k)."""
    basis, _ = np.linalg.qr(patterns)
    return basis.astype(np.float32)


def _subject(line: dict[str, Any]) -> Subject:
    return line["dataset"], line["subject"]


def _write(url: str, pairs: Sequence[Pair]) -> None:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(pairs), schema=SCHEMA), sink)
    storage.write_bytes(storage.join(url, TABLE), sink.getvalue())
