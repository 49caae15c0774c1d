"""Predictions as NIfTI: labels of the scheme from regions, on the grid of the source scan."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nifti_files import SMALL, oblique, write_nifti
from scipy.ndimage import center_of_mass
from store_builds import ingest, scans_of
from typer.testing import CliRunner

from brainloom.cli import app
from models.config import Region
from models.export import NotFinishedError
from models.objectives.segmentation import to_regions
from models.prediction_files import damage, place_of
from models.recipes import RECIPES
from models.records import SelectedCase
from models.selection import write_selection
from models.store import open_store
from tasks.label_schemes import LABEL_SCHEMES
from tasks.native import export_predictions, own_labels, to_label
from tasks.scores import ScoreError

SHAPE, ZOOMS = (30, 26, 12), (0.9, 1.1, 2.5)
"""An anisotropic scan, turned by 12 degrees."""


@pytest.mark.parametrize("scheme", LABEL_SCHEMES)
def test_a_label_survives_the_way_to_regions_and_back(scheme: str) -> None:
    regions = LABEL_SCHEMES[scheme]
    values = sorted({0}.union(*(region.labels for region in regions)))
    label = np.array(values * 2, np.uint8).reshape(1, 2, -1)
    expected = np.where(label == 3, 2, label) if scheme == "brats-ped2024" else label  # no region tells 2 from 3
    np.testing.assert_array_equal(to_label(to_regions(label, regions).astype(bool), regions), expected)


def test_masks_that_contradict_each_other_give_the_smaller_region() -> None:
    regions = LABEL_SCHEMES["brats2021"]
    assert own_labels(regions) == [4, 1, 2]
    masks = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]], bool).T.reshape(3, 1, 1, 3)  # enhancing outside of the core
    assert to_label(masks, regions).tolist() == [[[4, 4, 2]]]
    halves = [Region(name="A", labels=(1,)), Region(name="B", labels=(2,)), Region(name="AB", labels=(1, 2))]
    assert own_labels(halves) == [1, 2, 0]


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """A finished training that predicts each of its two cases as the stored label says."""
    affine = oblique(SHAPE, ZOOMS)
    image, label = _phantom(affine)
    scans = []
    for name in ("a", "b"):
        folder = tmp_path / "sources" / name
        files = {
            "t1": write_nifti(folder / "t1.nii.gz", image, affine),
            "label": write_nifti(folder / "seg.nii.gz", label, affine),
        }
        scans += scans_of(files, name)
    url = str(tmp_path / "s.zarr")
    ingest(url, scans, spec=SMALL.replace(grid=(48, 48, 40)))
    lines = open_store(url).cases().to_pylist()
    cases = [
        SelectedCase(**{key: line[key] for key in ("dataset", "row", "case", "subject", "digest")}, role="test")
        for line in lines
    ]
    return _finished(tmp_path / "training", url, cases)


def _phantom(affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a head and a lesion of three layers, both balls in the world (mm)."""
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), axis=-1)
    world = nib.affines.apply_affine(affine, voxels)
    head = 12 - np.linalg.norm(world, axis=-1)
    away = np.linalg.norm(world - (3, -2, 1), axis=-1)
    label = np.select([away < 3, away < 5, away < 8], [1, 3, 2], 0)
    return np.clip(head + 20, 0, None).astype(np.float32) * (head > 0), label.astype(np.uint8) * (head > 0)


def _finished(folder: Path, url: str, cases: list[SelectedCase]) -> Path:
    (folder / "predictions").mkdir(parents=True)
    regions = LABEL_SCHEMES["brats2023"]
    config = RECIPES["segmentation_tiny"](url, str(folder / "selection.parquet"), modalities=("t1",), regions=regions)
    write_selection(folder / "selection.parquet", cases)
    for case in cases:
        _, label = open_store(url).dataset("toy").read_case(case.row)
        assert label is not None
        np.savez_compressed(folder / "predictions" / f"{case.case}.npz", regions=to_regions(label, regions))
    stored = open_store(url).dataset("toy")
    table = [
        {"dataset": case.dataset, "case": case.case, "file": f"{case.case}.npz"} | place_of(stored.case_info(case.row))
        for case in cases
    ]
    pd.DataFrame(table).to_parquet(folder / "predictions" / "predictions.parquet")
    (folder / "run.json").write_text(config.model_dump_json())
    (folder / "done.json").write_text("{}")
    return folder


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def test_an_oblique_thick_slice_label_comes_back_where_it_was(training: Path, tmp_path: Path) -> None:
    files = export_predictions(training, tmp_path / "out")
    assert [path.name for path in files] == ["toy_a_prediction.nii.gz", "toy_b_prediction.nii.gz"]
    source = nib.load(tmp_path / "sources" / "a" / "seg.nii.gz")
    found = nib.load(files[0])
    assert found.shape == source.shape
    np.testing.assert_allclose(found.affine, source.affine, atol=1e-4)
    assert int(found.header["sform_code"]) == int(found.header["qform_code"]) == 1
    truth, label = np.asarray(source.dataobj), np.asarray(found.dataobj)
    assert label.dtype == np.uint8
    assert set(np.unique(label)) == {0, 1, 2, 3}
    for region in LABEL_SCHEMES["brats2023"]:
        ours, theirs = np.isin(label, region.labels), np.isin(truth, region.labels)
        if region.name == "WT":
            assert overlap(ours, theirs) > 0.9
        centres = [nib.affines.apply_affine(source.affine, center_of_mass(mask)) for mask in (ours, theirs)]
        assert np.linalg.norm(centres[0] - centres[1]) < 0.5, "mm in the world"


