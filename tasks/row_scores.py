"""The cross-validated scores of one row of a table, kept by what they were made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from models.records import digest_of
from tasks.probe_cohort import ProbeCohort
from tasks.probes import Bools, Floats
from tasks.scores import RowKey, inputs_digest, kept_scores, prediction_scores, probability_scores, score_path

RULES_VERSION = 1
"""Raised when a rule of the probes changes, so that kept scores are computed again."""


@dataclass(frozen=True)
class Seed:
    """The predictions of one seed of a row."""

    made_from: object
    """What decides them beside the cases, their targets and folds; JSON-able."""
    predict: Callable[[ProbeCohort], Floats]
    """Probabilities (N, K), or numbers (N,), of every case by what was fitted on the folds that it is not in."""
    scored: Bools | None = None
    """(N,) the cases that have a prediction; None: all."""


def score_row(cohort: ProbeCohort, row: str, seeds: Sequence[Seed], folder: Path) -> tuple[pd.DataFrame, int]:
    """Return the long-form scores of all seeds of a row, with the fold of every case, and how many were computed now.

    `folder` keeps them, one file a seed. A negative control has another shuffle for every seed.
    """
    frames, fresh = [], 0
    for number, seed in enumerate(seeds):
        own, key = cohort.of_seed(number), RowKey(cohort.benchmark.name, row, number)
        inputs = inputs_digest(
            key, own.benchmark, own.cases, digest_of([seed.made_from, own.folds_digest, RULES_VERSION])
        )
        frame, computed = kept_scores(score_path(folder, key), inputs, partial(_scores, own, key, seed))
        frames.append(frame)
        fresh += computed
    return pd.concat(frames, ignore_index=True), fresh


def _scores(cohort: ProbeCohort, key: RowKey, seed: Seed) -> pd.DataFrame:
    values = seed.predict(cohort)
    scored = np.ones(len(cohort.cases), dtype=bool) if seed.scored is None else seed.scored
    cases = [case for case, here in zip(cohort.cases, scored, strict=True) if here]
    if cohort.benchmark.kind == "regression":
        frame = prediction_scores(key, cases, values[scored])
    else:
        frame = probability_scores(key, cohort.benchmark, cases, values[scored])
    folds = {(case.dataset, case.case): int(fold) for case, fold in zip(cohort.cases, cohort.fold, strict=True)}
    pairs = zip(frame["dataset"], frame["case"], strict=True)
    return frame.assign(fold=[folds[pair] for pair in pairs])
