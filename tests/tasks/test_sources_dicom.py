from __future__ import annotations

import importlib
import logging
import shutil
import stat
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from layouts import write_series
from pydantic import ValidationError

from models.records import Reason, Scan
from tasks import dicom_convert, dicom_series
from tasks.catalog import build_catalog, write_catalog
from tasks.catalog_report import catalog_report
from tasks.dicom_series import DicomError, MissingExtraError, mask_names, name_words, parse_dicom_header
from tasks.sources import DicomSource, find_scans
from tasks.sources.dicom import survey

VOLUME = np.random.default_rng(0).integers(0, 500, (8, 7, 5)).astype(np.int16)


def source(root: Path, **fields: object) -> DicomSource:
    return DicomSource.model_validate(
        {"dataset": "demo", "root": str(root), "series": {"*T1*": "t1", "*FLAIR*": "flair", "scout": "ignore"}} | fields
    )


def rows(root: Path, ws: Path, **fields: object) -> list[Scan]:
    return find_scans(source(root, **fields), str(ws)).scans


def refused(root: Path, ws: Path, **fields: object) -> tuple[str, str]:
    (scan,) = rows(root, ws, **fields)
    assert scan.status == "left out"
    return scan.reason, scan.detail


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "dicom", tmp_path / "ws"


def test_series_become_scans_by_their_descriptions(places: tuple[Path, Path]) -> None:
    root, ws = places
    for number, description in enumerate(("sag t1 mpr", "T2 Flair", "scout", "ep2d_diff", "")):
        write_series(root / f"s{number}", VOLUME, description=description)
    (root / "readme.txt").write_text("no scan")
    (root / "DICOMDIR").write_bytes(bytes(200))
    (root / "s0/broken.dcm").write_bytes(b"x" * 300)
    found = rows(root, ws)
    assert sorted((scan.modality, scan.reason) for scan in found) == [
        ("", Reason.UNKNOWN_MODALITY),
        ("", Reason.UNKNOWN_MODALITY),
        ("", Reason.UNREADABLE),
        ("flair", ""),
        ("t1", ""),
    ]
    (unknown,) = (scan.detail for scan in found if "ep2d" in scan.detail)
    assert "'ep2d_diff' (5 files): no pattern of `series` matches its description" in unknown
    assert "a file of 300 bytes is called DICOM and cannot be read as such" in {scan.detail for scan in found}
    assert {scan.subject for scan in found if scan.status == "ok"} == {"P1"}


def test_files_of_one_series_may_lie_anywhere(places: tuple[Path, Path]) -> None:
    root, ws = places
    for number, path in enumerate(write_series(root / "all", VOLUME, description="T1")):
        path.rename(root / f"{number}.ima") if number % 2 else shutil.move(path, root / "all" / f"{number}")
    (scan,) = build_catalog([source(root)], workspace=str(ws)).scans
    assert scan.shape == VOLUME.shape


