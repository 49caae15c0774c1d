"""Order of cases: every epoch complete, ranks disjoint, equal steps, resume by place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.sampler import OrderedBatches, SampleKey, StreamBatches, epoch_order, sample_rng, stream_key


def stream(cases: int, batch: int, world: int, last: int, first: int = 0, seed: int = 7) -> list[list[list[SampleKey]]]:
    return [list(StreamBatches(cases, batch, world, rank, seed, first, last)) for rank in range(world)]


@given(cases=st.integers(1, 30), batch=st.integers(1, 4), world=st.integers(1, 4))
def test_ranks_together_read_every_case_of_every_epoch_exactly_once(cases: int, batch: int, world: int) -> None:
    epochs = 3
    last = -(-epochs * cases // (batch * world))
    ranks = stream(cases, batch, world, last)
    assert {len(batches) for batches in ranks} == {last}
    keys = [key for batches in ranks for keys in batches for key in keys]
    assert len(set(keys)) == len(keys), "two ranks read the same place of the stream"
    for epoch in range(epochs):
        assert sorted(key.case for key in keys if key.epoch == epoch) == list(range(cases))


def test_the_order_does_not_depend_on_the_number_of_ranks() -> None:
    def flat(world: int, batch: int) -> list[SampleKey]:
        ranks = stream(10, batch, world, 6)
        return [key for step in zip(*ranks, strict=True) for keys in step for key in keys]

    assert flat(world=1, batch=4) == flat(world=2, batch=2) == flat(world=4, batch=1)


@pytest.mark.parametrize("first", [0, 3, 7, 12])
def test_resume_in_the_middle_of_an_epoch_continues_the_stream(first: int) -> None:
    whole, rest = stream(7, 2, 2, 12), stream(7, 2, 2, 12, first=first)
    assert [batches[first:] for batches in whole] == rest


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {epoch_order(seed, epoch, 20) for seed in (0, 1) for epoch in range(5)}
    assert len(orders) == 10


def test_the_random_numbers_of_a_sample_are_neither_those_of_the_order_nor_of_its_neighbours() -> None:
    draws = {sample_rng(0, epoch, position).integers(2**62) for epoch in range(4) for position in range(50)}
    assert len(draws) == 200
    assert tuple(sample_rng(0, 0, 0).permutation(20).tolist()) != epoch_order(0, 0, 20)
    assert np.array_equal(sample_rng(0, 1, 2).random(3), sample_rng(0, 1, 2).random(3))


def test_stream_key_names_epoch_place_and_case() -> None:
    key = stream_key(seed=3, cases=5, place=13)
    assert (key.epoch, key.position) == (2, 3)
    assert key.case == epoch_order(3, 2, 5)[3]


def test_an_empty_selection_and_a_wrong_rank_are_refused() -> None:
    with pytest.raises(ValueError, match="no training case; a training needs at least 1"):
        StreamBatches(0, 1, 1, 0, 0, 0, 1)
    with pytest.raises(ValueError, match=r"rank must be in 0\.\.1, got 2"):
        StreamBatches(4, 1, 2, 2, 0, 0, 1)


@given(cases=st.integers(0, 20), batch=st.integers(1, 4), world=st.integers(1, 4))
def test_validation_reads_each_case_once_over_all_ranks(cases: int, batch: int, world: int) -> None:
    parts = [OrderedBatches(cases, batch, world, rank) for rank in range(world)]
    assert all(len(list(part)) == len(part) for part in parts)
    assert sorted(key.case for part in parts for keys in part for key in keys) == list(range(cases))
