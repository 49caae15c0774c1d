"""A tiny store with real arrays, for the tests of training: smooth blobs whose class and lesion can be learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from models.config import BrainMVPConfig, DataConfig, NetworkConfig, OptimiserConfig, TrainingConfig
from models.records import CaseGeometry, Receipt, SelectedCase
from models.selection import write_selection
from models.spec import PreprocessSpec
from models.store import case_digest, create_or_open
from tasks.fingerprint import EDGE

SPEC = PreprocessSpec(
    name="blobs",
    spacing_mm=4.0,
    grid=(48, 48, 48),
    frame="template",
    grid_affine=((4.0, 0.0, 0.0, -96.0), (0.0, 4.0, 0.0, -96.0), (0.0, 0.0, 4.0, -96.0), (0.0, 0.0, 0.0, 1.0)),
    modalities=("flair", "t1", "t1c", "t2"),
)
DATASET = "blobs"
EXTENT = (40, 44, 36)
ORIGIN = (4, 2, 6)


def blob_case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return image (4, x, y, z) float16, label (x, y, z) uint8 and present (4,) of one case."""
    rng = np.random.default_rng(seed)
    axes = [np.linspace(-1, 1, n) for n in EXTENT]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    brain = (x**2 + y**2 + z**2 < rng.uniform(0.6, 0.9)).astype(np.float32)
    centre = rng.uniform(-0.3, 0.3, 3)
    distance = np.sqrt((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2)
    label = np.select([distance < 0.15, distance < 0.25, distance < 0.4], [1, 3, 2], 0).astype(np.uint8)
    texture = 0.5 + 0.3 * np.sin(5 * x + seed) * np.cos(4 * y) + 0.05 * rng.standard_normal(EXTENT)
    contrasts = [(0.4, 0.5), (0.8, -0.3), (0.7, 0.2), (0.5, 0.4)]
    image = np.stack([brain * np.clip(a * texture + b * (label > 0), 0.02, 1) for a, b in contrasts])
    present = np.array([True, True, seed % 3 != 0, True])
    image[~present] = 0
    return image.astype(np.float16), label, present


def write_blobs(url: str, cases: int = 8, spec: PreprocessSpec = SPEC) -> list[SelectedCase]:
    """Write a finalised store of `cases` cases and return the selection lines: the last two validate and test.

    A spec with fewer modalities takes the first channels.
    """
    writer = create_or_open(url, spec)
    writer.grow(DATASET, cases, with_label=True)
    affine = np.array(SPEC.grid_affine) + 0.0
    affine[:3, 3] += 4.0 * np.array(ORIGIN)
    geometry = CaseGeometry(affine=tuple(map(tuple, affine.tolist())), origin=ORIGIN)
    receipts, selection, lines = [], [], []
    for row in range(cases):
        image, label, present = blob_case(row)
        image, present = image[: len(spec.modalities)], present[: len(spec.modalities)]
        writer.write_case(DATASET, row, image, label)
        digest = case_digest(image, label, present, affine, ORIGIN)
        names = tuple(m for m, here in zip(spec.modalities, present, strict=True) if here)
        common = {"dataset": DATASET, "row": row, "case": f"case-{row}", "subject": f"sub-{row}", "digest": digest}
        receipts.append(
            Receipt(
                **common,
                spec_digest=spec.content_digest(),
                files=(),
                status="stored",
                modalities=names,
                has_label=True,
                extent=EXTENT,
                geometry=geometry,
            )
        )
        lines.append(
            common
            | {"session": "", "label_scheme": "brats2023", "split": "", "status": "stored", "reason": "", "detail": ""}
            | {"modalities": list(names), "has_label": True, "extent": list(EXTENT), "fingerprint": [0.0]}
        )
        role = "train" if row < cases - 2 else ("val" if row == cases - 2 else "test")
        selection.append(SelectedCase(**common, role=role, target=("control", "patient")[row % 2]))
    writer.write_small(DATASET, receipts, {row: f"case-{row}" for row in range(cases)})
    writer.publish(pa.Table.from_pylist(lines), "0")
    return selection


def draw_prints(people: int, cells: int = 300) -> np.ndarray:
    """Return fingerprints (people, EDGE^3) with tissue in some cells: what people share, and what is each one's own."""
    rng = np.random.default_rng(people)
    shared = 3 * rng.standard_normal((people, 1)) @ rng.standard_normal((1, cells))
    prints = np.zeros((people, EDGE**3))
    prints[:, :cells] = shared + rng.standard_normal((people, cells))
    return prints.round(3)


def small_config(folder: Path, store: str, **changes: object) -> TrainingConfig:
    """Return a BrainMVP config of some 10^4 weights; a step takes a few hundredths of a second."""
    config = TrainingConfig(
        name=folder.name,
        recipe="test",
        network=NetworkConfig(embed_dims=(4, 8, 8, 16), depths=(1, 1, 1, 1), head_dim=8, mlp_ratio=1, decoder_dim=4),
        objective=BrainMVPConfig(
            contrast_from_epoch=1, temperature=0.1, projector_dim=8, template_init="mean", weight_contrast=0.1
        ),
        data=DataConfig(store=store, selection=str(folder / "selection.parquet"), crop=(16, 16, 16), batch_size=2),
        optimiser=OptimiserConfig(lr=1e-3, warmup_share=0.1),
        epochs=4,
        checkpoint_every=3,
        validate_every=4,
    )
    return config.replace(**changes)


def make_training(folder: Path, store: str, selection: list[SelectedCase], **changes: object) -> TrainingConfig:
    """Write selection.parquet and run.json of a small training and return its config."""
    folder.mkdir(parents=True)
    write_selection(folder / "selection.parquet", selection)
    config = small_config(folder, store, **changes)
    (folder / "run.json").write_text(config.model_dump_json())
    return config