def test_nothing_is_converted_or_read_twice(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root, ws = places
    for name in ("a", "b"):
        write_series(root / name, VOLUME, description="T1", patient_id=name)
    first = rows(root, ws)
    read: list[str] = []
    original = dicom_series.read_dicom_header
    monkeypatch.setattr(dicom_series, "read_dicom_header", lambda url: read.append(url) or original(url))
    monkeypatch.setattr(dicom_convert, "_run", None)
    assert rows(root, ws) == first
    assert len(read) == 2
    (root / "a/IM0000").touch()
    assert [scan.subject for scan in _with_converter(monkeypatch, root, ws) if scan not in first] == ["a"]


def _with_converter(monkeypatch: pytest.MonkeyPatch, root: Path, ws: Path) -> list[Scan]:
    monkeypatch.undo()
    return rows(root, ws)


def test_a_killed_conversion_is_done_again(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root, ws = places
    write_series(root / "a", VOLUME, description="T1")

    def killed(url: str, value: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dicom_convert.storage, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        rows(root, ws)
    monkeypatch.undo()
    assert [path.name for path in ws.rglob("*.gz")] == ["image.nii.gz"]
    assert len(survey(source(root), str(ws)).pending) == 1
    (scan,) = build_catalog([source(root)], workspace=str(ws)).scans
    assert scan.status == "ok"
    assert survey(source(root), str(ws)).pending == ()


def test_a_damaged_index_is_made_again(places: tuple[Path, Path]) -> None:
    root, ws = places
    write_series(root / "a", VOLUME, description="T1")
    first = rows(root, ws)
    (ws / "converted/demo/index.parquet").write_bytes(b"oops")
    assert rows(root, ws) == first


NAME = "Doe^Jane Ann"


def test_no_patient_name_reaches_log_catalog_or_report(
    places: tuple[Path, Path], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    root, ws = places
    caplog.set_level(logging.DEBUG)
    write_series(root / "Doe_Jane/good", VOLUME, description="T1 DOE", patient_id="X1", name=NAME)
    write_series(root / "Doe_Jane/unknown", VOLUME, description="spine of Jane Doe", patient_id="X1", name=NAME)
    write_series(root / "Doe_Jane/cut", VOLUME, description="FLAIR", patient_id="X2", name=NAME)
    write_series(root / "Doe_Jane/named", VOLUME, description="FLAIR", patient_id="DOE-JANE", name=NAME)
    for path in (root / "Doe_Jane/cut").iterdir():
        path.write_bytes(path.read_bytes()[:-60])
    (root / "Doe_Jane/Doe.dcm").write_bytes(b"Doe" * 90)
    result = build_catalog([source(root)], workspace=str(ws))
    write_catalog(result, str(ws))
    reasons = sorted((scan.reason, scan.subject) for scan in result.scans)
    assert reasons[0] == ("", "X1")
    assert {reason for reason, _ in reasons[1:]} == {Reason.UNREADABLE, Reason.UNKNOWN_MODALITY, Reason.BAD_ID}
    assert any("repeats the patient's name; give a `crosswalk`" in scan.detail for scan in result.scans)
    assert any("'spine of *** ***' (5 files)" in scan.detail for scan in result.scans)
    out = capfd.readouterr()
    texts = [catalog_report(result), caplog.text, out.out, out.err, *(str(path) for path in ws.rglob("*"))]
    texts += [path.read_bytes().decode("latin-1") for path in ws.rglob("*") if path.is_file()]
    for scan in result.scans:
        if scan.status == "ok":
            import gzip

            texts.append(gzip.decompress(Path(scan.path).read_bytes()).decode("latin-1"))
    texts.append("\n".join(scan.model_dump_json() for scan in result.scans))
    assert not [text for text in texts if "doe" in text.lower() or "jane" in text.lower()]


def test_words_of_names() -> None:
    assert name_words("van der Berg^Jo Ann^^Dr.") == {"van", "der", "berg", "ann"}
    assert name_words("TCGA-02-0003") == name_words("sub01") == name_words("") == frozenset()
    assert mask_names("MPRAGE Berg, vanilla", name_words("van^Berg")) == "MPRAGE ***, ***illa"


def test_subject_and_session_from_paths_and_crosswalks(places: tuple[Path, Path]) -> None:
    root, ws = places
    write_series(root / "S01/v1/t1", VOLUME, description="T1", patient_id="hospital-q", study_uid="1.2.1")
    write_series(root / "S01/v2/t1", VOLUME, description="T1", patient_id="hospital-q", study_uid="1.2.2")
    write_series(root / "loose", VOLUME, description="T1", patient_id="99", study_uid="1.2.3")
    found = rows(root, ws, pattern="{subject}/{session}/**")
    assert sorted((scan.case, scan.reason) for scan in found) == [
        ("", Reason.UNMATCHED),
        ("S01_v1", ""),
        ("S01_v2", ""),
    ]
    table = root / "cross.csv"
    table.write_text("id,study,who,when\nhospital-q,1.2.1,A,first\nhospital-q,1.2.2,A,second\n")
    cross = {"path": "cross.csv", "patient_id": "id", "study_uid": "study", "subject": "who", "session": "when"}
    found = rows(root, ws, crosswalk=cross)
    assert sorted((scan.case, scan.reason) for scan in found) == [
        ("", "unusable id"),
        ("A_first", ""),
        ("A_second", ""),
    ]
    assert {scan.detail for scan in found if scan.reason == Reason.BAD_ID}.pop().endswith(
        "are not in the crosswalk table"
    )
    table.write_text("id,study,who,when\nhospital-q,,A,first\nhospital-q,,B,first\n")
    with pytest.raises(ValueError, match=r"cross\.csv, row 3: this patient and study have another subject"):
        rows(root, ws, crosswalk=cross)
    assert "hospital-q" not in "".join(scan.detail for scan in found)


def test_phases_and_echoes_are_not_chosen_between(places: tuple[Path, Path]) -> None:
    root, ws = places
    uid = pydicom.uid.generate_uid()
    for echo in (1, 2):
        for path in write_series(root / f"e{echo}", VOLUME, description="T1", series_uid=uid, study_uid="1.2.3"):
            data = pydicom.dcmread(path)
            data.EchoTime, data.EchoNumbers = 3.0 * echo, echo
            data.save_as(path)
    reason, detail = refused(root, ws)
    assert reason == Reason.UNREADABLE
    assert "dcm2niix made 2 images of it (" in detail
    assert "one is expected; split the series" in detail


def _bomb(tag: str, value: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = pydicom.dcmread(path)
        setattr(data, tag, value)
        data.save_as(path)

    return change


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def _deflated(path: Path) -> None:
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    data.ImageComments = "0" * 8000
    data.add_new(0x00091001, "UN", bytes(10_000_000))
    data.save_as(path)


def _no_uid(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"\x20\x00\x0e\x00UI", b"\x20\x00\x0e\x01UI"))


def _nested(path: Path) -> None:
    raw = path.read_bytes()
    head = raw[: raw.index(b"\x08\x00\x08\x00CS")]
    path.write_bytes(head + b"\x08\x00\x15\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 20_000)


@pytest.mark.parametrize(
    "damage",
    [
        _bomb("Rows", 65535),
        _bomb("NumberOfFrames", 2**31 - 1),
        _bomb("BitsAllocated", 64),
        _cut,
        _deflated,
        _no_uid,
        _nested,
        lambda path: path.write_bytes(path.read_bytes()[:140]),
        lambda path: path.write_bytes(bytes(128) + b"DICM" + b"\xff" * 4000),
        lambda path: path.write_bytes(b""),
    ],
    ids=["rows", "frames", "bits", "cut", "deflated", "no UID", "nested", "no header", "garbage", "empty"],
)
def test_damaged_series_are_left_out(places: tuple[Path, Path], damage: Callable[[Path], None]) -> None:
    root, ws = places
    for path in write_series(root / "bad", VOLUME, description="T1"):
        damage(path)
        path.rename(path.with_suffix(".dcm"))
    write_series(root / "good", VOLUME, description="T1", patient_id="P2")
    scans = build_catalog([source(root)], workspace=str(ws)).scans
    assert [scan.subject for scan in scans if scan.status == "ok"] == ["P2"]
    assert {scan.reason for scan in scans if scan.status != "ok"} <= {Reason.UNREADABLE, Reason.NOT_3D}
    assert len(scans) > 1


def test_a_converter_that_hangs_is_stopped(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root, ws = places
    write_series(root / "a", VOLUME, description="T1")
    slow = root.parent / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(slow.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(dicom_convert, "find_converter", lambda: (str(slow), "0"))
    monkeypatch.setattr(dicom_convert, "TIMEOUT_S", 0.05)
    monkeypatch.setattr(dicom_convert.convert, "__defaults__", (0.05,))
    assert refused(root, ws)[1].endswith("dcm2niix took more than 0.05 s and was stopped")


def test_links_out_of_the_root_are_not_followed(places: tuple[Path, Path]) -> None:
    root, ws = places
    write_series(root.parent / "elsewhere", VOLUME, description="T1")
    root.mkdir()
    (root / "link").symlink_to(root.parent / "elsewhere/IM0000")
    assert refused(root, ws) == (Reason.OUTSIDE_ROOT, "a link among the DICOM files leads out of the root")


def test_the_extra_is_named_when_it_is_missing(places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root, ws = places
    write_series(root / "a", VOLUME, description="T1")
    monkeypatch.setitem(sys.modules, "dcm2niix", None)
    with pytest.raises(
        MissingExtraError, match=r"kind 'dicom' need dcm2niix; .* extra: pip install 'brainloom\[dicom\]'"
    ):
        rows(root, ws)
    monkeypatch.setitem(sys.modules, "dcm2niix", types.SimpleNamespace(bin="/nowhere/dcm2niix"))
    with pytest.raises(
        MissingExtraError,
        match=r"need the binary /nowhere/dcm2niix of the package dcm2niix, which is not there",
    ):
        rows(root, ws)
    monkeypatch.undo()
    dicom_series._parser.cache_clear()
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(MissingExtraError, match=r"need pydicom; .* its extra: pip install 'brainloom\[dicom\]'"):
        rows(root, ws)
    monkeypatch.undo()
    assert importlib.import_module("pydicom") is pydicom


def test_a_workspace_and_good_patterns_are_asked_for(places: tuple[Path, Path]) -> None:
    root, _ = places
    with pytest.raises(ValueError, match="dataset demo: DICOM series need a workspace to be converted into"):
        find_scans(source(root))
    with pytest.raises(ValidationError, match=r"series pattern 'x' means 'T1'; use one of flair, t1"):
        source(root, series={"x": "T1"})
    with pytest.raises(ValidationError, match=r"has no field \{subject\}"):
        source(root, pattern="{session}/**")
    with pytest.raises(ValidationError, match="at least 1 item"):
        source(root, series={})


@pytest.mark.parametrize("raw", [b"", bytes(128), bytes(128) + b"DICM", bytes(132)])
def test_bytes_that_are_no_header(raw: bytes) -> None:
    with pytest.raises(DicomError):
        parse_dicom_header(raw)
