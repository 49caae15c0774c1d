"""A workspace for evaluations: a small store of blobs, its split, phenotypes and latents, and played pre-trainings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from training_phantoms import DATASET, write_blobs

from models.recipes import find_recipe
from models.records import SelectedCase
from models.selection import write_selection
from models.store import open_store, open_writer
from tasks.benchmarks import BENCHMARKS
from tasks.splits import write_split

CASES = 20
TUMOUR = BENCHMARKS["phantom-tumour"].replace(name="blobs-tumour", datasets=(DATASET,))
DIAGNOSIS = BENCHMARKS["phantom-diagnosis"].replace(name="blobs-diagnosis", datasets=(DATASET,))


ROLES = ["train"] * 8 + ["val"] * 2 + ["test"] * 10
"""Of the cases, in their order."""


def write_workspace(folder: Path) -> None:
    """Write everything but a pre-training."""
    write_blobs(str(folder / "store.zarr"), cases=CASES)
    _add_qc(str(folder / "store.zarr"))
    subjects = [f"sub-{k}" for k in range(CASES)]
    write_split(
        pd.DataFrame({"dataset": DATASET, "subject": subjects, "split": ROLES}), folder / "splits" / "default.parquet"
    )
    phenotypes = {"dataset": DATASET, "subject": subjects, "session": "", "age": np.arange(CASES) + 40.0, "sex": "F"}
    diagnosis = [("control", "patient")[k % 2] for k in range(CASES)]
    pd.DataFrame({**phenotypes, "diagnosis": diagnosis}).to_parquet(folder / "phenotypes.parquet")
    latents = {"dataset": DATASET, "subject": subjects, "age": 50.0, "head_scale": 1.0, "grey_loss": 0.1}
    latents |= {"ventricle_log": 0.0, "medial_temporal_loss": np.arange(CASES) % 2 * 1.0}
    (folder / "sources" / DATASET).mkdir(parents=True)
    pd.DataFrame(latents).to_parquet(folder / "sources" / DATASET / "latents.parquet")


def _add_qc(url: str) -> None:
    table = open_store(url).cases()
    qc = pa.array([json.dumps({"foreground_share": 0.4 + 0.01 * k}) for k in range(table.num_rows)])
    open_writer(url).publish(table.append_column("qc", qc).append_column("files", pa.array(["[]"] * len(qc))), "0")


def write_pretraining(folder: Path, rows: list[int], name: str = "tiny", recipe: str = "brainmvp_tiny") -> None:
    """Write what a pre-training on these rows of the store leaves."""
    training = folder / "trainings" / name
    training.mkdir(parents=True, exist_ok=True)
    cases = open_store(str(folder / "store.zarr")).cases().to_pandas().set_index("row")
    lines = [
        SelectedCase(
            dataset=DATASET, row=k, case=cases.loc[k, "case"], subject=cases.loc[k, "subject"],
            digest=cases.loc[k, "digest"], role="train",
        )
        for k in rows
    ]  # fmt: skip
    write_selection(training / "selection.parquet", lines)
    (training / "done.json").write_text(json.dumps({"weights_digest": "abc", "config_digest": "def"}))
    config = find_recipe(recipe)(str(folder / "store.zarr"), str(training / "selection.parquet"), epochs=1)
    (training / "run.json").write_text(config.model_dump_json())
