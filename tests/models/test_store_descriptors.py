"""Regional descriptors in a store: written, read, checked, repaired, erased and exported like everything else."""

import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from anatomy_files import regional, write_map
from nifti_files import scan_of
from store_builds import ingest

from infra import storage
from models.anatomy import ATLASES, DESIKAN_KILLIANY, MEASURES
from models.records import DescriptorTable
from models.spec import SPECS
from models.staging import Mirror
from models.store import StoreError, open_store, store_digest
from models.store_descriptors import digest_bytes, layout_of
from tasks.compact import compact
from tasks.compare import compare
from tasks.descriptors import file_bytes, identity_of
from tasks.export_nifti import export_cases
from tasks.forget import forget
from tasks.selection import select_cases
from tasks.verify import damaged_rows, verify

SPEC = SPECS["vbm_tiny"]


def table(subject=0, atlas="desikan_killiany", basis="freesurfer", **changes):
    values = {**regional(subject, atlas), **changes}
    return DescriptorTable(atlas=atlas, basis=basis, values=values)


def scans_of(folder, name, descriptors=None, seed=0):
    """Write one subject's map, unless it is there, and file of descriptors; return the catalog rows."""
    path = folder / f"mwp1{name}.nii"
    scans = [scan_of(path if path.exists() else write_map(path, seed), "gm", name)]
    if descriptors is None:
        return scans
    raw = file_bytes(descriptors)
    path = folder / f"{name}-{identity_of(raw)[1][-8:]}.json"
    path.write_bytes(raw)
    size, identity = identity_of(raw)
    return [*scans, scans[0].replace(modality="descriptors", path=str(path), size_bytes=size, etag=identity)]


