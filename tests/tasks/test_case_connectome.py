"""Cases with an image, a connectome, or both, from files to a store that is whole; bad ones are quarantined."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import xarray
import yaml
from connectome_files import (
    AFFINE,
    NAMES,
    bold_of,
    confounds_bytes,
    confounds_of,
    correlation_of,
    fisher,
    own_spec,
    pcp_text,
    planted,
    store_spec,
    write_atlas,
    write_bold,
)
from nifti_files import blob, planned, scan_of, write_nifti
from store_builds import ingest

from infra import storage
from models.connectomes import ConnectomeSpec
from models.records import BOLD, CONFOUNDS, DESCRIPTORS, LABEL, SERIES, Reason, Scan
from models.spec import SPECS, PreprocessSpec
from models.store import open_store, store_digest
from models.store_connectomes import FRAMES
from tasks import receipts
from tasks.affines import BadScanError
from tasks.atlas_table import atlas_block
from tasks.connectome import make_connectome
from tasks.duplicates import passed_over
from tasks.plan import cases_from_scans, projected_bytes
from tasks.prepare import prepare_case
from tasks.roi_series import parse_series
from tasks.verify import verify

TRUTH = correlation_of(1)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> PreprocessSpec:
    atlas = write_atlas(tmp_path_factory.mktemp("atlas") / "six.nii.gz")
    return store_spec(own_spec(**atlas, confounds=["motion"], missing_regions=1))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A T1, series, a BOLD image and its confounds of one subject."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "rois.1D").write_bytes(pcp_text(planted(TRUTH)))
    (folder / "confounds.tsv").write_bytes(confounds_bytes(confounds_of()))
    return {
        "t1": write_nifti(folder / "t1.nii.gz", blob((16, 16, 16)), AFFINE),
        SERIES: folder / "rois.1D",
        BOLD: write_bold(folder / "bold.nii.gz", bold_of(planted(TRUTH) * 10)),
        CONFOUNDS: folder / "confounds.tsv",
    }


def some(files: Mapping[str, Path], *modalities: str) -> dict[str, Path]:
    return {modality: files[modality] for modality in modalities}


def all_kinds(files: Mapping[str, Path], folder: Path) -> list[Scan]:
    """Return scans of a case of each kind: image, series, BOLD, image and series, image and unusable series."""
    bad = folder / "bad.1D"
    bad.write_bytes(pcp_text(planted(TRUTH)[:20]))
    kinds = {
        "image": some(files, "t1"),
        "series": some(files, SERIES),
        "bold": some(files, BOLD, CONFOUNDS),
        "both": some(files, "t1", SERIES),
        "short": {"t1": files["t1"], SERIES: bad},
    }
    return [scan_of(path, modality, case) for case, group in kinds.items() for modality, path in group.items()]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, files: dict[str, Path], spec: PreprocessSpec) -> str:
    folder = tmp_path_factory.mktemp("store")
    url = str(folder / "s.zarr")
    ingest(url, all_kinds(files, folder), spec=spec)
    return url


def test_a_case_without_images_has_no_voxel(files: dict[str, Path], spec: PreprocessSpec) -> None:
    found = prepare_case(planned(some(files, SERIES)), spec)
    np.testing.assert_allclose(found.connectome, fisher(TRUTH), atol=1e-6)
    assert (found.image.shape, found.label, found.present, found.extent) == ((1, 0, 0, 0), None, (False,), (0, 0, 0))
    assert (found.geometry.origin, found.fingerprint) == ((0, 0, 0), ())
    np.testing.assert_array_equal(found.geometry.affine, np.eye(4))
    assert found.qc[FRAMES] == 100
    json.dumps(found.qc, allow_nan=False)


def test_an_image_is_stored_the_same_beside_a_connectome(files: dict[str, Path], spec: PreprocessSpec) -> None:
    alone = prepare_case(planned(some(files, "t1")), spec)
    both = prepare_case(planned(some(files, "t1", SERIES)), spec)
    np.testing.assert_array_equal(both.image, alone.image)
    assert alone.connectome is None
    assert FRAMES not in alone.qc
    assert {name: both.qc[name] for name in alone.qc} == alone.qc
    np.testing.assert_allclose(both.connectome, fisher(TRUTH), atol=1e-6)


def test_functional_files_are_left_aside_without_a_connectome_in_the_spec(
    files: dict[str, Path], spec: PreprocessSpec
) -> None:
    plain = spec.replace(connectome=None)
    found = prepare_case(planned(files), plain)
    assert found.connectome is None
    assert found.qc["ignored_modalities"] == [BOLD, CONFOUNDS, SERIES]
    assert not any(plain.reads(modality) for modality in (BOLD, CONFOUNDS, SERIES))
    with pytest.raises(BadScanError, match=r"files of \['roi_series'\]; the spec knows \['t1'\]$") as error:
        prepare_case(planned(some(files, SERIES)), plain)
    assert error.value.reason == Reason.NO_SCAN


def refused(files: Mapping[str, Path], spec: PreprocessSpec, reason: Reason, text: str) -> None:
    with pytest.raises(BadScanError, match=text) as error:
        prepare_case(planned(files), spec)
    assert error.value.reason == reason


def test_what_cannot_be_made_is_never_left_out_in_silence(
    tmp_path: Path, files: dict[str, Path], spec: PreprocessSpec
) -> None:
    text = "a case has one connectome, this one has rois.1D and bold.nii.gz; leave one of them out of the catalog"
    refused(files, spec, Reason.DUPLICATE_SCAN, text)
    refused(some(files, "t1", BOLD), spec, Reason.CONFOUNDS, "bold.nii.gz: the case has no confounds file, and the")
    text = r"files of \['bold_confounds'\]; the spec knows \['t1'\] and reads connectomes from bold or roi_series"
    refused(some(files, CONFOUNDS), spec, Reason.NO_SCAN, text)
    assert spec.connectome is not None
    filtered = spec.replace(
        connectome=ConnectomeSpec.model_validate({**spec.connectome.model_dump(), "low_pass_hz": 0.1})
    )
    text = "rois.1D: time series of regions do not say their repetition time, and the spec filters; set low_pass_hz"
    refused(some(files, "t1", SERIES), filtered, Reason.NO_TR, text)
    whole = prepare_case(planned(some(files, "t1", CONFOUNDS)), spec)
    assert whole.qc["ignored_modalities"] == [CONFOUNDS]
    labelled = {SERIES: files[SERIES], LABEL: write_nifti(tmp_path / "seg.nii.gz", np.ones((16, 16, 16), np.uint8))}
    bare = prepare_case(planned(labelled), spec)
    assert (bare.label, bare.qc["ignored_modalities"]) == (None, [LABEL])


def test_bold_is_no_channel_of_a_spec_with_connectomes(spec: PreprocessSpec) -> None:
    with pytest.raises(ValueError, match="bold becomes a connectome in this spec and is no channel"):
        spec.replace(modalities=("t1", "bold"))


def test_compcor_reads_what_fmriprep_wrote_beside(tmp_path: Path, files: dict[str, Path], spec: PreprocessSpec) -> None:
    assert spec.connectome is not None
    wanted = {**spec.connectome.model_dump(), "confounds": ("high_pass", "compcor")}
    compcor = spec.replace(connectome=ConnectomeSpec.model_validate(wanted))
    table = confounds_of()
    table["a_comp_cor_00"] = np.random.default_rng(0).standard_normal(len(table))
    path = tmp_path / "sub-1_desc-confounds_timeseries.tsv"
    path.write_bytes(confounds_bytes(table))
    case = {BOLD: files[BOLD], CONFOUNDS: path}
    refused(case, compcor, Reason.CONFOUNDS, f"{path.name}: ")
    meta = {"a_comp_cor_00": {"Method": "aCompCor", "Retained": True, "Mask": "combined"}}
    path.with_suffix(".json").write_text(json.dumps(meta))
    assert prepare_case(planned(case), compcor).connectome is not None


def test_a_store_of_all_kinds_is_whole(store: str) -> None:
    assert verify(store, deep=True) == []
    opened = open_store(store)
    lines = {line["case"]: line for line in opened.cases().to_pylist()}
    assert {case: line["status"] for case, line in lines.items()} == {
        "image": "stored", "series": "stored", "bold": "stored", "both": "stored", "short": "quarantined",
    }  # fmt: skip
    assert lines["short"]["reason"] == "too few frames"
    data = opened.dataset("toy")
    for case, line in lines.items():
        if case in {"series", "bold", "both"}:
            assert data.has_connectome(line["row"])
            atol = 1e-6 if case != "bold" else 0.35  # motion regressors take a part
            np.testing.assert_allclose(data.read_connectome(line["row"]), fisher(TRUTH), atol=atol)
    assert not data.has_connectome(lines["image"]["row"])
    assert lines["series"]["modalities"] == []
    assert passed_over(opened.cases(), opened.spec.reference_order) == {"t1": 2}


def test_xarray_opens_it(store: str) -> None:
    lines = {line["case"]: line["row"] for line in open_store(store).cases().to_pylist()}
    with xarray.open_zarr(store, group="toy") as found:
        assert found["connectome"].dims == ("case", "roi_from", "roi_to")
        assert found["roi_from"].values.tolist() == list(NAMES)
        one = found["connectome"].isel(case=lines["series"]).sel(roi_from=NAMES[0], roi_to=NAMES[2])
        assert float(one) == pytest.approx(fisher(TRUTH)[0, 2], abs=1e-6)
        assert np.isnan(found["connectome"].isel(case=lines["image"])).all()


def test_resume_changes_nothing_and_a_changed_series_gets_a_row(
    tmp_path: Path, files: dict[str, Path], spec: PreprocessSpec
) -> None:
    url, own = str(tmp_path / "s.zarr"), tmp_path / "own.1D"
    own.write_bytes(pcp_text(planted(TRUTH)))
    case = {"t1": files["t1"], SERIES: own}
    scans = [scan_of(path, modality) for modality, path in case.items()]
    (first,) = ingest(url, scans, spec=spec)
    digest = store_digest(url)
    assert ingest(url, scans, token="u", spec=spec) == (first,)
    assert store_digest(url) == digest
    own.write_bytes(pcp_text(planted(correlation_of(2))))
    (second,) = ingest(url, [scan_of(path, modality) for modality, path in case.items()], token="v", spec=spec)
    assert (first.row, second.row) == (0, 1)
    np.testing.assert_allclose(open_store(url).dataset("toy").read_connectome(1), fisher(correlation_of(2)), atol=1e-6)
    assert verify(url, deep=True) == []


def test_without_images_there_is_no_projection_but_that_of_the_connectome(
    files: dict[str, Path], spec: PreprocessSpec
) -> None:
    series, bold = (projected_bytes([scan_of(files[m], m)], spec) for m in (SERIES, BOLD))
    assert 0 < series < bold < (1 << 30)
    assert projected_bytes([scan_of(files[BOLD], BOLD)], spec.replace(connectome=None)) == 0


def test_descriptors_stay_without_an_image(tmp_path: Path, files: dict[str, Path], spec: PreprocessSpec) -> None:
    from anatomy_files import regional

    from models.records import DescriptorTable
    from tasks.descriptors import file_bytes

    values = {measure: tuple(numbers) for measure, numbers in regional().items()}
    table = DescriptorTable(atlas="desikan_killiany", basis="freesurfer", values=values)
    (tmp_path / "d.json").write_bytes(file_bytes(table))
    found = prepare_case(planned({SERIES: files[SERIES], DESCRIPTORS: tmp_path / "d.json"}), spec)
    assert found.descriptors == table


@pytest.mark.full
def test_bold_phantoms_give_the_connectome_of_their_clean_series(tmp_path: Path) -> None:
    from tasks.catalog import build_catalog
    from tasks.phantom.connectivity import ConnectivityConfig, write_connectivity_cohort
    from tasks.sources import FmriprepSource

    paths = write_connectivity_cohort(ConnectivityConfig(subjects=2, bold_subjects=2), tmp_path, processes=1)
    block = yaml.safe_load(atlas_block(str(paths.atlas), name="desikan_killiany"))["connectome"]
    spec = SPECS["cinp_tiny"].replace(connectome=block)
    assert spec.connectome is not None
    scans = build_catalog([FmriprepSource(dataset="fm", root=str(paths.fmriprep))]).scans
    for case in cases_from_scans(scans):
        found = prepare_case(case, spec)
        (text,) = Path(paths.series).glob(f"{case.case}_*.1D")
        clean, _ = make_connectome(parse_series(text.read_bytes(), text.name, spec.connectome), spec.connectome)
        assert found.connectome is not None
        pairs = np.triu_indices(len(clean), 1)
        assert np.corrcoef(found.connectome[pairs], clean[pairs])[0, 1] > 0.9
        assert found.qc[FRAMES] < found.qc[f"{FRAMES}_all"] == 200


KILL = """
import json, os, sys
from models.spec import PreprocessSpec
from tasks import receipts
sys.path[:0] = sys.argv[3:]
from nifti_files import *
from store_builds import ingest
from models.records import Scan

