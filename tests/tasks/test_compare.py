import nibabel as nib
import numpy as np
from nifti_files import SMALL, blob, write_case, write_nifti
from store_builds import ingest, scans_of, three_subjects

from tasks.compare import compare


def test_equal_stores_with_other_row_orders_are_equal(tmp_path):
    scans = three_subjects(tmp_path)
    one, other = str(tmp_path / "a.zarr"), str(tmp_path / "b.zarr")
    ingest(one, scans)
    ingest(other, [scan for scan in scans if scan.case == "c"])
    ingest(other, scans)
    found = compare(one, other)
    assert found.equal
    assert found.sentences(5) == ["3 cases are the same; the stores are equal"]


def test_all_differences_are_named(tmp_path):
    scans = three_subjects(tmp_path)
    one, other = str(tmp_path / "a.zarr"), str(tmp_path / "b.zarr")
    ingest(one, [scan for scan in scans if scan.case != "c"])
    changed = scans_of(write_case(tmp_path / "new", "b", seed=5, label=True), "b")
    extra = [scan.replace(dataset="ixi") for scan in scans if scan.case == "a"]
    spec = SMALL.replace(name="narrow", percentiles=(1.0, 99.0), modalities=("t1", "t2"))
    ingest(other, [*changed, *extra, *(s for s in scans if s.case == "c")], spec=spec)
    found = compare(one, other)
    assert not found.equal
    assert found.spec["percentiles"] == ([5.0, 95.0], [1.0, 99.0])
    assert found.datasets_only_b == ("ixi",)
    assert (found.cases_only_a, found.cases_only_b) == (("toy/a",), ("ixi/a", "toy/c"))
    assert (found.changed, found.same) == (("toy/b",), 0)
    text = found.sentences(1)
    assert "cases only in B (2): ixi/a and 1 more" in text
    assert text[-1] == "0 cases are the same; the stores differ"


def test_voxels_say_how_far_apart_changed_cases_are(tmp_path):
    one, other = str(tmp_path / "a.zarr"), str(tmp_path / "b.zarr")
    files = write_case(tmp_path, "a", label=True)
    ingest(one, scans_of(files, "a"))
    for name in ("t1", "label"):
        image = nib.load(files[name])
        values = np.asarray(image.dataobj).copy()
        values[12, 12, 10] = 6  # as good as no signal in t1, another class in the label
        write_nifti(files[name], values, image.affine)
    ingest(other, scans_of(files, "a"))
    found = compare(one, other, voxels=True)
    assert found.changed == ("toy/a",)
    gap = found.voxels["toy/a"]
    assert gap.modalities["t1"] > 0.5
    assert gap.modalities["t2"] == 0
    assert gap.label_voxels == 1
    assert gap.shifted == ""
    assert found.sentences(5)[1].startswith("toy/a: largest difference t1 ")
    assert found.sentences(5)[1].endswith("; 1 label voxels differ")


def test_cases_of_another_extent_are_not_compared_voxel_by_voxel(tmp_path):
    one, other = str(tmp_path / "a.zarr"), str(tmp_path / "b.zarr")
    ingest(one, scans_of(write_case(tmp_path / "x", "a"), "a"))
    smaller = write_nifti(tmp_path / "y" / "a_t1.nii.gz", blob((28, 28, 24)))
    ingest(other, scans_of({"t1": smaller}, "a"))
    assert compare(one, other, voxels=True).voxels["toy/a"].shifted == "extent (22, 20, 16) and (20, 20, 16)"
