"""Predictions of others: files found by case, grids compared, label maps moved and scored, bad ones refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from native_stores import write_native_store

from models.records import SelectedCase
from models.store import open_store
from tasks.benchmarks import BENCHMARKS
from tasks.evaluation import Cohort, native_cohort
from tasks.export_nifti import export_cases
from tasks.others import Others, check_others, find_files, score_others
from tasks.scores import ScoreError

TUMOUR = BENCHMARKS["phantom-tumour"].replace(datasets=("toy",), modalities=("t1",))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Path]]:
    """Return a store of two cases and their label files."""
    return write_native_store(tmp_path_factory.mktemp("others"), "ab")


@pytest.fixture
def cohort(source: tuple[str, dict[str, Path]]) -> Cohort:
    store = open_store(source[0])
    keys = ("dataset", "row", "case", "subject", "digest")
    cases = [
        SelectedCase.model_validate({**{key: line[key] for key in keys}, "role": "test"})
        for line in store.cases().to_pylist()
    ]
    return Cohort(TUMOUR, tuple(cases), store.cases().to_pandas(), store)


@pytest.fixture
def folder(source: tuple[str, dict[str, Path]], tmp_path: Path) -> Path:
    """Return the label files themselves as predictions, on the grids of the scans."""
    for name, path in source[1].items():
        shutil.copy(path, tmp_path / f"{name}.nii.gz")
    return tmp_path


def others(folder: Path, name: str = "nnU-Net") -> Others:
    return Others(name, TUMOUR.name, folder)


def scored(cohort: Cohort, folder: Path, kept: Path) -> tuple[pd.DataFrame, int]:
    return score_others(replace(cohort, others=(others(folder),)), kept)


def rewrite(path: Path, change: object) -> None:
    """Write a label map again with other voxels or, as a matrix, another affine."""
    image = nib.load(path)
    values, affine = np.asarray(image.dataobj), image.affine
    changed = change(values) if callable(change) else values
    nib.save(nib.Nifti1Image(changed, affine if callable(change) else np.asarray(change)), path)


def test_maps_on_the_grids_of_scans_are_scored_on_both_grids(cohort: Cohort, folder: Path, tmp_path: Path) -> None:
    check_others(others(folder), cohort)
    stored, fresh = scored(cohort, folder, tmp_path / "kept")
    assert fresh == 1
    assert set(stored["row"]) == {"nnU-Net"}
    assert stored.groupby("case").size().nunique() == 1
    dice = stored[stored["metric"] == "dice"]["value"]
    assert len(dice) == 2 * 3
    assert dice.min() > 0.99, "moved as the labels of the store were"
    native, _ = scored(native_cohort(cohort), folder, tmp_path / "kept")
    assert (native[native["metric"] == "dice"]["value"] == 1).all(), "not moved at all"


def test_maps_on_the_stored_grid_are_scored_on_both_grids(
    cohort: Cohort, source: tuple[str, dict[str, Path]], tmp_path: Path
) -> None:
    export_cases(source[0], ["toy/a", "toy/b"], tmp_path, modalities=["label"])
    for path in tmp_path.glob("*_label.nii.gz"):
        path.rename(path.with_name(path.name.replace("_label", "_prediction")))
    stored, _ = scored(cohort, tmp_path, tmp_path / "kept")
    assert (stored[stored["metric"] == "dice"]["value"] == 1).all()
    native, _ = scored(native_cohort(cohort), tmp_path, tmp_path / "kept")
    dice = native[(native["metric"] == "dice") & (native["region"] == "WT")]["value"]
    assert dice.between(0.9, 1, inclusive="left").all(), "moved back, as predictions of ours are"


def test_unchanged_files_are_not_scored_again_and_changed_ones_are(
    cohort: Cohort, folder: Path, tmp_path: Path
) -> None:
    first, _ = scored(cohort, folder, tmp_path / "kept")
    (folder / "notes.txt").write_text("not looked at")
    assert scored(cohort, folder, tmp_path / "kept")[1] == 0
    rewrite(folder / "a.nii.gz", lambda values: values * (values != 3))
    second, fresh = scored(cohort, folder, tmp_path / "kept")
    assert fresh == 1
    assert second["value"].sum() != first["value"].sum()


def test_files_are_found_by_case_subject_or_dataset(cohort: Cohort, folder: Path) -> None:
    a, b = cohort.selected
    both = replace(cohort, selected=(a.replace(case="a_1"), a.replace(case="a_2", row=9), b))
    for name in ("toy_a_1.nii.gz", "a_2.nii"):
        shutil.copy(folder / "b.nii.gz", folder / name)
    assert [path.name for _, path in find_files(others(folder), both)] == ["toy_a_1.nii.gz", "a_2.nii", "b.nii.gz"], (
        "a.nii.gz could be either case of the subject, so it is neither's"
    )


def test_a_subjects_id_is_no_name_where_it_may_be_another_case(cohort: Cohort, folder: Path) -> None:
    a, b = cohort.selected
    people = cohort.people.assign(case=["b", "c"], subject=["a", "b"])
    shutil.copy(folder / "b.nii.gz", folder / "c.nii.gz")
    crossed = replace(cohort, people=people, selected=(a.replace(case="b"), b.replace(case="c")))
    (folder / "a.nii.gz").unlink()
    assert [path.name for _, path in find_files(others(folder), crossed)] == ["b.nii.gz", "c.nii.gz"]

    sessions = replace(cohort, people=cohort.people.assign(case=["x_1", "x_2"], subject="x"))
    sessions = replace(sessions, selected=(a.replace(case="x_1", subject="x"),))
    shutil.copy(folder / "b.nii.gz", folder / "x.nii.gz")
    with pytest.raises(ScoreError, match=r"first x_1 of toy; every test case needs one, called x_1.nii.gz or toy_x_1"):
        find_files(others(folder), sessions)
    alone = replace(sessions, people=sessions.people[:1])
    assert [path.name for _, path in find_files(others(folder), alone)] == ["x.nii.gz"]


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (
            lambda f: shutil.copy(f / "a.nii.gz", f / "toy_a.nii.gz"),
            r"predictions 'nnU-Net' for phantom-tumour: case a has 2 files, a.nii.gz and toy_a.nii.gz in .*; one label",
        ),
        (
            lambda f: (f / "b.nii.gz").unlink(),
            r"has no label map for 1 of 2 test cases, first b of toy; every test case needs one, called b.nii.gz or",
        ),
        (
            lambda f: rewrite(f / "a.nii.gz", np.diag([0.9, 1.1, 2.5, 1])),
            r"a.nii.gz lies on another grid \(24 x 22 x 10, affine .*\) than case a is known on \(the stored case: .*; "
            r"t1: 24 x 22 x 10, .*\); shape and affine \(within 0.1 mm\) must be those of one of them: resample it",
        ),
        (
            lambda f: rewrite(f / "a.nii.gz", lambda values: values[:-1]),
            r"a.nii.gz lies on another grid \(23 x 22 x 10",
        ),
        (lambda f: (f / "a.nii.gz").write_bytes(b"none"), r"a\.nii\.gz: .*; write it again as a NIfTI label map"),
    ],
)
def test_what_headers_show_is_refused_before_anything_is_trained(
    cohort: Cohort, folder: Path, harm: object, text: str
) -> None:
    assert callable(harm)
    harm(folder)
    with pytest.raises(ScoreError, match=text):
        check_others(others(folder), cohort)


def test_a_folder_that_is_not_there_is_refused(cohort: Cohort, folder: Path) -> None:
    with pytest.raises(ScoreError, match=r"predictions 'nnU-Net' for .*elsewhere is no folder on this host; correct"):
        check_others(others(folder / "elsewhere"), cohort)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda values: np.where(values == 3, 7, values).astype(np.uint8),
            r"a.nii.gz, case a: label values \[7\] are outside scheme 'brats2023' \(it knows \[0, 1, 2, 3\]\); write "
            r"the label values of the dataset, not the network's own",
        ),
        (
            lambda values: values * np.float32(0.5),
            r"a.nii.gz, case a: .*labels must be integers of 0..255, .*; a label map of finite integers is needed",
        ),
        (
            lambda values: np.where(values == 3, np.nan, values).astype(np.float32),
            r"a.nii.gz, case a: .*; a label map of finite integers is needed",
        ),
    ],
)
def test_voxels_that_are_no_labels_are_refused_when_they_are_scored(
    cohort: Cohort, folder: Path, tmp_path: Path, change: object, text: str
) -> None:
    rewrite(folder / "a.nii.gz", change)
    check_others(others(folder), cohort)
    with pytest.raises(ScoreError, match=rf"phantom-tumour, row 'nnU-Net', seed 0, .*{text}"):
        scored(cohort, folder, tmp_path / "kept")