def test_on_the_stored_grid_nothing_is_lost(training: Path, tmp_path: Path) -> None:
    (path,) = export_predictions(training, tmp_path / "out", cases=["toy/b"], native=False)
    stored = open_store(str(tmp_path / "s.zarr")).dataset("toy")
    row = next(row for row in stored.rows if stored.case_info(row).case == "b")
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), stored.read_case(row)[1])
    np.testing.assert_allclose(nib.load(path).affine, stored.case_info(row).affine)


def test_the_command_line_writes_them(training: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["predictions", str(training), "--out", str(out), "--case", "toy/a"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [str(out / "toy_a_prediction.nii.gz")]


def test_what_cannot_be_written_is_refused(training: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'toy/x' is no test case of segmentation_tiny; for example 'toy/a'"):
        export_predictions(training, tmp_path / "out", cases=["toy/x"])
    export_predictions(training, tmp_path / "out", cases=["toy/a"])
    with pytest.raises(
        FileExistsError, match=r"toy_a_prediction.nii.gz exists; choose another folder or pass --overwr"
    ):
        export_predictions(training, tmp_path / "out")
    assert len(export_predictions(training, tmp_path / "out", overwrite=True)) == 2
    config = RECIPES["classification_tiny"]("s", "p", name="ages")
    (training / "run.json").write_text(config.model_dump_json())
    with pytest.raises(ValueError, match=r"training ages is no segmentation \(classification\)"):
        export_predictions(training, tmp_path / "out")
    (training / "done.json").unlink()
    with pytest.raises(NotFinishedError, match=r"is not finished: it has no done.json; run it to its end"):
        export_predictions(training, tmp_path / "out")


def test_predictions_of_another_extent_are_refused(training: Path, tmp_path: Path) -> None:
    np.savez_compressed(training / "predictions" / "a.npz", regions=np.zeros((3, 4, 4, 4), np.uint8))
    with pytest.raises(
        ScoreError,
        match=r"case a: .*a\.npz has masks of shape \(3, 4, 4, 4\), its case has \(.*\) voxels \(regions, x, y, z are "
        r"needed\); delete it and run evaluate again",
    ):
        export_predictions(training, tmp_path / "out")


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("affine", r"case b: .*predictions\.parquet: b was predicted on another grid, of .* voxels with the affine "
         r"\[\[.*; the store has it on .* with the affine .*; delete it and run evaluate again"),
        ("digest", r"case b: .*predictions\.parquet: b was predicted as digest other, asked is the case with digest "
         r"[0-9a-f]{12}: another one, or preprocessed anew; delete it and run evaluate again"),
    ],
)  # fmt: skip
def test_predictions_of_another_grid_or_case_with_as_many_voxels_are_refused_and_made_again(
    training: Path, tmp_path: Path, column: str, text: str
) -> None:
    path = training / "predictions" / "predictions.parquet"
    table = pd.read_parquet(path)
    moved = np.array(table[column][1]) + 3.0 if column == "affine" else "other"
    table[column] = pd.Series([table[column][0], moved])
    table.to_parquet(path)
    export_predictions(training, tmp_path / "out", cases=["toy/a"])
    with pytest.raises(ScoreError, match=text):
        export_predictions(training, tmp_path / "out", cases=["toy/b"])


@pytest.mark.parametrize("column", ["digest", "affine"])
def test_predictions_from_before_they_named_their_case_are_made_again(training: Path, column: str) -> None:
    config = RECIPES["segmentation_tiny"]("s", str(training / "selection.parquet"), predict=True)
    assert not damage(training, config)
    path = training / "predictions" / "predictions.parquet"
    table = pd.read_parquet(path)
    table.drop(columns=column).to_parquet(path)
    assert f"predictions.parquet lacks the columns ['{column}']; delete it and run evaluate" in damage(training, config)
    table.assign(digest="x").to_parquet(path)
    assert "a was predicted as digest x, asked is the case with digest" in damage(training, config)
    table.to_parquet(path)
    np.savez_compressed(training / "predictions" / "b.npz", regions=np.zeros((3, 4, 4, 4), np.uint8))
    assert "b.npz has masks of shape (3, 4, 4, 4), its case has" in damage(training, config)
