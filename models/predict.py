"""Predictions of a supervised training for its test cases: one .npz a case, one table over all."""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from infra import storage
from models.config import SupervisedConfig, TrainingConfig
from models.data import CaseDataset
from models.distributed import World, barrier
from models.embed import inference_device
from models.filling import Templates
from models.finished import read_training
from models.heartbeat import beat, beating
from models.objectives import build_objective
from models.objectives.supervised import TEMPLATES, Supervised
from models.predict_times import PredictTimes, write_times
from models.prediction_files import FOLDER, PLACE, TABLE, place_of
from models.records import SelectedCase
from models.selection import check_selection, read_selection
from models.state import Stop, Stopped, TrainingState, configure_numerics, evaluating
from models.store import open_store


def predict_cases(state: TrainingState, stop: Stop = lambda: False) -> int:
    """Write predictions/<case>.npz for each test case and predictions/predictions.parquet; return their number.

    How long it took is written beside (models.predict_times).

    Rank r predicts cases r, r + world, ...; every rank calls this. Raises TypeError for an objective that cannot.
    """
    if not isinstance(state.objective, Supervised):
        raise TypeError(f"training {state.config.name}: objective {state.config.objective.kind!r} predicts nothing")
    beat("predicting", state.step)
    with evaluating(state):
        return _predict(state.objective, state.dataset("test"), state.config, state.folder, state.world, stop)


def predict_again(config: TrainingConfig, folder: Path, world: World, stop: Stop = lambda: False) -> int:
    """Write the predictions of a finished training once more, from its weights; return their number.

    Every rank calls this. Raises SelectionError when the store no longer holds the selected cases, and as
    `load_objective`.
    """
    configure_numerics(config, world)
    selection = read_selection(config.data.selection)
    check_selection(selection, open_store(config.data.store))
    objective = load_objective(folder).to(world.device)
    if config.channels_last:
        objective.use_channels_last()
    dataset = CaseDataset(config.data.store, selection, objective.sampler(), "test", config.seed)
    with beating(folder, world.rank), torch.no_grad():
        return _predict(objective, dataset, config, folder, world, stop)


def _predict(
    objective: Supervised, dataset: CaseDataset, config: TrainingConfig, folder: Path, world: World, stop: Stop
) -> int:
    names = file_names(dataset.cases)
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    begun = time.perf_counter()
    for index in range(world.rank, len(dataset), world.size):
        beat(f"predicting test case {index + 1} of {len(dataset)}")
        if stop():
            raise Stopped(f"training {config.name} was stopped while predicting")
        arrays = objective.predict(dataset.info(index), dataset.reader(index))
        _write_arrays(place / names[index], arrays)
    barrier(world)
    if world.is_main:
        _write_table(place, config, dataset, names)
        took = time.perf_counter() - begun
        write_times(folder, PredictTimes(seconds=took, cases=len(dataset), ranks=world.size))
    return len(dataset)


def file_names(cases: Sequence[SelectedCase]) -> list[str]:
    """Return a file name per case: `<case>.npz`, or `<dataset>_<case>.npz` where two datasets share a case id."""
    counts = Counter(case.case for case in cases)
    return [f"{case.case}.npz" if counts[case.case] == 1 else f"{case.dataset}_{case.case}.npz" for case in cases]


def read_prediction(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Return the arrays of one prediction file of a training folder."""
    with np.load(folder / FOLDER / name, allow_pickle=False) as arrays:
        return dict(arrays)


def load_objective(folder: Path) -> Supervised:
    """Return a finished fine-tuning, ready to `predict`: in eval mode, on the GPU if there is one.

    Raises NotFinishedError when the training is not finished or its weights were changed, TypeError for a pre-training,
    RuntimeError naming the first key when weights and config do not belong together.
    """
    finished = read_training(folder)
    config, tensors = finished.config, dict(finished.tensors)
    if not isinstance(config.objective, SupervisedConfig):
        raise TypeError(f"training {config.name}: objective {config.objective.kind!r} predicts nothing")
    objective = build_objective(config, finished.spec)
    assert isinstance(objective, Supervised)
    if TEMPLATES in tensors:
        objective.use_templates(Templates(tensors.pop(TEMPLATES).numpy()))
    objective.load_state_dict(tensors)
    return objective.to(inference_device()).eval()


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # names become keywords
    storage.write_bytes(str(path), buffer.getvalue())


def _write_table(folder: Path, config: TrainingConfig, dataset: CaseDataset, names: Sequence[str]) -> None:
    keys = ("case", "subject", "dataset", "row", "role", "target")
    columns: dict[str, list[Any]] = {key: [getattr(case, key) for case in dataset.cases] for key in keys}
    columns["file"] = list(names)
    places = [place_of(dataset.stored(index)) for index in range(len(dataset))]
    columns |= {key: [place[key] for place in places] for key in PLACE}
    if config.objective.kind == "classification":
        found = [read_prediction(folder.parent, name)["probabilities"] for name in names]
        for k, label in enumerate(config.objective.classes):
            columns[f"prob_{label}"] = [float(probabilities[k]) for probabilities in found]
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    storage.write_bytes(str(folder / TABLE), buffer.getvalue())
