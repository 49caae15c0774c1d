"""Patient fields of NIfTI and DICOM headers reach nothing that is made: no store, table, picture, export or log."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from layouts import write_series
from nibabel.nifti1 import Nifti1Extension
from nifti_files import write_case
from secret_hunt import files_below, places_of
from store_builds import ingest, scans_of

from models.store import open_store
from tasks.catalog import build_catalog, write_catalog
from tasks.export_nifti import export_cases
from tasks.qc import mosaic_of, quarantine_table
from tasks.qc_content import gather
from tasks.qc_report import write_qc
from tasks.sources import DicomSource

NIFTI = {
    "descrip": "Zbigniewski^Anna 19610203",
    "aux_file": "mrn-77120345.txt",
    "db_name": "clinic-4711",
    "intent_name": "dr-Quackmann",
    "extension": "seen by Dr Quackmann at St Elsewhere",
}
DICOM = {
    "PatientName": "Zbigniewski^Anna",
    "PatientID": "mrn-77120345",
    "PatientBirthDate": "19610203",
    "PatientAddress": "Elm Street 13",
    "PatientComments": "afraid of magnets",
    "OtherPatientIDs": "ins-990017",
    "AccessionNumber": "acc-5550123",
    "InstitutionName": "St Elsewhere",
    "ReferringPhysicianName": "Quackmann",
    "StudyDescription": "second opinion for Zbigniewski",
    "ImageComments": "Anna moved",
    "ProtocolName": "Zbigniewski protocol",
    "StudyTime": "041137",
    "AcquisitionTime": "041137",
}


def plant(path: Path) -> None:
    """Write an image again with planted texts in its header and in an extension."""
    image = nib.load(path)
    for name in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[name] = NIFTI[name].encode()
    image.header.extensions.append(Nifti1Extension("comment", NIFTI["extension"].encode()))
    nib.save(image, path)
    kept = nib.load(path)
    assert bytes(kept.header["descrip"]).decode().startswith("Zbigniewski")
    assert len(kept.header.extensions) == 1


def evidence(*folders: Path, log: str) -> Mapping[str, bytes]:
    """Return every file below some folders, gzipped ones unpacked, and a log."""
    found = {"log": log.encode()}
    for folder in folders:
        for name, data in files_below(folder):
            found[name] = gzip.decompress(data) if name.endswith(".gz") else data
    assert len(found) > 10
    return found


def test_texts_of_nifti_headers_go_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    url = str(tmp_path / "made" / "s.zarr")
    files = {name: write_case(tmp_path / "raw", name, n, label=True) for n, name in enumerate("ab")}
    for path in (path for case in files.values() for path in case.values()):
        plant(path)
    broken = files["b"]["t2"]
    broken.write_bytes(broken.read_bytes()[:-40])
    ingest(url, [scan for name, case in files.items() for scan in scans_of(case, name)])
    assert [line["status"] for line in open_store(url).cases().to_pylist()] == ["stored", "quarantined"]
    write_qc(url, gather(url, quarantine_table(url)))
    (tmp_path / "made/mosaic.png").write_bytes(mosaic_of(open_store(url), "toy", 0))
    for native in (False, True):
        export_cases(url, ["toy/a"], tmp_path / f"made/export-{native}", native=native)
    assert places_of(NIFTI, evidence(tmp_path / "made", log=caplog.text)) == []


def test_tags_of_dicom_go_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    volume = np.random.default_rng(0).integers(0, 500, (8, 7, 5)).astype(np.int16)
    for path in write_series(tmp_path / "raw/one", volume, description="T1 of Anna", patient_id=DICOM["PatientID"]):
        data = pydicom.dcmread(path)
        for tag, value in DICOM.items():
            setattr(data, tag, value)
        data.add_new((0x0009, 0x0010), "LO", "private of Zbigniewski")
        data.save_as(path, enforce_file_format=True)
    (tmp_path / "raw/broken.dcm").write_bytes(path.read_bytes()[:400])
    (tmp_path / "raw/ids.csv").write_text(f"patient_id,subject\n{DICOM['PatientID']},s-01\n")
    fields = {"dataset": "demo", "root": str(tmp_path / "raw"), "series": {"*T1*": "t1"}}
    source = DicomSource.model_validate({**fields, "crosswalk": {"path": "ids.csv"}})
    ws = tmp_path / "made"
    found = build_catalog([source], workspace=str(ws))
    write_catalog(found, str(ws))
    (scan,) = [scan for scan in found.scans if scan.status == "ok"]
    assert scan.subject == "s-01"
    header = nib.load(scan.path).header
    assert not any(bytes(header[name]).strip(b"\0") for name in ("descrip", "aux_file", "db_name", "intent_name"))
    np.testing.assert_array_equal(
        np.sort(np.asarray(nib.load(scan.path).dataobj), axis=None), np.sort(volume, axis=None)
    )
    url = str(ws / "s.zarr")
    ingest(url, [scan.replace(dataset="toy")])
    words = {**DICOM, "PatientName": "zbigniewski", "family": "Zbigniewski", "given": "Anna"}
    assert places_of(words, evidence(ws, log=caplog.text)) == []
