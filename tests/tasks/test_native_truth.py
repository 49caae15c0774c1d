"""Scores on the grid of the label file: masks moved there, labels as drawn, and what is missing."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from native_stores import SHAPE, ZOOMS, write_native_store

from models.records import SelectedCase
from models.store import open_store
from tasks.benchmarks import BENCHMARKS
from tasks.evaluation import Cohort, native_cohort
from tasks.native_truth import SourceLabels
from tasks.scores import RowKey, ScoreError, segmentation_scores

TUMOUR = BENCHMARKS["phantom-tumour"].replace(datasets=("toy",), modalities=("t1",))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return a store of one case and the label file that it was made from."""
    url, files = write_native_store(tmp_path_factory.mktemp("native"), "a")
    return url, files["a"]


def case_of(url: str, **changes: object) -> SelectedCase:
    (line,) = open_store(url).cases().to_pylist()
    values = {key: line[key] for key in ("dataset", "row", "case", "subject", "digest")}
    return SelectedCase.model_validate({**values, "role": "test", **changes})


def cohort_of(url: str) -> Cohort:
    return native_cohort(Cohort(TUMOUR, (case_of(url),), None, open_store(url)))  # type: ignore[arg-type]


def test_the_label_is_that_of_the_file_with_its_voxels(source: tuple[str, Path]) -> None:
    url, path = source
    label, spacing = SourceLabels(open_store(url)).truth(case_of(url))
    np.testing.assert_array_equal(label, np.asarray(nib.load(path).dataobj))
    np.testing.assert_allclose(spacing, ZOOMS, rtol=1e-5)


def test_the_stored_label_moved_back_scores_nearly_one_and_in_the_voxels_of_the_file(source: tuple[str, Path]) -> None:
    url, _ = source
    cohort, case = cohort_of(url), case_of(url)
    stored = np.stack([np.isin(cohort.label(case), region.labels) for region in TUMOUR.regions])
    frame = segmentation_scores(
        RowKey(cohort.benchmark.name, "scratch", 0), cohort.benchmark, [case],
        lambda _: cohort.on_grid(case, stored), cohort.truth,
    )  # fmt: skip
    values = frame.set_index(["metric", "region"])["value"]
    assert 0.9 < values["dice", "WT"] < 1
    assert values["hd95", "WT"] <= 2.5
    assert values["lesion_f1", "WT"] == 1
    volume = np.prod(ZOOMS) / 1000
    assert values["volume_error_ml", "WT"] / volume == pytest.approx(round(values["volume_error_ml", "WT"] / volume))


def test_regions_that_contradict_each_other_are_moved_as_they_are(source: tuple[str, Path]) -> None:
    url, _ = source
    cohort, case = cohort_of(url), case_of(url)
    masks = np.zeros((3, *cohort.label(case).shape), np.uint8)
    masks[0] = 1  # enhancing everywhere, no core and no tumour around it
    moved = cohort.on_grid(case, masks)
    assert moved.shape == (3, *SHAPE)
    assert moved[0].any()
    assert not moved[1:].any()


def test_native_scores_have_a_name_of_their_own_and_no_published_rows(source: tuple[str, Path]) -> None:
    cohort = cohort_of(source[0])
    assert cohort.benchmark.name == "phantom-tumour-native"
    assert cohort.trained_as == "phantom-tumour"
    native = native_cohort(Cohort(BENCHMARKS["vsseg"], (), None, open_store(source[0])))  # type: ignore[arg-type]
    assert native.benchmark.published == ()


def test_what_is_missing_is_named(source: tuple[str, Path], tmp_path: Path) -> None:
    url, path = source
    labels, case = SourceLabels(open_store(url)), case_of(url)
    with pytest.raises(ScoreError, match=r"case a: .* names no label file of it, so it has no native grid; eval"):
        labels.truth(case_of(url, row=7))
    moved = path.rename(tmp_path / "elsewhere.nii.gz")
    try:
        with pytest.raises(ScoreError, match=r"case a: .*seg.nii.gz is not there any more; native scores need the"):
            SourceLabels(open_store(url)).truth(case_of(url))
        with pytest.raises(
            ScoreError, match=r"1 of 1 label files are not there any more, first that of case a: .*seg\.nii"
        ):
            SourceLabels(open_store(url)).check([case_of(url)])
    finally:
        moved.rename(path)
    with pytest.raises(ScoreError, match="9 regions; at most 8 can be moved to a native grid"):
        labels.moved(case, open_store(url).dataset(case.dataset), np.zeros((9, 2, 2, 2)), [TUMOUR.regions[0]] * 9)
