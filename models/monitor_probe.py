"""What the encoder knows of a phenotype while it is pre-trained: k-NN and linear probes of its frozen features.

Every `running.probe_every` epochs and at the end, when the selection's cases have targets: fitted on the training
cases, scored on the validation cases, so both follow the split by subject. A case is the middle crop of one modality,
the one that most cases have, so that neither the place nor the choice of modalities tells the target.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from models.config import SupervisedConfig
from models.config_anatcl import WholeMapConfig
from models.data import CaseDataset
from models.distributed import gather_objects
from models.heartbeat import beat
from models.networks.build import pool
from models.objectives.base import centred_start, read_size
from models.records import MODALITIES
from models.schedule import is_due
from models.selection import Role
from models.state import Stop, TrainingState, evaluating
from models.validate import is_logged

log = logging.getLogger(__name__)

MAX_CASES = 512
"""Of each role; of more every k-th is taken."""
NEIGHBOURS = 5
NOTHING = (
    "no probe: it needs training cases with two or more different targets and a validation case with one; choose "
    "another phenotype or split, or set probe_every to 0"
)
MANY = 10
"""Targets that are all numbers, with more different ones than this, are regressed; all others are classes."""

Found = dict[tuple[str, int], np.ndarray]
"""Features (C,) by role and index of the case in its role."""


@dataclass(frozen=True)
class ProbePlan:
    """Which cases are probed, and in which channel of the store."""

    channel: int
    cases: tuple[tuple[Role, int], ...]
    """Role and index of the case in its role."""


def probe(state: TrainingState, stop: Stop) -> bool:
    """Probe when an epoch that is due has just ended, or the training, and the step has no probe line yet.

    Leaves training untouched. When any rank is told to stop it gives up without a line and returns True on all ranks.
    """
    objective = state.config.objective
    if isinstance(objective, SupervisedConfig):
        return False
    if not is_due(state.plan, state.step, state.config.running.probe_every) or is_logged(state, "probe"):
        return False
    datasets: dict[Role, CaseDataset] = {"train": state.dataset("train"), "val": state.dataset("val")}
    usable = (objective.modality,) if isinstance(objective, WholeMapConfig) else MODALITIES
    plan = plan_probe(datasets, state.store.spec.modalities, usable)
    if plan is None:
        if state.world.is_main:
            log.warning(NOTHING)
        return False
    found, stopped = _local_features(state, datasets, plan, stop)
    parts = gather_objects((found, stopped), state.world)
    if any(stopped for _, stopped in parts):
        return True
    if state.world.is_main:
        _log(state, datasets, {key: value for part, _ in parts for key, value in part.items()})
    return False


def plan_probe(
    datasets: dict[Role, CaseDataset], modalities: Sequence[str], usable: Sequence[str] = MODALITIES
) -> ProbePlan | None:
    """Return what to probe, or None when there is nothing to fit or nothing to score.

    modalities: of the store, in order; usable: those that the encoder was made for.
    """
    known: list[tuple[Role, int, tuple[bool, ...]]] = []
    for role, dataset in datasets.items():
        aimed = [i for i, case in enumerate(dataset.cases) if case.target]
        known += [(role, i, dataset.info(i).present) for i in aimed[:: max(1, -(-len(aimed) // MAX_CASES))]]
    counts = Counter(c for *_, has in known for c, here in enumerate(has) if here and modalities[c] in usable)
    if counts:
        channel = min(counts, key=lambda c: (-counts[c], usable.index(modalities[c])))
        plan = ProbePlan(channel, tuple((role, i) for role, i, present in known if present[channel]))
        fitted = {datasets[role].cases[i].target for role, i in plan.cases if role == "train"}
        if len(fitted) > 1 and any(role == "val" for role, _ in plan.cases):
            return plan
    return None


def _local_features(
    state: TrainingState, datasets: dict[Role, CaseDataset], plan: ProbePlan, stop: Stop
) -> tuple[Found, bool]:
    """Return the features of this rank's share of the cases, and whether it was told to stop."""
    found: Found = {}
    mine, size = plan.cases[state.world.rank :: state.world.size], state.config.data.batch_size
    with evaluating(state):
        for start in range(0, len(mine), size):
            beat(f"probing case {start + 1} of {len(mine)}", state.step)
            if stop():
                return found, True
            keys = mine[start : start + size]
            images = np.concatenate([_middle(state, datasets[role], index, plan.channel) for role, index in keys])
            image = torch.from_numpy(images)[:, None].to(state.world.device)
            found |= dict(zip(keys, pool(state.objective.encoder(image)).float().cpu().numpy(), strict=True))
    return found, False


