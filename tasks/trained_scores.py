"""The scores of the rows of one benchmark: kept by what they were made from, computed case by case."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pandas as pd

from models.records import SelectedCase, digest_of
from tasks.case_map import HERE, CaseMap
from tasks.evaluation import Cohort
from tasks.finetune import Finetuning
from tasks.predictions import predictions_digest, read_probabilities, read_regions
from tasks.scores import (
    Predict,
    RowKey,
    inputs_digest,
    kept_scores,
    probability_scores,
    score_path,
    segmentation_scores,
)

Scorer = Callable[[RowKey], pd.DataFrame]


@dataclass(frozen=True)
class RowToScore:
    """Scores to compute: of whom, on which cohort, from which predictions."""

    key: RowKey
    cohort: Cohort
    predictions: str
    """Digest of them."""
    scorer: Scorer


def gather_scores(rows: Sequence[RowToScore], folder: Path) -> tuple[pd.DataFrame, int]:
    """Return the long-form scores of all rows, and how many rows were computed now; `folder` keeps them."""
    frames, fresh = [], 0
    for row in rows:
        key = row.key
        path = score_path(folder, key)
        test, native = row.cohort.of_role("test"), row.cohort.native
        made_from = digest_of([row.predictions, native.digest(test)]) if native else row.predictions
        inputs = inputs_digest(key, row.cohort.benchmark, test, made_from)
        frame, computed = kept_scores(path, inputs, partial(row.scorer, key))
        frames.append(frame)
        fresh += computed
    return (pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()), fresh


def score_trainings(
    cohort: Cohort, trainings: Sequence[Finetuning], folder: Path, work: CaseMap = HERE
) -> tuple[pd.DataFrame, int]:
    """Return the long-form scores of finished trainings and how many of them were computed now."""
    rows = []
    for training in trainings:
        own = cohort.of_seed(training.own_seed)
        key = RowKey(cohort.benchmark.name, training.row, training.seed)
        rows.append(RowToScore(key, own, predictions_digest(training.folder), _scorer(own, training, work)))
    return gather_scores(rows, folder)


def _scorer(cohort: Cohort, training: Finetuning, work: CaseMap) -> Scorer:
    benchmark, test = cohort.benchmark, cohort.of_role("test")

    def score(key: RowKey) -> pd.DataFrame:
        if benchmark.kind == "classification":
            return probability_scores(
                key, benchmark, test, read_probabilities(training.folder, test, benchmark.classes)
            )
        sent = cohort.for_workers()
        predict = partial(on_truth, sent, partial(trained_masks, sent, training.folder))
        return score_regions(key, cohort, sent, predict, work)

    return score


def score_regions(key: RowKey, cohort: Cohort, sent: Cohort, predict: Predict, work: CaseMap) -> pd.DataFrame:
    """Return the scores of a segmentation's test cases; `predict` gives masks on the grid of their truth, picklable.

    sent: the cohort for workers that `predict` reads by, too: what one has opened the other need not open again.
    """
    voxels = math.prod(cohort.store.spec.grid)
    return segmentation_scores(key, cohort.benchmark, cohort.of_role("test"), predict, sent.truth, work, voxels)


def trained_masks(cohort: Cohort, folder: Path, case: SelectedCase) -> npt.NDArray[Any]:
    """Return the masks (R, X, Y, Z) that a training predicted on the stored extent; raises as `read_regions`."""
    return read_regions(folder, case, cohort.stored(case))


def on_truth(cohort: Cohort, predict: Predict, case: SelectedCase) -> npt.NDArray[Any]:
    """Return what `predict` gives on the stored extent of a case on the grid that it is scored on."""
    return cohort.on_grid(case, predict(case))
