"""The registry of benchmarks: complete, consistent, and honest about what is published."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tasks.benchmarks import BENCHMARKS, PHANTOM_BENCHMARKS, Benchmark, find_benchmark, has_data
from tasks.label_schemes import LABEL_SCHEMES, find_scheme, scheme_labels

DIGESTS = {
    "phantom-tumour": "77d0c500c9e8",
    "phantom-diagnosis": "5662af60af36",
    "phantom-control": "cd99c62a26e5",
    "phantom-shuffled": "1dcb6a792bdd",
}


def _labels(scheme: str) -> dict[str, set[int]]:
    return {region.name: set(region.labels) for region in find_scheme(scheme)}


def test_label_schemes_of_brats_differ_by_year() -> None:
    assert _labels("brats2021") == {"ET": {4}, "TC": {1, 4}, "WT": {1, 2, 4}}
    assert _labels("brats2023") == {"ET": {3}, "TC": {1, 3}, "WT": {1, 2, 3}}
    assert _labels("brats-ped2024") == {"ET": {1}, "TC": {1, 2, 3}, "WT": {1, 2, 3, 4}}
    assert scheme_labels("brats2021") == {0, 1, 2, 4}


def test_all_downstream_tasks_of_brainmvp_are_registered() -> None:
    names = {"brats2023-ped", "brats2023-met", "isles22", "mrbrains13", "vsseg", "upenn-gbm"}
    names |= {"brats2018", "adni", "adhd-200", "abide-i"}
    twins = {"phantom-stroke", "phantom-schwannoma", "phantom-tissue", "phantom-grade"}
    assert names | twins | set(PHANTOM_BENCHMARKS) == set(BENCHMARKS)
    assert not twins & set(PHANTOM_BENCHMARKS)  # the demo's time is limited
    assert all(BENCHMARKS[name].published for name in names)


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=lambda b: b.name)
def test_published_numbers_are_in_range_and_have_a_source(benchmark: Benchmark) -> None:
    for entry in benchmark.published:
        assert entry.source
        assert 0 < entry.value <= (500 if entry.metric == "hd95" else 1)
        assert entry.metric in benchmark.metrics
        assert entry.region in {"", "mean", *(region.name for region in benchmark.regions)}
    assert abs(sum(benchmark.split.shares) - 1) < 1e-9


@pytest.mark.parametrize(
    ("name", "values"), [("adni", {0.6218, 0.6765}), ("adhd-200", {0.6948, 0.6883}), ("abide-i", {0.6545, 0.697})]
)
def test_conflicting_numbers_stay_side_by_side(name: str, values: set[float]) -> None:
    found = [e for e in BENCHMARKS[name].published if e.method == "BrainMVP" and e.metric == "accuracy"]
    assert {entry.value for entry in found} == values
    assert len({entry.source for entry in found}) == 2


def test_controls_of_the_phantoms() -> None:
    assert BENCHMARKS["phantom-shuffled"].shuffle_seed is not None
    assert BENCHMARKS["phantom-shuffled"].target == BENCHMARKS["phantom-diagnosis"].target
    assert BENCHMARKS["phantom-control"].control == "positive"


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"unknown benchmark 'nope'; known: phantom-tumour"):
        find_benchmark("nope")
    with pytest.raises(KeyError, match=r"unknown label scheme 'brats'; known: brats2021"):
        find_scheme("brats")


def test_refuses_metrics_of_the_other_kind_and_missing_parts() -> None:
    base = BENCHMARKS["phantom-tumour"]
    with pytest.raises(ValidationError, match=r"metrics \['auroc'\] do not belong to segmentation"):
        base.replace(metrics=("dice", "auroc"))
    with pytest.raises(ValidationError, match="needs a label scheme and no target column"):
        base.replace(scheme="")
    with pytest.raises(ValidationError, match="needs a target column and at least two classes"):
        BENCHMARKS["adni"].replace(classes=("HC",))


def test_data_are_found_by_dataset() -> None:
    assert has_data(BENCHMARKS["phantom-tumour"], ["phantom-bids"])
    assert not has_data(BENCHMARKS["adni"], ["phantom-bids"])
    assert set(LABEL_SCHEMES) >= {b.scheme for b in BENCHMARKS.values() if b.scheme}
    with pytest.raises(KeyError, match="unknown label scheme 'brats2019'"):
        BENCHMARKS["brats2023-ped"].replace(other_schemes=("brats2019",))


def test_digests_of_what_was_scored_before_are_the_same() -> None:
    """New fields of a benchmark must not ask for everything to be scored again."""
    assert {name: BENCHMARKS[name].content_digest()[:12] for name in PHANTOM_BENCHMARKS} == DIGESTS
