"""What the split of a workspace owes to the benchmarks whose data are there: strata and shares."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tasks.benchmarks import BENCHMARKS, SplitProtocol

Shares = tuple[float, float, float]
LAST = "site"
"""The least important stratum: targets come before it."""


def target_strata(datasets: Collection[str]) -> tuple[str, ...]:
    """Return the columns by which the benchmarks on some datasets want a split to be stratified, in registry order."""
    present = [one for one in BENCHMARKS.values() if set(one.datasets) & set(datasets)]
    return tuple(dict.fromkeys(name for one in present for name in one.split.stratify))


def shares_by_dataset(datasets: Collection[str]) -> dict[str, Shares]:
    """Return the shares of the datasets whose benchmark wants others than SplitProtocol's."""
    usual = SplitProtocol().shares
    return {
        dataset: one.split.shares
        for one in BENCHMARKS.values()
        for dataset in one.datasets
        if dataset in datasets and one.split.shares != usual
    }


def with_strata(strata: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return strata with those that are wanted and not yet among them, the site last."""
    new = [name for name in wanted if name not in strata]
    place = list(strata).index(LAST) if LAST in strata else len(strata)
    return [*strata[:place], *new, *strata[place:]]
