"""A tiny store of maps and descriptors, for the tests of AnatCL: both change with age, as does nothing else."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pyarrow as pa

from models.anatomy import ATLASES, MEASURES, Atlas
from models.config import TrainingConfig
from models.config_anatcl import AnatCLConfig
from models.recipes import RECIPES
from models.records import CaseGeometry, DescriptorTable, Receipt, SelectedCase
from models.selection import write_selection
from models.spec import PreprocessSpec
from models.store import case_digest, create_or_open
from models.store_descriptors import COUNT, table_bytes

SPEC = PreprocessSpec(
    name="anat",
    spacing_mm=12.0,
    grid=(15, 18, 15),
    frame="template",
    grid_affine=((12.0, 0.0, 0.0, -90.0), (0.0, 12.0, 0.0, -108.0), (0.0, 0.0, 12.0, -72.0), (0.0, 0.0, 0.0, 1.0)),
    modalities=("gm",),
    reference_order=("gm",),
    intensity="keep",
)
DATASET = "anat"
AGES = (20.0, 71.0, 35.0, 52.0, 44.0, 28.0, 63.0, 57.0, 24.0, 49.0, 38.0, 66.0)
MEANS = {MEASURES[0]: 2.6, MEASURES[1]: 5000.0, MEASURES[2]: 2000.0}


def describe(number: int, age: float, atlas: Atlas = "desikan_killiany") -> DescriptorTable:
    """Regions of one case: each measure about its mean, smaller with age by a slope of the region's own."""
    rng, slopes = np.random.default_rng(number), np.random.default_rng(99)
    count = len(ATLASES[atlas])
    values = {}
    for measure, mean in MEANS.items():
        slope = slopes.uniform(0, 0.005, count)
        row = mean * (1 - slope * (age - 45) + 0.03 * rng.standard_normal(count))
        values[measure] = tuple(float(value) for value in row)
    return DescriptorTable(atlas=atlas, basis="freesurfer", values=values)


def map_of(number: int, age: float) -> np.ndarray:
    """A ball of grey matter (1, x, y, z) whose shell thins with age."""
    rng = np.random.default_rng(number)
    axes = np.meshgrid(*(np.linspace(-1, 1, edge) for edge in SPEC.grid), indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    shell = np.exp(-((radius - 0.7) ** 2) / (0.08 - 0.0007 * age))
    return (shell + 0.02 * rng.standard_normal(SPEC.grid))[None].clip(0).astype(np.float16)


def write_anat(
    url: str,
    without_age: Collection[int] = (),
    without_descriptors: Collection[int] = (),
    change: Callable[[int, DescriptorTable], DescriptorTable] = lambda row, table: table,
    atlas: Atlas = "desikan_killiany",
    spec: PreprocessSpec = SPEC,
) -> list[SelectedCase]:
    """Write a finalised store with a case per age and return the selection: the last two validate."""
    writer = create_or_open(url, spec)
    writer.grow(DATASET, len(AGES), with_label=False)
    affine, origin, present = np.array(SPEC.grid_affine), (0, 0, 0), np.array([True])
    receipts, lines, selection = [], [], []
    for row, age in enumerate(AGES):
        image = map_of(row, age)
        table = None if row in without_descriptors else change(row, describe(row, age, atlas))
        writer.write_case(DATASET, row, image, None)
        digest = case_digest(image, None, present, affine, origin, table_bytes(table))
        common = {"dataset": DATASET, "row": row, "case": f"case-{row}", "subject": f"sub-{row}", "digest": digest}
        qc = {} if table is None else {COUNT: int(np.isfinite(table.array()).sum())}
        receipts.append(
            Receipt(
                **common,
                spec_digest=spec.content_digest(),
                files=(),
                status="stored",
                modalities=spec.modalities,
                extent=SPEC.grid,
                geometry=CaseGeometry(affine=tuple(map(tuple, affine.tolist())), origin=origin),
                descriptors=table,
                qc=qc,
            )
        )
        lines.append(
            common
            | {"session": "", "label_scheme": "", "split": "", "status": "stored", "reason": "", "detail": ""}
            | {"modalities": list(spec.modalities), "has_label": False, "extent": list(SPEC.grid)}
            | {"fingerprint": [0.0], "qc": "{}" if table is None else f'{{"{COUNT}": {qc[COUNT]}}}'}
        )
        role = "val" if row >= len(AGES) - 2 else "train"
        selection.append(SelectedCase(**common, role=role, age=None if row in without_age else age))
    writer.write_small(DATASET, receipts, {row: f"case-{row}" for row in range(len(AGES))})
    writer.publish(pa.Table.from_pylist(lines), "0")
    return selection


def tiny_config(folder: Path, store: str, recipe: str = "anatcl_tiny", **changes: object) -> TrainingConfig:
    """Return a tiny recipe on one rank; a step takes a few hundredths of a second."""
    values: dict = {"epochs": 3, "batch_size": 4, "world_size": 1, "checkpoint_every": 2, "validate_every": 0}
    selection = str(folder / "selection.parquet")
    return RECIPES[recipe](store, selection, name=folder.name, **{**values, **changes})


def make_anat_training(folder: Path, store: str, selection: list[SelectedCase], **changes: object) -> TrainingConfig:
    """Write selection.parquet and run.json of a tiny training and return its config."""
    folder.mkdir(parents=True)
    write_selection(folder / "selection.parquet", selection)
    config = tiny_config(folder, store, **changes)
    (folder / "run.json").write_text(config.model_dump_json())
    return config


def settings(**changes: object) -> AnatCLConfig:
    """Return the objective of the paper's preset with changes."""
    return AnatCLConfig().replace(**changes)