def _middle(state: TrainingState, dataset: CaseDataset, index: int, channel: int) -> np.ndarray:
    """Return the crop (1, x, y, z) in the middle of the template grid."""
    crop = read_size(state.config.data.crop, state.store.spec.grid)
    start = centred_start(state.store.spec.grid, crop, dataset.info(index).origin)
    return dataset.reader(index).read([channel], start, crop)


def _log(state: TrainingState, datasets: dict[Role, CaseDataset], found: Found) -> None:
    features: dict[str, np.ndarray] = {}
    targets: dict[str, list[str]] = {}
    for role in ("train", "val"):
        indices = sorted(index for of, index in found if of == role)
        features[role] = np.stack([found[(role, index)] for index in indices])
        targets[role] = [datasets[role].cases[index].target for index in indices]
    measure, metrics = probe_scores(features["train"], targets["train"], features["val"], targets["val"])
    counts = {"n_train": len(targets["train"]), "n_val": len(targets["val"])}
    place = {"kind": "probe", "step": state.step, "epoch": state.finished_epoch}
    state.log({**place, "measure": measure, **counts, "metrics": metrics})


def probe_scores(
    train_NC: np.ndarray, train: Sequence[str], val_MC: np.ndarray, val: Sequence[str]
) -> tuple[str, dict[str, float]]:
    """Return the measure's name and `probe_knn`, `probe_linear` and `probe_chance` of frozen features.

    Classes: balanced accuracy over those of the validation cases; 5 nearest by cosine, logistic regression. Numbers
    (see MANY): R2, at least -1; 5 nearest, ridge regression whose strength leave-one-out chooses. Features are
    standardised on the training cases.
    """
    if _are_numbers([*train, *val]):
        return "R2", _regression(train_NC, np.array(train, dtype=float), val_MC, np.array(val, dtype=float))
    return "balanced accuracy", _classification(train_NC, np.array(train), val_MC, np.array(val))


def _classification(
    train_NC: np.ndarray, train_N: np.ndarray, val_MC: np.ndarray, val_M: np.ndarray
) -> dict[str, float]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import recall_score
    from sklearn.neighbors import KNeighborsClassifier

    models = {"probe_knn": KNeighborsClassifier(**_nearest(train_N)), "probe_linear": LogisticRegression(max_iter=1000)}
    found = _predictions(models, train_NC, train_N, val_MC)
    classes = sorted(set(val_M))
    scores = {
        name: float(recall_score(val_M, guess, labels=classes, average="macro", zero_division=0.0))
        for name, guess in found.items()
    }
    return {**scores, "probe_chance": 1 / len(set(train_N))}


def _regression(train_NC: np.ndarray, train_N: np.ndarray, val_MC: np.ndarray, val_M: np.ndarray) -> dict[str, float]:
    from sklearn.linear_model import RidgeCV
    from sklearn.metrics import r2_score
    from sklearn.neighbors import KNeighborsRegressor

    models = {"probe_knn": KNeighborsRegressor(**_nearest(train_N)), "probe_linear": RidgeCV(np.logspace(-2, 4, 13))}
    if len(set(val_M)) < 2:  # R2 divides by their spread
        return {**dict.fromkeys(models, 0.0), "probe_chance": 0.0}
    found = _predictions(models, train_NC, train_N, val_MC)
    return {**{name: max(-1.0, float(r2_score(val_M, guess))) for name, guess in found.items()}, "probe_chance": 0.0}


def _nearest(train_N: np.ndarray) -> dict[str, Any]:
    return {"n_neighbors": min(NEIGHBOURS, len(train_N)), "metric": "cosine"}


def _predictions(
    models: dict[str, Any], train_NC: np.ndarray, train_N: np.ndarray, val_MC: np.ndarray
) -> dict[str, np.ndarray]:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    pipelines = {name: make_pipeline(StandardScaler(), model) for name, model in models.items()}
    return {name: pipeline.fit(train_NC, train_N).predict(val_MC) for name, pipeline in pipelines.items()}


def _are_numbers(targets: Sequence[str]) -> bool:
    try:
        numbers = {float(target) for target in targets}
    except ValueError:
        return False
    return len(numbers) > MANY and all(math.isfinite(number) for number in numbers)
