"""Network prompting: the class of an image is the class whose connectomes it is most like, without any fitting.

Connectomes of labelled subjects (the support) and images of others (the queries) are embedded into one space. Every
class is given a score by cosine similarity; a softmax at the temperature of the pre-training turns the scores into
numbers that can be ranked and read as probabilities. How well calibrated they are is therefore a finding: no label was
used to fit anything. Source: the protocol of CINP (arXiv 2503.04205); prototypes are a choice of ours where the paper
leaves them open.

Shapes: Q queries, S supports, N subjects, D dimensions of the embedding, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tasks.probes import Bools, Floats, Ints, held_out

Variant = Literal["mean", "nearest", "knn"]
VARIANTS: tuple[Variant, ...] = ("mean", "nearest", "knn")

SUPPORT_MIN = 2
"""Labelled connectomes of every class that the support of a fold is drawn from."""
LOGIT_SPREAD_MAX = 30.0
"""Logits further apart give probabilities that are equal to 1 in double precision, and so no ranks."""


class PromptError(ValueError):
    """Subjects, embeddings or trainings that cannot be prompted with, and why."""


@dataclass(frozen=True)
class Prompt:
    """How one prompting is done."""

    variant: Variant = "mean"
    """`mean`: cosine to the mean of a class's unit embeddings. `nearest`: to its most similar support. `knn`: the mean
    cosine to its `k` most similar supports."""
    share: float = 1.0
    """Of the labelled connectomes of the training folds that are the support, above 0 up to 1."""
    k: int = 5
    temperature: float = 0.07
    seed: int = 0
    """Of the draw; all supports of one seed and fold are nested."""


@dataclass(frozen=True)
class Subjects:
    """Who can be a query and who a support; arrays (N,)."""

    target: Ints
    fold: Ints
    has_image: Bools
    has_network: Bools
    group: Ints
    """Equal numbers: one person, or subjects that look like one."""


def unit(embeddings_ND: Floats, who: str) -> Floats:
    """Return embeddings of length 1; raises PromptError for one that is not finite or has no direction."""
    lengths = np.linalg.norm(embeddings_ND, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        count = int((~(np.isfinite(lengths) & (lengths > 0))).sum())
        raise PromptError(f"{who}: {count} of {len(lengths)} embeddings are zero or not finite; the training diverged")
    return np.asarray(embeddings_ND / lengths)


def class_scores(query_QD: Floats, support_SD: Floats, class_S: Ints, classes: int, prompt: Prompt) -> Floats:
    """Return the similarity (Q, K), from -1 to 1, of unit queries to each class of the unit supports.

    Of a class with fewer than k supports all are taken. Raises PromptError for a class without a support.
    """
    scores = np.empty((len(query_QD), classes))
    for k in range(classes):
        members = support_SD[class_S == k]
        if not len(members):
            raise PromptError(f"class {k} has no support; draw at least one connectome of every class")
        if prompt.variant == "mean":
            centre = members.mean(axis=0)
            # Supports that cancel out have no direction: nobody is like them.
            scores[:, k] = query_QD @ (centre / max(float(np.linalg.norm(centre)), 1e-12))
        else:
            nearest = 1 if prompt.variant == "nearest" else min(prompt.k, len(members))
            scores[:, k] = np.sort(query_QD @ members.T, axis=1)[:, -nearest:].mean(axis=1)
    return scores


def pseudo_probabilities(scores_QK: Floats, temperature: float) -> Floats:
    """Return the softmax (Q, K) over class scores at a temperature.

    The most similar class stays the most probable one, and of two classes the ranks of the subjects are those of the
    difference between the scores. Where a temperature is so low that double precision would lose them, all scores are
    taken at the lowest one that does not. Raises PromptError for a temperature that is not positive.
    """
    if not temperature > 0:
        raise PromptError(f"the temperature of the softmax must be above 0, got {temperature:g}")
    spread = float(np.ptp(scores_QK, axis=1).max()) if len(scores_QK) else 0.0
    logits = scores_QK / max(temperature, spread / LOGIT_SPREAD_MAX)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def support_pool(subjects: Subjects, queries: Ints) -> Ints:
    """Return who may be a support of these queries: a connectome, another fold, and nobody who looks like a query."""
    others = ~np.isin(subjects.fold, subjects.fold[queries])
    strangers = ~np.isin(subjects.group, subjects.group[queries])
    return np.flatnonzero(subjects.has_network & others & strangers)


def draw_support(class_S: Ints, share: float, seed: Sequence[int]) -> Ints:
    """Return the indices, ascending, of a share of the supports, of every class at least one.

    Stratified by class; of one seed a smaller share is part of a larger one. Raises PromptError for a share outside
    (0, 1].
    """
    if not 0 < share <= 1:
        raise PromptError(f"the share of the support must be above 0 and at most 1, got {share:g}")
    rng = np.random.default_rng(list(seed))
    chosen = []
    for k in np.unique(class_S):
        members = rng.permutation(np.flatnonzero(class_S == k))
        chosen.append(members[: max(1, round(share * len(members)))])
    return np.sort(np.concatenate(chosen))


def folds_of_queries(subjects: Subjects) -> list[tuple[Ints, Ints]]:
    """Return (who may be a support, queries) of every fold in order: queries have an image."""
    tested = [test[subjects.has_image[test]] for _, test in held_out(subjects.fold)]
    return [(support_pool(subjects, queries), queries) for queries in tested]


def check_supports(subjects: Subjects, classes: Sequence[str], who: str) -> None:
    """Raise PromptError unless every fold has a query, and SUPPORT_MIN supports of every class outside of it."""
    for fold, (pool, queries) in enumerate(folds_of_queries(subjects)):
        if not len(queries):
            raise PromptError(
                f"{who}: nobody in fold {fold} has an image; the queries are images: ask for fewer folds, or add "
                "subjects with an image to the store"
            )
        for index, name in enumerate(classes):
            count = int((subjects.target[pool] == index).sum())
            if count < SUPPORT_MIN:
                raise PromptError(
                    f"{who}: outside fold {fold} there are {count} labelled connectomes of class {name!r}, and "
                    f"prompting needs {SUPPORT_MIN}; add connectomes of that class to the store, or leave the "
                    "benchmark out"
                )


def prompt_folds(images_ND: Floats, networks_ND: Floats, subjects: Subjects, classes: int, prompt: Prompt) -> Floats:
    """Return the pseudo-probabilities (N, K) of every query by supports of the other folds; NaN for who is no query.

    images_ND, networks_ND: projected embeddings; what a subject lacks may be anything, it is not read.
    """
    found = np.full((len(subjects.target), classes), np.nan)
    for fold, (pool, queries) in enumerate(folds_of_queries(subjects)):
        chosen = pool[draw_support(subjects.target[pool], prompt.share, (prompt.seed, fold))]
        support = unit(networks_ND[chosen], "connectomes of the support")
        query = unit(images_ND[queries], "images of the queries")
        scores = class_scores(query, support, subjects.target[chosen], classes, prompt)
        found[queries] = pseudo_probabilities(scores, prompt.temperature)
    return found
