"""The scores of the rows that nothing is trained for: simple baselines, and for phantoms the ceiling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.records import SelectedCase, digest_of
from tasks import baselines
from tasks.case_map import HERE, CaseMap
from tasks.evaluation import Cohort
from tasks.scores import RowKey, probability_scores, region_masks
from tasks.trained_scores import RowToScore, Scorer, gather_scores, on_truth, score_regions

LATENTS: tuple[str, ...] = ("age", "head_scale", "grey_loss", "ventricle_log", "medial_temporal_loss")
"""Columns of latents.parquet that the ceiling sees: what generated the anatomy, never the label itself."""


def score_baselines(cohort: Cohort, folder: Path, seeds: int = 1, work: CaseMap = HERE) -> tuple[pd.DataFrame, int]:
    """Return the scores of the baselines that fit the benchmark's kind (and of the ceiling, for phantoms).

    They have no seed of their own, so one score does; where targets are shuffled, each of the `seeds` shuffles has one.
    """
    shuffles = range(seeds if cohort.benchmark.shuffle_seed is not None else 1)
    rows = [row for seed in shuffles for row in _baseline_rows(cohort.of_seed(seed), seed, work)]
    return gather_scores(rows, folder)


def _baseline_rows(cohort: Cohort, seed: int, work: CaseMap) -> list[RowToScore]:
    if cohort.benchmark.kind == "segmentation":
        scorers: dict[str, Scorer] = {baselines.TEMPLATE_OVERLAP: lambda key: _template_scores(key, cohort, work)}
        made_from = ""
    else:
        scorers = {
            baselines.MAJORITY: lambda key: _majority_scores(key, cohort),
            baselines.AGE_SEX_VOLUME: lambda key: _logistic_scores(key, cohort, _simple_features(cohort)),
        }
        if cohort.latents is not None:
            scorers[baselines.CEILING] = lambda key: _logistic_scores(key, cohort, _latent_features(cohort))
        made_from = _features_digest(cohort)
    train = sorted(f"{case.dataset}/{case.row}/{case.digest}/{case.target}" for case in cohort.of_role("train"))
    digest = digest_of([train, made_from])
    return [RowToScore(RowKey(cohort.benchmark.name, row, seed), cohort, digest, s) for row, s in scorers.items()]


def _features_digest(cohort: Cohort) -> str:
    columns = [name for name in ("age", "sex") if name in cohort.people]
    tables = [cohort.people[["dataset", "row", *columns]], *([] if cohort.latents is None else [cohort.latents])]
    # pandas keeps a missing value missing when it makes text of a column, and NaN has no place in JSON.
    return digest_of([table.astype(str).fillna("nan").to_numpy().tolist() for table in tables])


def _majority_scores(key: RowKey, cohort: Cohort) -> pd.DataFrame:
    test = cohort.of_role("test")
    targets = [case.target for case in cohort.of_role("train")]
    return probability_scores(
        key, cohort.benchmark, test, baselines.majority(targets, cohort.benchmark.classes, len(test))
    )


Features = Callable[[Sequence[SelectedCase]], npt.NDArray[np.float64]]


def _logistic_scores(key: RowKey, cohort: Cohort, features: Features) -> pd.DataFrame:
    train, test = cohort.of_role("train"), cohort.of_role("test")
    targets = [case.target for case in train]
    found = baselines.logistic(features(train), targets, features(test), cohort.benchmark.classes, key.row)
    return probability_scores(key, cohort.benchmark, test, found)


def _simple_features(cohort: Cohort) -> Features:
    people = cohort.people.set_index(["dataset", "row"])

    def features(cases: Sequence[SelectedCase]) -> npt.NDArray[np.float64]:
        lines = people.loc[[(case.dataset, case.row) for case in cases]].copy()
        spacing = cohort.store.spec.spacing_mm
        lines["volume_ml"] = [baselines.foreground_ml(cohort.image(case), spacing) for case in cases]
        return baselines.age_sex_volume_features(lines)

    return features


def _latent_features(cohort: Cohort) -> Features:
    assert cohort.latents is not None
    if absent := [name for name in ("dataset", "subject", *LATENTS) if name not in cohort.latents]:
        raise ValueError(f"latents.parquet lacks the columns {absent}; write the phantom cohort again")
    table = cohort.latents.drop_duplicates(["dataset", "subject"]).set_index(["dataset", "subject"])

    def features(cases: Sequence[SelectedCase]) -> npt.NDArray[np.float64]:
        keys = pd.MultiIndex.from_tuples([(case.dataset, case.subject) for case in cases])
        return table.reindex(keys)[list(LATENTS)].to_numpy(dtype=np.float64)

    return features


def _template_scores(key: RowKey, cohort: Cohort, work: CaseMap) -> pd.DataFrame:
    benchmark, store = cohort.benchmark, cohort.store

    def placed() -> Iterable[baselines.Placed]:
        for case in cohort.of_role("train"):
            yield (
                region_masks(cohort.label(case), benchmark.regions, benchmark.scheme, case.case),
                cohort.place(case)[0],
            )

    prior = baselines.fit_template_prior(placed, store.spec.grid)
    sent = cohort.for_workers()
    return score_regions(key, cohort, sent, partial(on_truth, sent, partial(_template_masks, sent, prior)), work)


def _template_masks(cohort: Cohort, prior: baselines.TemplatePrior, case: SelectedCase) -> npt.NDArray[np.uint8]:
    return prior.predict(*cohort.place(case))
