"""Prompting on made embeddings: prototypes by hand, draws, who may support whom, calibration, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from tasks.prompting import (
    Prompt,
    PromptError,
    Subjects,
    check_supports,
    class_scores,
    draw_support,
    folds_of_queries,
    prompt_folds,
    pseudo_probabilities,
    support_pool,
    unit,
)

N, FOLDS = 60, 5
RNG = np.random.default_rng(0)
CLASS = np.arange(N) // FOLDS % 2
EVERYBODY = np.ones(N, dtype=bool)
SUBJECTS = Subjects(CLASS, np.arange(N) % FOLDS, EVERYBODY, EVERYBODY, np.arange(N))


def embedded(effect: float) -> tuple[np.ndarray, np.ndarray]:
    """Return images and connectomes (N, 4) of the same subjects; the first direction follows the class."""
    own = RNG.standard_normal((N, 4))
    own[:, 0] += effect * (2 * CLASS - 1)
    return own + 0.2 * RNG.standard_normal((N, 4)), own + 0.2 * RNG.standard_normal((N, 4))


def accuracy(images: np.ndarray, networks: np.ndarray, subjects: Subjects = SUBJECTS, **prompt: Any) -> float:
    found = prompt_folds(images, networks, subjects, 2, Prompt(**prompt))
    scored = subjects.has_image
    return float((found[scored].argmax(axis=1) == subjects.target[scored]).mean())


def test_scores_are_those_by_hand() -> None:
    support = unit(np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [-1.0, -1.0], [-3.0, 0.3]]), "x")
    classes, query = np.array([0, 0, 1, 1, 1]), unit(np.array([[2.0, 0.0], [-1.0, -0.2]]), "x")
    cosines = query @ support.T
    mean = class_scores(query, support, classes, 2, Prompt("mean"))
    centre = support[2:].mean(axis=0)
    assert mean[0, 0] == pytest.approx(np.sqrt(0.5))
    assert mean[1, 1] == pytest.approx(query[1] @ centre / np.linalg.norm(centre))
    nearest = class_scores(query, support, classes, 2, Prompt("nearest"))
    np.testing.assert_allclose(nearest, np.column_stack([cosines[:, :2].max(axis=1), cosines[:, 2:].max(axis=1)]))
    two = class_scores(query, support, classes, 2, Prompt("knn", k=2))
    np.testing.assert_allclose(two[:, 1], np.sort(cosines[:, 2:], axis=1)[:, 1:].mean(axis=1))
    many = class_scores(query, support, classes, 2, Prompt("knn", k=99))
    np.testing.assert_allclose(many[:, 0], cosines[:, :2].mean(axis=1))
    np.testing.assert_array_equal(class_scores(query, support, classes, 2, Prompt("knn", k=1)), nearest)


def test_pseudo_probabilities_are_a_softmax_that_keeps_ranks() -> None:
    scores = RNG.uniform(-1, 1, (50, 3))
    np.testing.assert_allclose(pseudo_probabilities(scores, 0.2), softmax(scores / 0.2, axis=1))
    # At a temperature of 0.001 plain double precision would give many subjects a probability of exactly 1.
    cold = pseudo_probabilities(scores[:, :2], 0.001)
    np.testing.assert_array_equal(np.argsort(cold[:, 1]), np.argsort(scores[:, 1] - scores[:, 0]))
    assert len(np.unique(cold[:, 1])) == 50
    with pytest.raises(PromptError, match="the temperature of the softmax must be above 0, got 0"):
        pseudo_probabilities(scores, 0.0)


@pytest.mark.parametrize("variant", ["mean", "nearest", "knn"])
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_a_coupling_is_found_and_no_coupling_is_not(variant: Any, share: float) -> None:
    images, networks = embedded(effect=4.0)
    assert accuracy(images, networks, variant=variant, share=share) > 0.9
    # Images of other people: no class in common with the connectomes.
    assert 0.25 < accuracy(RNG.standard_normal((N, 4)), networks, variant=variant, share=share) < 0.75


def test_draws_are_stratified_nested_and_seeded() -> None:
    classes = np.array([0] * 40 + [1] * 15 + [2] * 3)
    tenth, half, all_of_it = (draw_support(classes, share, (0, 1)) for share in (0.1, 0.5, 1.0))
    assert np.bincount(classes[tenth]).tolist() == [4, 2, 1], "of every class at least one"
    assert np.bincount(classes[half]).tolist() == [20, 8, 2]
    assert all_of_it.tolist() == list(range(58))
    assert set(tenth) < set(half)
    np.testing.assert_array_equal(draw_support(classes, 0.1, (0, 1)), tenth)
    assert draw_support(classes, 0.1, (1, 1)).tolist() != tenth.tolist()
    for wrong in (0.0, 1.5):
        with pytest.raises(PromptError, match=f"the share of the support must be above 0 and at most 1, got {wrong:g}"):
            draw_support(classes, wrong, (0,))


def test_supports_are_never_queries_nor_look_like_one() -> None:
    has_image, has_network, group = EVERYBODY.copy(), EVERYBODY.copy(), np.arange(N)
    has_image[[3, 7]] = False
    has_network[[4, 8]] = False
    group[11] = group[5]  # in folds 1 and 0: as a link that was found after the folds were made
    subjects = Subjects(CLASS, np.arange(N) % FOLDS, has_image, has_network, group)
    for fold, (pool, queries) in enumerate(folds_of_queries(subjects)):
        assert not set(pool) & set(queries)
        assert not set(group[pool]) & set(group[queries])
        assert set(subjects.fold[queries]) == {fold}
        assert fold not in subjects.fold[pool]
        assert not {4, 8} & set(pool)
        assert not {3, 7} & set(queries)
        assert (11 in pool) == (fold not in (0, 1))
    # A connectome alone is a support of others, an image alone a query.
    assert all(3 in support_pool(subjects, queries) for _, queries in [folds_of_queries(subjects)[0]])
    found = prompt_folds(*embedded(1.0), subjects, 2, Prompt())
    assert np.flatnonzero(np.isnan(found).any(axis=1)).tolist() == [3, 7]


def test_what_a_query_is_and_has_does_not_matter_for_itself() -> None:
    images, networks = embedded(effect=1.0)
    before = prompt_folds(images, networks, SUBJECTS, 2, Prompt())
    held = SUBJECTS.fold == 0
    changed = networks.copy()
    changed[held] = 1e3 * RNG.standard_normal((int(held.sum()), 4))
    relabelled = replace(SUBJECTS, target=np.where(held, 1 - CLASS, CLASS))
    after = prompt_folds(images, changed, relabelled, 2, Prompt())
    np.testing.assert_array_equal(before[held], after[held])
    assert not np.allclose(before[~held], after[~held])


def test_calibration_follows_the_temperature_and_no_label() -> None:
    images, networks = embedded(effect=1.0)
    warm, cold = (prompt_folds(images, networks, SUBJECTS, 2, Prompt(temperature=t)) for t in (10.0, 0.05))
    np.testing.assert_array_equal(warm.argmax(axis=1), cold.argmax(axis=1))
    assert warm.max() < 0.6
    assert cold.max() > 0.95


def test_what_cannot_be_prompted_is_refused() -> None:
    rare = replace(SUBJECTS, target=np.where(np.isin(np.arange(N), [0, 1, 5]), 1, 0))
    with pytest.raises(
        PromptError,
        match=r"prompt 'x': outside fold 0 there are 1 labelled connectomes of class 'ad', and prompting needs 2; add",
    ):
        check_supports(rare, ("control", "ad"), "prompt 'x'")
    blind = replace(SUBJECTS, has_image=SUBJECTS.fold != 2)
    with pytest.raises(PromptError, match="p: nobody in fold 2 has an image; the queries are images: ask for fewer"):
        check_supports(blind, ("a", "b"), "p")
    check_supports(SUBJECTS, ("a", "b"), "p")
    broken = RNG.standard_normal((4, 3))
    broken[1], broken[2, 0] = 0, np.nan
    with pytest.raises(PromptError, match="images: 2 of 4 embeddings are zero or not finite; the training diverged"):
        unit(broken, "images")
    with pytest.raises(PromptError, match="class 1 has no support; draw at least one connectome of every class"):
        class_scores(np.eye(2), np.eye(2), np.zeros(2, dtype=int), 2, Prompt())
