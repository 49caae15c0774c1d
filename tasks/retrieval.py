"""Retrieval: does the embedding of an image find its own connectome among those of other people?

Everybody's own is hidden among `size` - 1 others, several times with other draws; a hit within the first k counts. Ties
are split evenly, so that embeddings which are all alike score chance, not 1. Intervals are over subjects.

Shapes: N subjects, D draws, S candidates, E repetitions of the training.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tasks.probes import Floats, Ints
from tasks.statistics import Interval, bootstrap_interval, draw_subjects

SIZE = 32
"""Candidates, the own one among them."""
TOP = (1, 5)
DRAWS = 50


class RetrievalError(ValueError):
    """Similarities that nothing can be retrieved with, and why."""


@dataclass(frozen=True)
class Retrieved:
    """How often the own connectome is among the first `top`."""

    top: int
    chance: float
    """Expected of similarities that know nothing: top / size."""
    interval: Interval


def candidate_sets(person: Ints, size: int = SIZE, draws: int = DRAWS, seed: int = 0) -> Ints:
    """Return the candidates (N, D, S) of every query, itself first, the others of different persons than its own.

    person: (N,) equal numbers are one person, of whom another session is no wrong answer. Draws are without
    replacement and depend on the seed and on the place in `person` alone. Raises RetrievalError for fewer than `size`
    persons or a size below 2.
    """
    persons = len(np.unique(person))
    if size < 2 or persons < size:
        raise RetrievalError(
            f"{size} candidates need 2 or more, and as many persons: there are {persons}; ask for less"
        )
    found = np.empty((len(person), draws, size), dtype=np.int64)
    for query in range(len(person)):
        rng = np.random.default_rng([seed, query])
        others = np.flatnonzero(person != person[query])
        found[query, :, 0] = query
        for draw in range(draws):
            shuffled = rng.permutation(others)
            _, first = np.unique(person[shuffled], return_index=True)  # one case of each person
            found[query, draw, 1:] = shuffled[np.sort(first)[: size - 1]]
    return found


def hits(similarity_NN: Floats, candidates_NDS: Ints, top: int) -> Floats:
    """Return the share of draws (N,) in which the own one, candidate 0, is among the `top` most similar ones.

    similarity_NN: of image (row) and connectome (column). Of candidates that are equally similar each order is equally
    likely. Raises RetrievalError for similarities that are not square or not finite.
    """
    n = len(candidates_NDS)
    if similarity_NN.shape != (n, n) or not np.isfinite(similarity_NN).all():
        raise RetrievalError(f"similarities of {n} subjects must be finite, ({n}, {n}); got {similarity_NN.shape}")
    values = similarity_NN[np.arange(n)[:, None, None], candidates_NDS]
    own, others = values[:, :, :1], values[:, :, 1:]
    better, equal = (others > own).sum(axis=2), (others == own).sum(axis=2)
    return np.asarray(np.clip((top - better) / (equal + 1), 0, 1).mean(axis=1))


def retrieval(
    similarity_ENN: Floats, person: Ints, size: int = SIZE, draws: int = DRAWS, seed: int = 0
) -> list[Retrieved]:
    """Return how often the own connectome is found, for every number in TOP, averaged over repetitions.

    similarity_ENN: of image (row) and connectome (column) by each repetition of the training. The interval is a
    bootstrap over subjects, whose hits are means over draws and repetitions.
    """
    candidates = candidate_sets(person, size, draws, seed)
    weights = draw_subjects(len(person))
    found = []
    for top in TOP:
        by_subject = np.mean([hits(one, candidates, top) for one in similarity_ENN], axis=0)

        def mean(drawn: Floats, values: Floats = by_subject) -> Floats:
            return np.asarray(drawn @ values / drawn.sum(axis=1))

        found.append(Retrieved(top, top / size, bootstrap_interval(mean, weights, at_bounds=len(person))))
    return found
