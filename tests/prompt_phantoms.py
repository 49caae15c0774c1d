"""A small store whose images and connectomes share two traits, and CINP trainings in closed form, for prompt tests.

The class of a subject is the sign of the difference between its traits. A training has random encoders; its projections
are fitted to that difference by least squares, so that prompting works without any training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from connectome_stores import DATASET, SPEC, Made, traits_of, write_store

from models.config import TrainingConfig
from models.config_cinp import ConnectomeNetworkConfig
from models.embed_networks import FrozenPair, embed_connectomes, embed_images, load_pair
from models.export import write_weights
from models.finished import write_settings
from models.objectives.cinp import CINP
from models.recipes import find_recipe
from models.records import SelectedCase
from models.selection import write_selection
from models.store import open_store, open_writer
from tasks.prompt_tasks import PROMPT_TASKS

BOTH, ALONE = 30, 3
"""Subjects with image and connectome; with an image alone, and as many with a connectome alone."""
CASES = BOTH + 2 * ALONE
TOY = PROMPT_TASKS["phantom-connect-diagnosis"].replace(name="toy-diagnosis", datasets=(DATASET,))
SHUFFLED = TOY.replace(name="toy-shuffled", shuffle_seed=5, control="negative")
TEMPERATURE = 0.2


def made_cases() -> list[Made]:
    """Return 30 subjects with both, then three with an image alone and three with a connectome alone."""
    return [Made(f"sub-{k:02d}", image=k < BOTH + ALONE, network=k < BOTH or k >= BOTH + ALONE) for k in range(CASES)]


def contrast_of(number: int) -> float:
    """Return the difference between a subject's traits, whose sign is its class."""
    first, second = traits_of(number)
    return float(first - second)


def people_of_toys() -> pd.DataFrame:
    """Return the phenotypes."""
    numbers = range(CASES)
    return pd.DataFrame(
        {
            "dataset": DATASET,
            "subject": [f"sub-{k:02d}" for k in numbers],
            "session": "",
            "age": [20.0 + k for k in numbers],
            "sex": ["MF"[k % 2] for k in numbers],
            "site": ["AB"[k // 2 % 2] for k in numbers],
            "diagnosis": [("control", "hypoconnected")[contrast_of(k) > 0] for k in numbers],
        }
    )


def write_workspace(folder: Path, cases: Sequence[Made] | None = None) -> list[SelectedCase]:
    """Write store, phenotypes and latents; returns a selection of all cases."""
    url = str(folder / "store.zarr")
    selection = write_store(url, made_cases() if cases is None else cases)
    table = open_store(url).cases()
    open_writer(url).publish(table.append_column("files", pa.array(["[]"] * len(table))), "0")
    people_of_toys().to_parquet(folder / "phenotypes.parquet")
    latents = people_of_toys()[["dataset", "subject"]].assign(contrast=[contrast_of(k) for k in range(CASES)])
    (folder / "sources" / DATASET).mkdir(parents=True)
    latents.to_parquet(folder / "sources" / DATASET / "latents.parquet")
    return selection


def tiny_config(folder: Path, **objective: Any) -> TrainingConfig:
    """Return the tiny recipe, smaller still."""
    base = find_recipe("cinp_tiny")("store", str(folder / "selection.parquet"))
    network = base.network.replace(width=24, heads=2, mlp_ratio=1)
    sizes = {"network_encoder": ConnectomeNetworkConfig(width=16, heads=2, hidden=16, depth=1), "embedding_dim": 2}
    settings = base.objective.replace(**{**sizes, "decoder_width": 12, "decoder_heads": 2, **objective})
    return base.replace(network=network, objective=settings, name=folder.name)


def write_pair(
    folder: Path, seed: int, selection: Sequence[SelectedCase] = (), spec: Any = SPEC, **objective: Any
) -> Path:
    """Write a finished training with the random weights of a seed; with `selection` its projections are fitted to it.

    selection: cases of `<workspace>/store.zarr`, none of which counts as seen.
    """
    folder.mkdir(parents=True)
    config = tiny_config(folder, **objective)
    torch.manual_seed(1000 + seed)
    built = CINP(config, spec)
    state = dict(built.state_dict())
    if "temperature" in state:
        state["temperature"] = torch.tensor(TEMPERATURE)
    write_settings(folder, config, spec)
    write_selection(folder / "selection.parquet", [])
    (folder / "run.json").write_text(config.replace(seed=seed).model_dump_json())
    _finish(folder, state)
    if selection:
        _finish(folder, state | _fitted(load_pair(folder), folder.parents[1] / "store.zarr", selection))
    return folder


def _finish(folder: Path, state: dict[str, torch.Tensor]) -> None:
    digest = write_weights(folder, state)
    (folder / "done.json").write_text(json.dumps({"weights_digest": digest, "config_digest": "x"}))


def _fitted(pair: FrozenPair, url: Path, selection: Sequence[SelectedCase]) -> dict[str, torch.Tensor]:
    """Return projections to (contrast, 1) by ridge regression on the cases with both."""
    both = [case for case in selection if int(case.subject[-2:]) < BOTH]
    dataset = open_store(str(url)).dataset(DATASET)
    rows = [case.row for case in both]
    wanted = np.array([[contrast_of(int(case.subject[-2:])), 1.0] for case in both])
    found: dict[str, torch.Tensor] = {}
    for part, embed in (("image_projection", embed_images), ("network_projection", embed_connectomes)):
        features = embed(pair, dataset, rows).features.astype(np.float64)
        mean = features.mean(axis=0)
        centred = features - mean
        penalty = 1e-3 * np.trace(centred.T @ centred) / len(mean) * np.eye(len(mean))
        weight = np.linalg.solve(centred.T @ centred + penalty, centred.T @ (wanted - wanted.mean(axis=0))).T
        bias = wanted.mean(axis=0) - weight @ mean
        found |= {f"{part}.weight": torch.tensor(weight).float(), f"{part}.bias": torch.tensor(bias).float()}
    return found
