"""Retrieval among candidates: chance, hits, ties, persons, and the interval over subjects."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.retrieval import RetrievalError, candidate_sets, hits, retrieval

N = 40
PEOPLE = np.arange(N)


def test_candidates_hold_the_query_first_and_other_persons_once() -> None:
    person = np.repeat(np.arange(20), 2)  # two sessions each
    found = candidate_sets(person, size=8, draws=5, seed=3)
    assert found.shape == (N, 5, 8)
    assert (found[:, :, 0] == np.arange(N)[:, None]).all()
    for query in found.reshape(-1, 8):
        assert len(set(person[query])) == 8
    assert (found == candidate_sets(person, size=8, draws=5, seed=3)).all()
    assert (found != candidate_sets(person, size=8, draws=5, seed=4)).any()


def test_who_is_known_is_always_found_and_who_is_not_by_chance() -> None:
    perfect = np.eye(N)
    random = np.random.default_rng(0).standard_normal((3, N, N))
    for top in (1, 5):
        sets = candidate_sets(PEOPLE, size=32, draws=50)
        assert hits(perfect, sets, top).tolist() == [1.0] * N
        assert hits(-perfect, sets, top).tolist() == [0.0] * N
        # All alike: a guess.
        assert hits(np.zeros((N, N)), sets, top) == pytest.approx(top / 32)
    first, fifth = retrieval(random, PEOPLE)
    assert (first.top, first.chance, fifth.top, fifth.chance) == (1, 1 / 32, 5, 5 / 32)
    for one in (first, fifth):
        assert one.interval.low < one.chance < one.interval.high
        assert one.interval.n == N


def test_hits_equal_a_plain_count() -> None:
    similarity = np.round(np.random.default_rng(1).standard_normal((N, N)), 1) + 0.7 * np.eye(N)
    sets = candidate_sets(PEOPLE, size=6, draws=4)
    for query in range(N):
        expected = []
        for candidates in sets[query]:
            values = similarity[query, candidates]
            better, equal = (values[1:] > values[0]).sum(), (values[1:] == values[0]).sum()
            expected.append(np.mean([better + ahead < 2 for ahead in range(equal + 1)]))
        assert hits(similarity, sets, 2)[query] == pytest.approx(np.mean(expected))


def test_a_known_share_of_hits_lies_in_its_interval() -> None:
    rng = np.random.default_rng(2)
    known = np.arange(N) < N / 2
    similarity = rng.standard_normal((N, N))
    similarity[known, known.nonzero()[0]] = 10
    first, _ = retrieval(similarity[None], PEOPLE, size=32)
    assert first.interval.low < 0.5 + 0.5 / 32 < first.interval.high
    assert first.interval.low > 0.3


def test_too_few_persons_and_similarities_that_are_not_finite_are_refused() -> None:
    with pytest.raises(RetrievalError, match="32 candidates need 2 or more, and as many persons: there are 20"):
        candidate_sets(np.repeat(np.arange(20), 2))
    with pytest.raises(RetrievalError, match=r"similarities of 40 subjects must be finite, \(40, 40\); got \(40, 40\)"):
        hits(np.full((N, N), np.nan), candidate_sets(PEOPLE), 1)
