"""The rows of a probe table and their scores: encoders, simple features, and what is absent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pandas as pd

from tasks.baselines import CEILING
from tasks.benchmarks import Benchmark
from tasks.combat import RULES_VERSION as COMBAT_VERSION
from tasks.combat import harmonised
from tasks.embeddings import EncoderSource, case_features
from tasks.probe_cohort import ProbeCohort
from tasks.probe_scans import acquisition_of, age_and_sex
from tasks.probe_summary import NEIGHBOURS
from tasks.probes import Bools, Floats, Ints, Model, Prepare, probe_classes, probe_numbers, unchanged
from tasks.row_scores import Seed, score_row
from tasks.summary import Line

RANDOM = "random encoder"
DESCRIPTORS = "raw descriptors"
CONSTANT = "no features"
"""Predicts the class shares, or the mean, of the training folds."""
PRESENT = "which modalities"
"""Tells classes apart by the modalities that a case has alone: what their absence gives away."""
EXPECTED: dict[str, str] = {
    "simclr": "SimCLR",
    "yaware": "y-Aware",
    "expw": "ExpW",
    "age_regression": "age regression",
}
"""Recipes of the baseline pre-trainings that tables of grey-matter maps show, and their names where they were not
trained."""
EXPECTED_OF_CROPS: dict[str, str] = {"mae": "MAE", "simclr_crops": "SimCLR on crops"}
"""The same of tables of other images: BrainMVP's baselines."""
RESERVED: tuple[str, ...] = (RANDOM, DESCRIPTORS, CONSTANT, CEILING, "age", "sex", "age+sex", PRESENT)
"""Names that a table's own rows have."""
SCORES = "probes/scores"
"""Where a workspace keeps the scores of probes."""
Together = Literal["seeds", "ensemble"]
Progress = Callable[[str], None]
Member = TypeVar("Member")


@dataclass(frozen=True)
class EncoderRow:
    """A row of frozen encoders."""

    name: str
    encoders: tuple[EncoderSource, ...]
    together: Together = "seeds"
    """`seeds`: repetitions, whose scores are averaged in each fold. `ensemble`: one model, whose predictions
    (probabilities, or numbers) are the mean of its members'."""
    recipes: tuple[str, ...] = ()
    """Of its trainings."""
    model: Model = "linear"
    """That probes its features."""
    combat: bool = False
    """Harmonise its features over sites first (tasks.combat)."""

    @property
    def groups(self) -> list[tuple[EncoderSource, ...]]:
        """Its seeds: the encoders whose predictions are averaged in each."""
        return grouped(self.encoders, self.together)


def grouped(members: tuple[Member, ...], together: Together) -> list[tuple[Member, ...]]:
    """Return the members of each seed of a row."""
    return [members] if together == "ensemble" else [(one,) for one in members]


@dataclass(frozen=True)
class FeatureRow:
    """A row of features that need no encoder, or the reason why there are none."""

    name: str
    features: Floats | None
    """(N, C), NaN where missing; None: absent."""
    absent: str = ""
    combat: bool = False
    """Harmonise them over sites first (tasks.combat)."""


def feature_rows(cohort: ProbeCohort) -> list[FeatureRow]:
    """Return the simple rows of a cohort: raw descriptors, age and sex, no features, and the ceiling of a phantom."""
    rows = [_descriptors(cohort)]
    if cohort.benchmark.target not in {"age", "site"}:
        rows.append(age_sex_row(cohort))
    if not cohort.present.all():
        rows.append(FeatureRow(PRESENT, cohort.present.astype(np.float64)))
    rows.append(FeatureRow(CONSTANT, np.zeros((len(cohort.cases), 1))))
    if cohort.latents is not None:
        rows.append(latents_row(cohort))
    return rows


def with_neighbours(rows: Sequence[EncoderRow]) -> list[EncoderRow]:
    """Return the rows, each with a twin whose features are probed by their nearest neighbours."""
    return [twin for row in rows for twin in (row, replace(row, name=f"{row.name}{NEIGHBOURS}", model="k-NN"))]