def die(url, receipt):
    os._exit(9)

receipts.write_receipt = die
scans = [Scan.model_validate(line) for line in json.loads(sys.argv[2])["scans"]]
ingest(sys.argv[1], scans, spec=PreprocessSpec.model_validate(json.loads(sys.argv[2])["spec"]))
"""


@pytest.mark.full
def test_killed_between_matrix_and_receipt_it_ends_the_same(
    tmp_path: Path, files: dict[str, Path], spec: PreprocessSpec
) -> None:
    scans = [scan_of(path, modality) for modality, path in some(files, "t1", BOLD, CONFOUNDS).items()]
    undisturbed, url = str(tmp_path / "u.zarr"), str(tmp_path / "s.zarr")
    ingest(undisturbed, scans, spec=spec)
    given = json.dumps(
        {"scans": [scan.model_dump(mode="json") for scan in scans], "spec": spec.model_dump(mode="json")}
    )
    done = subprocess.run([sys.executable, "-c", KILL, url, given, str(Path(__file__).parents[1])], check=False)
    assert done.returncode == 9
    (case,) = cases_from_scans(scans)
    assert storage.find(storage.join(url, "toy", "connectome", "c"))  # the matrix was there before the receipt
    assert receipts.read_receipt(url, case.replace(row=0), spec.content_digest()) is None
    ingest(url, scans, token="again", spec=spec)
    assert store_digest(url) == store_digest(undisturbed)
    assert verify(url, deep=True) == []
