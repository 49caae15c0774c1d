"""The baselines of a prompting table: encoders of images alone, connectomes without pre-training, and simple rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from tasks.baselines import CEILING
from tasks.connectome_baselines import (
    correlations,
    supervised_network,
    tangent_svm,
    upper_triangles,
    why_no_tangent,
)
from tasks.embeddings import EncoderSource
from tasks.probe_cohort import ProbeCohort
from tasks.probes import Floats
from tasks.probing import EncoderRow, FeatureRow, age_sex_row, embed_row, feature_seeds, latents_row, probe_features
from tasks.prompt_cohort import PromptCohort
from tasks.prompt_seeds import RULES_VERSION, Embedder, PromptSettings, Row, fitted_seed, spread
from tasks.row_scores import Seed

MAJORITY = "majority class"
"""Predicts the class shares of the training folds."""
CONNECTOME = "connectome logistic regression"
TANGENT = "tangent-space SVM"
NETWORK = "supervised network (BNT-like)"
MAE = "image-only MAE"
SUPERVISED = "image-only supervised"
RESERVED: tuple[str, ...] = (MAJORITY, CONNECTOME, TANGENT, NETWORK, MAE, SUPERVISED, CEILING, "age", "sex", "age+sex")
"""Names that a table's own rows have."""


@dataclass(frozen=True)
class ImageRow:
    """A row of encoders of images alone, and what they were trained for."""

    row: EncoderRow
    objective: Literal["mae", "supervised", "other"] = "other"


def image_row(cohort: PromptCohort, row: EncoderRow, embedder: Embedder) -> Row:
    """Return the linear probe of frozen encoders of images."""
    here = cohort.has_image

    def features(members: tuple[EncoderSource, ...]) -> list[Floats]:
        part = cohort.everybody.part(here)
        return [spread(embed_row(part, one, embedder.workspace), here) for one in members]

    seeds = [
        fitted_seed(cohort, row.name, [one.weights for one in members], partial(features, members), here)
        for members in row.groups
    ]
    return Row(row.name, tuple(seeds))


def absent_images(image_only: Sequence[ImageRow]) -> list[Row]:
    """Return the expected rows of images alone that were not given, with where they come from."""
    there = {one.objective for one in image_only}
    expected = {"mae": MAE, "supervised": SUPERVISED}
    return [Row(name, absent="none under image_only") for kind, name in expected.items() if kind not in there]


def connectome_rows(cohort: PromptCohort, settings: PromptSettings, shuffles: int, reason: str) -> list[Row]:
    """Return the baselines that see the connectome of who is tested; fitted on all labelled ones of other folds."""
    spec = cohort.everybody.store.spec.connectome
    assert spec is not None
    repeats = shuffles if cohort.benchmark.shuffle_seed is not None else 1
    here, classes = cohort.has_network, len(cohort.benchmark.classes)
    scored = cohort.has_both

    def seeds(made_from: object, predict: Callable[[ProbeCohort, int], Floats]) -> tuple[Seed, ...]:
        def of(number: int) -> Seed:
            body = [made_from, RULES_VERSION, cohort.roles_digest, number]
            return Seed(body, lambda own: spread(predict(own.part(here), number), here), scored)

        return tuple(of(number) for number in range(repeats))

    def logistic(own: ProbeCohort, _: int) -> Floats:
        return probe_features(upper_triangles(cohort.matrices), own, CONNECTOME)

    def tangent(own: ProbeCohort, _: int) -> Floats:
        return tangent_svm(correlations(cohort.matrices, spec.fisher_z), own.target, own.fold, classes)

    def network(own: ProbeCohort, number: int) -> Floats:
        assert settings.classifier is not None
        return supervised_network(cohort.matrices, own.target, own.fold, classes, settings.classifier, number)

    fitted = settings.classifier
    return [
        Row(CONNECTOME, absent=reason) if reason else Row(CONNECTOME, seeds("logistic", logistic)),
        Row(TANGENT, absent=why)
        if (why := reason or why_no_tangent(spec, lambda: cohort.matrices))
        else Row(TANGENT, seeds("tangent", tangent)),
        Row(NETWORK, absent=reason or "left out: network_epochs is 0")
        if reason or fitted is None
        else Row(NETWORK, seeds(["network", fitted.model_dump(mode="json")], network)),
    ]


def simple_rows(cohort: PromptCohort, shuffles: int) -> list[Row]:
    """Return majority class, age and sex, and the ceiling of a phantom: fitted on everybody in the other folds."""
    everybody = cohort.everybody
    rows = [FeatureRow(MAJORITY, np.zeros((len(everybody.cases), 1))), age_sex_row(everybody)]
    rows += [latents_row(everybody)] if everybody.latents is not None else []
    return [
        Row(row.name, absent=row.absent)
        if row.features is None
        else Row(
            row.name,
            tuple(feature_seeds(everybody, row, shuffles, cohort.has_image)),
            "ceiling" if row.name == CEILING else "baseline",
        )
        for row in rows
    ]
