"""Cases with one known defect each come first for the right reason; clean ones and small datasets are left in peace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import erfc, sqrt
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from qc_phantoms import CLEAN, DEFECTS, write_qc_store
from store_builds import ingest

from models.records import LABEL
from models.spec import SPECS
from tasks.catalog import build_catalog
from tasks.phantom import PhantomConfig, write_cohort
from tasks.phantom.config import NO_LESIONS
from tasks.qc_measures import MEASURES, Column, Measured, read_measures
from tasks.qc_outliers import FACT_Z, MIN_CASES, OUTLIER_Z, Ranking, rank, robust_scale, small_sample
from tasks.sources import BidsSource

REASONS = {
    "noisy": "SNR of t1 is",
    "biased": "drift of intensity inside t1 is",
    "shifted": "source intensity offset of t1 is",
    "scaled": "source intensity range of t1 is",
    "cut": "flat end of t1 (inferior face) is",
    "incomplete": "no t2, which nearly all others have",
}
SIDES = {"noisy": "below", "biased": "above", "shifted": "above", "scaled": "above", "cut": "above"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return read_measures(write_qc_store(tmp_path_factory.mktemp("outliers")))


def with_only(measured: Measured, defects: Sequence[str], clean: int = CLEAN) -> Ranking:
    """Rank the clean cases and some of the others."""
    names = measured.cases["case"]
    kept = (~names.isin(list(DEFECTS)) & (names < f"c{clean:02d}")) | names.isin(defects)
    return rank(Measured(measured.cases[kept], measured.values[kept], measured.columns))


def table(values: Mapping[str, Sequence[float]], **columns: Sequence[object]) -> Measured:
    """Return measures of one dataset that were never in a store."""
    count = len(next(iter(values.values())))
    cases = pd.DataFrame({"dataset": "d", "row": range(count), "case": [f"c{n:03d}" for n in range(count)]})
    defaults = {"subject": "s", "modalities": ["t1"], "has_label": False, "facts": {}, "faces": {}}
    defaults["has_connectome"] = False
    for name, value in defaults.items():
        cases[name] = pd.Series(columns.get(name, [value] * count), dtype=object)
    named = {measure.column("t1"): Column(measure, "t1" if measure.of_modality else "") for measure in MEASURES}
    return Measured(cases, pd.DataFrame(values, dtype=float), named)


@pytest.mark.parametrize("defect", list(DEFECTS))
@pytest.mark.parametrize("clean", [CLEAN, 10])
def test_a_defect_ranks_first_for_its_reason(measured: Measured, defect: str, clean: int) -> None:
    ranking = with_only(measured, [defect], clean)
    assert ranking.outliers["case"].tolist() == [defect]
    first = ranking.of("phantom").iloc[0]
    assert first["case"] == defect
    assert first["reasons"][0].startswith(REASONS[defect])
    if defect in SIDES:
        assert f"robust deviations {SIDES[defect]} the dataset: " in first["reasons"][0]


def test_all_defects_together_stand_out(measured: Measured) -> None:
    assert set(with_only(measured, list(DEFECTS)).outliers["case"]) == set(DEFECTS)


def test_clean_cases_do_not_stand_out(measured: Measured) -> None:
    assert with_only(measured, []).outliers.empty


@pytest.mark.full
@pytest.mark.parametrize("seed", [50, 51, 52])
def test_clean_anatomy_of_three_scanners_raises_few_alarms(tmp_path: Path, seed: int) -> None:
    none = {"missing_share": 0, "other_grid_share": 0, "lesions": NO_LESIONS}
    cohort = PhantomConfig(seed=seed, bids_subjects=40, datalist_subjects=0, spacing_mm=5.0, **none)
    write_cohort(cohort, tmp_path)
    source = BidsSource(dataset="phantom", root=str(tmp_path / cohort.bids_name))
    scans = [scan for scan in build_catalog([source]).scans if scan.status == "ok"]
    ingest(str(tmp_path / "s.zarr"), scans, spec=SPECS["demo"])
    assert len(rank(read_measures(str(tmp_path / "s.zarr"))).outliers) <= 2


def test_few_cases_are_not_ranked_and_the_report_says_so(measured: Measured) -> None:
    ranking = with_only(measured, ["noisy", "incomplete"], clean=MIN_CASES - 3)
    assert ranking.outliers.empty
    assert ranking.cases["score"].isna().all()
    assert ranking.unranked == {
        "phantom": "phantom has 7 cases: too few to say what is usual (8 are needed), so none is ranked."
    }


def test_a_modality_of_few_cases_is_not_ranked() -> None:
    rng = np.random.default_rng(0)
    few = [*rng.normal(0.5, 0.02, MIN_CASES - 1), *[np.nan] * 12]
    ranking = rank(table({"foreground_share": rng.normal(0.5, 0.02, 19), "mean_t1": few}))
    assert ranking.deviations["mean_t1"].isna().all()
    assert ranking.unranked == {"d": "d: too few cases have t1 to rank them by it (8 are needed)."}


@pytest.mark.parametrize("count", [8, 12, 20, 60])
def test_small_datasets_raise_no_more_alarms_than_large_ones(count: int) -> None:
    rng = np.random.default_rng(count)
    outside, trials = 0, 40_000 // count
    for _ in range(trials):
        x = rng.standard_normal(count)
        z = (x - np.median(x)) / (robust_scale(x, 0.0) * small_sample(count))
        outside += int((np.abs(z) > OUTLIER_Z).sum())
    assert outside / (trials * count) < 2.5 * erfc(OUTLIER_Z / sqrt(2))


def test_alarms_in_a_large_clean_dataset_are_rare() -> None:
    rng = np.random.default_rng(1)
    names = ["mean_t1", "drift_t1", "flat_end_t1", "offset_t1"]
    ranking = rank(table({name: rng.normal(0.5, 0.2, 4000) for name in names}))
    # Two measures are bad on one side, two on either: six sides of 2.3e-4 each.
    assert len(ranking.outliers) / 4000 < 2 * 6 * 2.3e-4


def test_a_case_that_the_grid_cuts_stands_out() -> None:
    shares = [*np.random.default_rng(3).uniform(0, 0.004, 11), 0.12]
    (found,) = rank(table({"outside_grid_t1": shares})).outliers.to_dict("records")
    assert found["case"] == "c011"
    assert found["reasons"][0].startswith("tissue of t1 outside the grid is ")
    assert " above the dataset: 0.12, usually 0 to " in found["reasons"][0]


def test_a_second_scanner_is_no_outlier() -> None:
    rng = np.random.default_rng(2)
    ranges = np.concatenate([rng.normal(300, 20, 34), rng.normal(3, 0.2, 6)])
    assert rank(table({"range_t1": ranges})).outliers.empty
    ranges[-4:] = 300
    assert rank(table({"range_t1": ranges})).outliers["case"].tolist() == ["c034", "c035"]


def test_differences_below_the_floor_do_not_matter_and_equal_values_are_usual() -> None:
    assert rank(table({"voxel_mm_t1": [1.0] * 19 + [1.01]})).outliers.empty
    (case,) = rank(table({"voxel_mm_t1": [1.0] * 19 + [3.0]})).outliers.to_dict("records")
    assert case["reasons"] == [
        f"largest voxel edge of t1 is {case['score']:.1f} robust deviations above the dataset: 3 mm, "
        "usually 0.961 mm to 1.04 mm"
    ]


def test_the_good_side_is_no_reason() -> None:
    rng = np.random.default_rng(3)
    snr = rng.normal(20, 0.5, 30)
    snr[7] = 100
    ranking = rank(table({"snr_t1": snr}))
    assert ranking.outliers.empty
    assert ranking.deviations["snr_t1"][7] > OUTLIER_Z


def test_rare_flags_and_missing_labels_are_reasons_and_common_ones_are_not() -> None:
    shares = np.random.default_rng(4).normal(0.5, 0.01, 20)
    flags = [{"affine_from_t1": "t1: affine from the qform"}] * 12 + [{}] * 8
    flags[15] = {"nan_replaced_t1": "t1: 3 voxels were not finite and became 0"}
    ranking = rank(table({"foreground_share": shares}, facts=flags, has_label=[n != 4 for n in range(20)]))
    found = {case["case"]: (case["score"], case["reasons"]) for case in ranking.outliers.to_dict("records")}
    assert found == {
        "c004": (FACT_Z, [f"no {LABEL}, which nearly all others have"]),
        "c015": (FACT_Z, ["t1: 3 voxels were not finite and became 0 (rare in the dataset)"]),
    }


def test_an_empty_store_has_nothing_to_rank(tmp_path: Path) -> None:
    empty = table({"foreground_share": [0.5] * 9})
    ranking = rank(Measured(empty.cases.iloc[:0], empty.values.iloc[:0], empty.columns))
    assert ranking.outliers.empty
    assert ranking.datasets == []