def three(folder):
    """Subjects a and b with descriptors, c without."""
    return [*scans_of(folder, "a", table(0), 0), *scans_of(folder, "b", table(1), 1), *scans_of(folder, "c", seed=2)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(scope="module")
def built(sources):
    """A store that nobody changes."""
    url = str(sources / "s.zarr")
    ingest(url, three(sources), spec=SPEC)
    return url


@pytest.fixture
def url(built, tmp_path):
    """A copy of the store."""
    shutil.copytree(built, tmp_path / "s.zarr")
    return str(tmp_path / "s.zarr")


def test_what_was_measured_is_what_is_read(built):
    data = open_store(built).dataset("toy")
    found = data.descriptors
    assert found is not None
    assert (found.atlas, found.basis, found.measures, found.regions) == (
        "desikan_killiany",
        "freesurfer",
        MEASURES,
        DESIKAN_KILLIANY,
    )
    assert (found.values.shape, found.values.dtype) == ((3, 3, 68), np.float32)
    for row in range(2):
        np.testing.assert_array_equal(found.values[row], np.float32([regional(row)[name] for name in MEASURES]))
    assert np.isnan(found.values[2]).all()
    qc = json.loads(data._lines[0]["qc"])
    assert (qc["descriptor_values"], qc["descriptor_basis"]) == (204, "freesurfer")
    assert verify(built, deep=True) == []


def test_a_dataset_without_descriptors_has_no_array_and_its_cases_the_digests_of_before(built, sources, tmp_path):
    url = str(tmp_path / "s.zarr")
    ingest(url, [*scans_of(sources, "c", seed=2), *scans_of(sources, "a")], spec=SPEC)
    data = open_store(url).dataset("toy")
    assert data.descriptors is None
    assert layout_of(url, "toy") is None
    assert not Path(url, "toy", "descriptors").exists()
    digest = {data.case_info(row).case: data.case_info(row).digest for row in data.rows}
    with_some = open_store(built).dataset("toy")
    assert with_some.case_info(2).digest == digest["c"]
    assert with_some.case_info(0).digest != digest["a"]
    # Descriptors come later: the case gets a new row, which alone has them.
    ingest(url, scans_of(sources, "a", table()), "later", spec=SPEC)
    data = open_store(url).dataset("toy")
    assert [data.case_info(row).case for row in data.rows] == ["c", "a"]
    assert data.descriptors is not None
    assert np.isnan(data.descriptors.values).all(axis=(1, 2)).tolist() == [True, True, False]


def test_xarray_and_dask_open_them_by_name(built):
    import dask.array
    import xarray

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = xarray.open_zarr(built, group="toy")
    assert opened.descriptors.dims == ("case", "measure", "region")
    one = opened.descriptors.sel(case="b", measure="cortical_thickness_mm", region="rh_insula")
    assert float(one) == np.float32(regional(1)["cortical_thickness_mm"][-1])
    assert opened.descriptors.attrs == {
        "atlas": "desikan_killiany",
        "basis": "freesurfer",
        "units": ["mm", "mm3", "mm2"],
    }
    lazy = dask.array.from_zarr(built, component="toy/descriptors")
    assert lazy[0, 2].compute(scheduler="synchronous").tolist() == regional(0)["surface_area_mm2"]


def test_changed_descriptors_make_a_new_row_and_unchanged_ones_none(sources, url):
    before = store_digest(url)
    ingest(url, three(sources), "again", spec=SPEC)
    assert store_digest(url) == before
    assert open_store(url).dataset("toy").rows == [0, 1, 2]
    ingest(url, [*three(sources)[:2], *scans_of(sources, "b", table(5), 1)], "more", spec=SPEC)
    data = open_store(url).dataset("toy")
    assert data.rows == [0, 2, 3]
    assert data.descriptors is not None
    np.testing.assert_array_equal(data.descriptors.values[3, 0], np.float32(regional(5)["cortical_thickness_mm"]))
    assert verify(url, deep=True) == []


def test_another_atlas_or_basis_is_quarantined_with_what_the_dataset_holds(sources, url):
    scans = [*scans_of(sources, "d", table(3, "destrieux"), 3), *scans_of(sources, "e", table(4, basis="cat12"), 4)]
    ingest(url, [*three(sources), *scans], "more", spec=SPEC)
    lines = {line["case"]: line for line in open_store(url).cases().to_pylist()}
    for name, has in (("d", "destrieux by freesurfer"), ("e", "desikan_killiany by cat12")):
        assert (lines[name]["status"], lines[name]["reason"]) == ("quarantined", "descriptors of another atlas")
        assert lines[name]["detail"] == (
            f"its descriptors are of atlas {has}, dataset toy holds those of desikan_killiany by freesurfer; "
            "ingest it as another dataset"
        )
    assert open_store(url).dataset("toy").rows == [0, 1, 2]
    assert verify(url, deep=True) == []


def test_lost_and_changed_values_are_found_and_made_again(sources, url):
    import zarr

    zarr.open_array(url, path="toy/descriptors", mode="r+")[1, 0, 5] = 2.5
    assert verify(url) == []
    (problem,) = verify(url, deep=True)
    assert problem.startswith("toy/b (row 1): digest of the voxels is")
    storage.delete(storage.join(url, "toy", "descriptors", "c"))
    assert verify(url)[0] == "toy/a (row 0): descriptors: the array holds 0 values, cases.parquet says 204"
    with pytest.raises(
        StoreError, match=r"descriptors of toy in .* hold 0 values in row 0, the table of cases says 204"
    ):
        _ = open_store(url).dataset("toy").descriptors
    repaired(url, three(sources))
    assert verify(url, deep=True) == []


def repaired(url, scans):
    """Preprocess damaged rows again, as the flow does with `repair: true`."""
    from tasks import plan as plans
    from tasks import receipts, shards
    from tasks.preprocess import preprocess_batch

    rows = damaged_rows(url)
    current = plans.plan_rows(plans.cases_from_scans(scans), plans.read_plans(url), SPEC).current
    again = [case for case in current if (case.dataset, case.row) in rows]
    for case in again:
        receipts.delete_receipt(url, case)
    preprocess_batch(url, [case.model_dump(mode="json") for case in again], "repair")
    shards.finalise(url, current, rows)


def test_an_array_that_cannot_be_decoded_is_named(url):
    chunk = next(path for path in Path(url, "toy", "descriptors", "c").rglob("*") if path.is_file())
    chunk.write_bytes(b"\x00" * 40)
    problems = verify(url)
    assert problems[0].startswith("toy: structure: descriptors cannot be read: ")
    assert problems[0].endswith("delete the folder toy/descriptors/c and run preprocess with repair: true")


def test_forget_and_compact_erase_them(sources, url):
    ingest(url, [*scans_of(sources, "b", table(5), 1), *three(sources)[:2]], "more", spec=SPEC)
    compact(url)
    forget(url, "toy", "a")
    data = open_store(url).dataset("toy")
    values = data.descriptors.values
    assert [bool(np.isnan(values[row]).all()) for row in range(4)] == [True, True, True, False]
    assert verify(url, deep=True) == []


def test_they_are_exported_as_a_table(built, tmp_path):
    url = built
    files = export_cases(url, ["toy/b", "toy/c"], tmp_path / "out")
    assert [path.name for path in files] == ["toy_b_gm.nii.gz", "toy_b_descriptors.tsv", "toy_c_gm.nii.gz"]
    lines = files[1].read_text().splitlines()
    assert lines[0].split("\t") == ["region", *MEASURES, "atlas", "basis"]
    assert lines[1].split("\t") == ["lh_bankssts", "2.003", "4001.0", "1501.0", "desikan_killiany", "freesurfer"]
    assert len(lines) == 69
    (only,) = export_cases(url, ["toy/a"], tmp_path / "only", modalities=["descriptors"], native=True)
    assert only.name == "toy_a_descriptors.tsv"
    with pytest.raises(StoreError, match="toy/c has no descriptors; it has: gm"):
        export_cases(url, ["toy/c"], tmp_path / "none", modalities=["descriptors"])


def test_a_native_map_is_the_file_again(built, sources, tmp_path):
    import nibabel as nib

    (path,) = export_cases(built, ["toy/a"], tmp_path / "out", native=True, modalities=["gm"])
    source, found = nib.load(sources / "mwp1a.nii"), nib.load(path)
    np.testing.assert_allclose(found.affine, source.affine)
    np.testing.assert_allclose(found.get_fdata(), source.get_fdata(), atol=1e-3)


def test_compare_names_cases_whose_descriptors_differ(built, sources, tmp_path):
    other = str(tmp_path / "other.zarr")
    ingest(other, scans_of(sources, "b", table(7), 1), spec=SPEC)
    found = compare(built, other, voxels=True)
    assert found.changed == ("toy/b",)
    assert found.voxels["toy/b"].sentence() == "descriptors differ"


@pytest.mark.parametrize(
    ("change", "reason", "text"),
    [
        (lambda raw: b"{", "unreadable", r"a\.json: no file of descriptors"),
        (lambda raw: raw.replace(b"2.0,", b"-2.0,", 1), "descriptor values", "must be a positive number"),
        (lambda raw: raw.replace(b'"desikan_killiany"', b'"aal"'), "unreadable", r"\(atlas: Input should be"),
    ],
)
def test_a_file_that_was_changed_since_is_quarantined(sources, tmp_path, change, reason, text):
    url, scans = str(tmp_path / "s.zarr"), scans_of(sources, "a", table())
    path = tmp_path / "a.json"
    path.write_bytes(change(Path(scans[1].path).read_bytes()))
    scans[1] = scans[1].replace(path=str(path), size_bytes=path.stat().st_size)
    ingest(url, scans, spec=SPEC)
    (line,) = open_store(url).cases().to_pylist()
    assert (line["status"], line["reason"]) == ("quarantined", reason)
    assert re.search(text, line["detail"])


def test_the_digest_does_not_depend_on_the_bits_of_nan():
    values = np.full((3, 68), np.nan, np.float32)
    assert digest_bytes(values, "desikan_killiany", "freesurfer") == b""
    values[0] = 2.5
    other = values.copy()
    other.view(np.uint32)[1:] = 0xFFC00001
    assert np.isnan(other[1:]).all()
    one = digest_bytes(values, "desikan_killiany", "freesurfer")
    assert (
        one
        == digest_bytes(other, "desikan_killiany", "freesurfer")
        != digest_bytes(values, "desikan_killiany", "cat12")
    )


def test_a_staged_copy_is_checked_with_its_descriptors(built, tmp_path):
    store = open_store(built)
    case = next(case for case in select_cases(store.cases()) if case.case == "a")
    mirror = Mirror.of(store, tmp_path, ["toy"])
    mirror.copy_metadata()
    mirror.stage(case)
    assert mirror.is_staged(case)
    copy = open_store(str(mirror.folder)).dataset("toy").descriptors
    assert copy is not None
    np.testing.assert_array_equal(copy.values, store.dataset("toy").descriptors.values)


def test_the_array_grows_with_the_dataset(sources, url):
    ingest(url, [*three(sources), *scans_of(sources, "d", seed=4)], "more", spec=SPEC)
    found = open_store(url).dataset("toy").descriptors
    assert found is not None
    assert found.values.shape == (4, 3, len(ATLASES["desikan_killiany"]))
