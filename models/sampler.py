"""Which case is read when, and by which rank: an endless stream of per-epoch permutations.

Global batch t takes the next `world * batch` places of the stream and rank r its slice. Ranks are disjoint, every epoch
is complete, all ranks do equal steps, and the order depends on the seed alone: resuming is starting at a later place.
(The reference shuffles with rank-specific seeds before splitting by index; four ranks then see 68 % of the cases.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

# SeedSequence pads with zeros, so [seed, epoch] would equal [seed, epoch, 0], the first sample's stream.
_ORDER_STREAM = 0xFFFF_FFFF


class SampleKey(NamedTuple):
    """What a sample's randomness depends on, and which case it is."""

    epoch: int
    position: int
    case: int
    """Index into the cases of the role."""


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, cases: int) -> tuple[int, ...]:
    """Return the permutation of `range(cases)` of one epoch."""
    return tuple(np.random.default_rng([seed, epoch, _ORDER_STREAM]).permutation(cases).tolist())


def sample_rng(seed: int, epoch: int, position: int) -> np.random.Generator:
    """Return the generator from which all randomness of one sample is drawn."""
    return np.random.default_rng([seed, epoch, position])


def stream_key(seed: int, cases: int, place: int) -> SampleKey:
    """Return the sample at one place (0, 1, ...) of the endless stream."""
    epoch, position = divmod(place, cases)
    return SampleKey(epoch, position, epoch_order(seed, epoch, cases)[position])


@dataclass(frozen=True)
class StreamBatches:
    """Batch sampler of one rank: global batches `first` (inclusive) to `last` (exclusive)."""

    cases: int
    batch_size: int
    world: int
    rank: int
    seed: int
    first: int
    last: int

    def __post_init__(self) -> None:
        if self.cases < 1:
            raise ValueError("the selection has no training case; a training needs at least 1")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank must be in 0..{self.world - 1}, got {self.rank}")

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for batch in range(self.first, self.last):
            start = (batch * self.world + self.rank) * self.batch_size
            yield [stream_key(self.seed, self.cases, place) for place in range(start, start + self.batch_size)]


@dataclass(frozen=True)
class OrderedBatches:
    """Batch sampler without shuffling: case i belongs to rank i % world; the last batch may be shorter."""

    cases: int
    batch_size: int
    world: int
    rank: int

    def __len__(self) -> int:
        return -(-len(range(self.rank, self.cases, self.world)) // self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        mine = list(range(self.rank, self.cases, self.world))
        for start in range(0, len(mine), self.batch_size):
            yield [SampleKey(0, index, index) for index in mine[start : start + self.batch_size]]