def row_kinds(rows: Sequence[EncoderRow], simple: Sequence[FeatureRow]) -> dict[str, str]:
    """Return `baseline` or `ceiling` by row; rows that are not named are ours."""
    known = {*EXPECTED, *EXPECTED_OF_CROPS}
    baselines = [
        row.name
        for row in rows
        if row.name.removesuffix(NEIGHBOURS) == RANDOM or (_recipes(row) <= known and row.recipes)
    ]
    kinds = dict.fromkeys([*baselines, *(row.name for row in simple)], "baseline")
    return kinds | {CEILING: "ceiling"}


def _recipes(row: EncoderRow) -> set[str]:
    """Return the recipes of a row without the endings of sizes and networks."""
    return {recipe.removesuffix("_tiny").removesuffix("_unet") for recipe in row.recipes}


def expected(benchmark: Benchmark) -> dict[str, str]:
    """Return the baseline pre-trainings that a table of a benchmark shows, by recipe."""
    return EXPECTED if "gm" in benchmark.modalities else EXPECTED_OF_CROPS


def absent_lines(cohort: ProbeCohort, rows: Sequence[EncoderRow], simple: Sequence[FeatureRow]) -> list[Line]:
    """Return a line without a number for every expected row that is not there, with the reason."""
    there = {recipe for row in rows for recipe in _recipes(row)}
    benchmark = cohort.benchmark
    names = [(name, "not trained") for recipe, name in expected(benchmark).items() if recipe not in there]
    names += [(row.name, row.absent) for row in simple if row.features is None]
    return [Line(benchmark=benchmark.name, row=name, metric="", kind="absent", note=why) for name, why in names]


def score_encoders(
    cohort: ProbeCohort, row: EncoderRow, workspace: Path, progress: Progress = lambda note: None
) -> tuple[pd.DataFrame, int]:
    """Return the long-form scores of a row of encoders and how many of them were computed now."""

    def embedded(members: tuple[EncoderSource, ...]) -> list[Floats]:
        return [_embedded(cohort, one, workspace, progress) for one in members]

    kind = [*([] if row.model == "linear" else [row.model]), *(_combat_facts(cohort) if row.combat else [])]
    seeds = [
        probe_seed(
            [*(one.made_from for one in members), *kind],
            row.name,
            partial(embedded, members),
            model=row.model,
            combat=row.combat,
        )
        for members in row.groups
    ]
    return score_row(cohort, row.name, seeds, workspace / SCORES)


def score_features(cohort: ProbeCohort, row: FeatureRow, seeds: int, workspace: Path) -> tuple[pd.DataFrame, int]:
    """Return the scores of a simple row: it has no seed, but each of the shuffles of a negative control has one."""
    return score_row(cohort, row.name, feature_seeds(cohort, row, seeds), workspace / SCORES)


def feature_seeds(cohort: ProbeCohort, row: FeatureRow, seeds: int, scored: Bools | None = None) -> list[Seed]:
    """Return the seeds of a simple row; `scored` (N,) are the cases that count, all of them are trained on."""
    assert row.features is not None
    values = row.features
    made_from = np.nan_to_num(values, nan=-1e30).round(9).tolist()
    made_from = [made_from, *_combat_facts(cohort)] if row.combat else made_from
    shuffles = seeds if cohort.benchmark.shuffle_seed is not None else 1
    return [probe_seed(made_from, row.name, lambda: [values], scored, combat=row.combat)] * shuffles


def _combat_facts(cohort: ProbeCohort) -> list[object]:
    """Return what decides how features are harmonised, beside the features and the folds."""
    acquisition = acquisition_of(cohort)
    return [
        "ComBat", COMBAT_VERSION, list(acquisition.sites), np.nan_to_num(acquisition.covariates, nan=-1e30).tolist(),
    ]  # fmt: skip


