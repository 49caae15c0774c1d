"""A small store of grey-matter blobs with phenotypes, and finished trainings with random weights, for probe tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from training_phantoms import DATASET, SPEC, write_blobs

from models.config import AnyNetwork, ResNet3DConfig
from models.export import write_weights
from models.finished import write_settings
from models.networks.build import build_encoder
from models.recipes import find_recipe
from models.records import SelectedCase
from models.selection import write_selection
from models.spec import PreprocessSpec
from models.store import open_store, open_writer
from tasks.probe_tasks import PROBES

CASES = 24
GM = SPEC.replace(name="gm-blobs", modalities=("gm",))
NETWORK = ResNet3DConfig(blocks=(1, 1, 1, 1), widths=(4, 4, 4, 8))
AGE = PROBES["phantom-anat-age"].replace(name="blobs-age", datasets=(DATASET,))
AD = PROBES["phantom-anat-ad"].replace(name="blobs-ad", datasets=(DATASET,))


def write_workspace(folder: Path, cases: int = CASES) -> Path:
    """Write store, phenotypes and latents: ages follow the size of the brain, the diagnosis is half and half."""
    url = str(folder / "store.zarr")
    write_blobs(url, cases=cases, spec=GM)
    table = open_store(url).cases()
    open_writer(url).publish(table.append_column("files", pa.array(["[]"] * len(table))), "0")
    people_of_blobs(cases).to_parquet(folder / "phenotypes.parquet")
    latents = people_of_blobs(cases)[["dataset", "subject", "age"]].assign(thinning=np.arange(cases) % 2 * 1.0)
    (folder / "sources" / DATASET).mkdir(parents=True)
    latents.to_parquet(folder / "sources" / DATASET / "latents.parquet")
    return folder


def people_of_blobs(cases: int = CASES) -> pd.DataFrame:
    """Return the phenotypes: three sites, of which C has a single subject."""
    sizes = np.array([np.random.default_rng(k).uniform(0.6, 0.9) for k in range(cases)])
    return pd.DataFrame(
        {
            "dataset": DATASET,
            "subject": [f"sub-{k}" for k in range(cases)],
            "session": "",
            "age": (20 + 200 * (sizes - 0.6)).round(1),
            "sex": ["M" if k % 3 else "F" for k in range(cases)],
            "site": ["C" if k == 5 else "AB"[k // 2 % 2] for k in range(cases)],
            "diagnosis": [("control", "ad-like")[k % 2] for k in range(cases)],
        }
    )


def write_encoder(
    folder: Path,
    seed: int,
    recipe: str = "anatcl_tiny",
    seen: Sequence[SelectedCase] = (),
    network: AnyNetwork = NETWORK,
    spec: PreprocessSpec = GM,
) -> Path:
    """Write a finished training whose encoder has the random weights of a seed."""
    folder.mkdir(parents=True)
    config = find_recipe(recipe)("store", str(folder / "selection.parquet")).replace(network=network, name=folder.name)
    torch.manual_seed(1000 + seed)  # never the weights of a random encoder of the tables
    state = {f"encoder.{name}": value for name, value in build_encoder(config.network).state_dict().items()}
    digest = write_weights(folder, state)
    write_settings(folder, config, spec)
    write_selection(folder / "selection.parquet", seen)
    (folder / "run.json").write_text(config.replace(seed=seed).model_dump_json())
    (folder / "done.json").write_text(json.dumps({"weights_digest": digest, "config_digest": "x"}))
    return folder
