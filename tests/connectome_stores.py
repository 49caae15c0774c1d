"""Small finalised stores with images, connectomes or both, written without files: what CINP reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from models.connectomes import ConnectomeSpec
from models.records import CaseGeometry, Receipt, SelectedCase
from models.spec import SPECS, PreprocessSpec
from models.store import case_digest, create_or_open
from models.store_connectomes import FRAMES, digest_bytes

DATASET = "toy-connect"
FEW = ConnectomeSpec(atlas="six", regions=tuple("abcdef"), values=tuple(range(1, 7)))
SPEC = SPECS["cinp_tiny"].replace(name="toy", connectome=FEW)
"""The 6 mm grid (32, 40, 32) of t1 and six regions."""


@dataclass(frozen=True)
class Made:
    """One case of the store."""

    subject: str
    session: str = ""
    image: bool = True
    network: bool = True
    role: str = "train"
    target: str = ""
    age: float | None = None

    @property
    def case(self) -> str:
        """Subject and session."""
        return f"{self.subject}_{self.session}" if self.session else self.subject


def traits_of(number: int) -> np.ndarray:
    """Return the two numbers that image and connectome of a subject share."""
    return np.random.default_rng([7, number]).standard_normal(2)


def image_of(number: int, spec: PreprocessSpec = SPEC) -> np.ndarray:
    """Return a ball (1, x, y, z) float16 in [0, 1] whose halves are as bright as the subject's traits say."""
    axes = np.meshgrid(*(np.linspace(-1, 1, edge) for edge in spec.grid), indexing="ij")
    ball = sum(axis**2 for axis in axes) < 0.8
    left, right = 0.5 + 0.15 * traits_of(number)
    noise = 0.02 * np.random.default_rng([8, number]).standard_normal(spec.grid)
    return (np.where(axes[0] < 0, left, right) + noise).clip(0.01, 1)[None].astype(np.float16) * ball


def matrix_of(number: int, spec: PreprocessSpec = SPEC) -> np.ndarray:
    """Return a connectome (R, R) float32 whose two blocks are as strong as the subject's traits say."""
    assert spec.connectome is not None
    count = len(spec.connectome.regions)
    noise = 0.1 * np.random.default_rng([9, number]).standard_normal((count, count))
    first, second = 0.5 + 0.3 * traits_of(number)
    block = np.arange(count) < count // 2
    strength = np.where(np.outer(block, block), first, np.where(np.outer(~block, ~block), second, 0.1))
    matrix = strength + (noise + noise.T) / 2
    np.fill_diagonal(matrix, 0)
    return matrix.astype(np.float32)


def write_store(url: str, cases: Sequence[Made], spec: PreprocessSpec = SPEC) -> list[SelectedCase]:
    """Write a finalised store, a row a case, and return the selection of all of them."""
    assert spec.connectome is not None
    writer = create_or_open(url, spec)
    writer.grow(DATASET, len(cases), with_label=False)
    numbers = {subject: n for n, subject in enumerate(dict.fromkeys(case.subject for case in cases))}
    receipts, lines, selection = [], [], []
    for row, made in enumerate(cases):
        number = numbers[made.subject]
        image = image_of(number, spec) if made.image else np.zeros((1, 0, 0, 0), np.float16)
        matrix = matrix_of(number, spec) if made.network else None
        present, affine, origin = np.array([made.image]), np.array(spec.grid_affine), (0, 0, 0)
        writer.write_case(DATASET, row, image, None, present, matrix)
        digest = case_digest(image, None, present, affine, origin, digest_bytes(matrix, spec.connectome))
        common = {"dataset": DATASET, "row": row, "case": made.case, "subject": made.subject, "digest": digest}
        modalities = spec.modalities if made.image else ()
        extent = (image.shape[1], image.shape[2], image.shape[3])
        qc = {FRAMES: 120} if made.network else {}
        receipts.append(
            Receipt(
                **common,
                session=made.session,
                spec_digest=spec.content_digest(),
                files=(),
                status="stored",
                modalities=modalities,
                extent=extent,
                geometry=CaseGeometry(affine=tuple(map(tuple, affine.tolist())), origin=origin),
                qc=qc,
            )
        )
        lines.append(
            common
            | {"session": made.session, "label_scheme": "", "split": "", "status": "stored", "reason": "", "detail": ""}
            | {"modalities": list(modalities), "has_label": False, "extent": list(extent)}
            | {"fingerprint": [0.0] if made.image else [], "qc": json.dumps(qc)}
        )
        selection.append(SelectedCase(**common, role=made.role, target=made.target, age=made.age))
    writer.write_small(DATASET, receipts, {row: made.case for row, made in enumerate(cases)})
    writer.mark_stored(DATASET, range(len(cases)))
    writer.publish(pa.Table.from_pylist(lines), "0")
    return selection