def probe_seed(
    made_from: object,
    row: str,
    features: Callable[[], Sequence[Floats]],
    scored: Bools | None = None,
    model: Model = "linear",
    combat: bool = False,
) -> Seed:
    """Return a seed whose predictions are the mean of probes of features (N, C), one for each member."""

    def predict(cohort: ProbeCohort) -> Floats:
        prepare = _harmonising(cohort) if combat else unchanged
        return np.mean([probe_features(values, cohort, row, model, prepare) for values in features()], axis=0)

    return Seed(made_from, predict, scored)


def _harmonising(cohort: ProbeCohort) -> Prepare:
    acquisition = acquisition_of(cohort)

    def prepare(features_NC: Floats, train: Ints) -> Floats:
        return harmonised(features_NC, acquisition, train)

    return prepare


def probe_features(
    features_NC: Floats, cohort: ProbeCohort, row: str, model: Model = "linear", prepare: Prepare = unchanged
) -> Floats:
    """Return what probes predict: probabilities (N, K), or numbers (N,) of a regression."""
    benchmark, who = cohort.benchmark, f"probe {cohort.benchmark.name!r}, row {row!r}"
    if benchmark.kind == "regression":
        return probe_numbers(features_NC, cohort.target, cohort.fold, who, model, prepare)
    return probe_classes(features_NC, cohort.target, cohort.fold, len(benchmark.classes), who, model, prepare)


def embed_row(cohort: ProbeCohort, source: EncoderSource, workspace: Path) -> Floats:
    """Return the features (N, C) of a cohort by one encoder, from the workspace's cache where they are kept; NaN where
    a case lacks a modality (tasks.embeddings.case_features)."""
    return _embedded(cohort, source, workspace, lambda note: None)


def _embedded(cohort: ProbeCohort, source: EncoderSource, workspace: Path, progress: Progress) -> Floats:
    def done(count: int, total: int) -> None:
        progress(f"{source.name}: case {count} of {total} embedded")

    modalities, folder = cohort.benchmark.modalities, workspace / "embeddings"
    values = case_features(source, cohort.store, cohort.cases, modalities, cohort.present, folder, done)
    return values.astype(np.float64)


def _descriptors(cohort: ProbeCohort) -> FeatureRow:
    names = sorted({case.dataset for case in cohort.cases})
    found = {name: cohort.store.dataset(name).descriptors for name in names}
    if any(one is None for one in found.values()):
        lacking = next(name for name, one in found.items() if one is None)
        return FeatureRow(DESCRIPTORS, None, f"{lacking} has none in the store")
    kinds = {(one.atlas, one.basis, one.measures, one.regions) for one in found.values() if one is not None}
    if len(kinds) > 1:
        return FeatureRow(DESCRIPTORS, None, "its datasets differ in atlas, basis, measures or regions")
    basis = next(iter(kinds))[1]
    values = [np.asarray(found[case.dataset].values[case.row]).ravel() for case in cohort.cases]  # type: ignore[union-attr]
    return FeatureRow(f"{DESCRIPTORS} ({basis})", np.stack(values).astype(np.float64))


def age_sex_row(cohort: ProbeCohort) -> FeatureRow:
    """Return age and sex, whichever are known; the sex is left out where it is the target."""
    known = age_and_sex(cohort.people, but=("sex",) if cohort.benchmark.target == "sex" else ())
    if not known:
        return FeatureRow("age+sex", None, "neither is known")
    return FeatureRow("+".join(known), np.column_stack(list(known.values())))


def latents_row(cohort: ProbeCohort) -> FeatureRow:
    """Return what generated a phantom: every number among the latents, never the target itself."""
    assert cohort.latents is not None
    numbers = cohort.latents.select_dtypes("number").drop(columns=cohort.benchmark.target, errors="ignore")
    return FeatureRow(CEILING, numbers.to_numpy(dtype=np.float64))
