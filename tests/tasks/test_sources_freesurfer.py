"""FreeSurfer folders, CAT12 folders, and both as one case."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anatomy_files import regional, stats_text, write_freesurfer, write_map
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from infra import storage
from models.anatomy import MEASURES, Atlas, DescriptorError
from models.records import Reason, Scan
from tasks.affines import BadScanError
from tasks.arrays import parse_image
from tasks.catalog import build_catalog, cases_left_out
from tasks.catalog_estimate import estimate_catalog
from tasks.descriptors import parse_table
from tasks.sources import Cat12Source, DescriptorTableSource, FreeSurferSource, find_scans
from tasks.sources.freesurfer import parse_stats

CT, GMV, SA = MEASURES


def catalog(folder: Path, **fields: object) -> list[Scan]:
    """Return the descriptors that a FreeSurfer folder alone gives."""
    source = FreeSurferSource.model_validate({"dataset": "d", "root": str(folder / "fs")} | fields)
    return find_scans(source, str(folder / "ws")).scans


def table_at(scan: Scan) -> np.ndarray:
    return parse_table(Path(scan.path).read_bytes(), "a").array()


@pytest.mark.parametrize("atlas", ["desikan_killiany", "destrieux"])
def test_measures_are_found_by_name(tmp_path: Path, atlas: Atlas) -> None:
    values = regional(1, atlas)
    write_freesurfer(tmp_path / "fs", "sub-01_ses-2", values, atlas)
    write_freesurfer(tmp_path / "fs", "fsaverage", values, atlas)
    (scan,) = catalog(tmp_path, atlas=atlas)
    assert (scan.subject, scan.session, scan.modality, scan.status) == ("sub-01", "ses-2", "descriptors", "ok")
    np.testing.assert_array_equal(table_at(scan), np.float32([values[name] for name in MEASURES]))
    again = catalog(tmp_path, atlas=atlas)
    assert again == [scan]


def test_names_of_folders_say_whose_they_are(tmp_path: Path) -> None:
    for folder in ("sub-01", "site/sub-02_ses-1", "IXI002-Guys"):
        write_freesurfer(tmp_path / "fs", folder, regional())
    assert [(s.subject, s.session) for s in catalog(tmp_path)] == [
        ("IXI002-Guys", ""),
        ("sub-02", "ses-1"),
        ("sub-01", ""),
    ]
    owner = r"(?P<subject>IXI\d+)-.*"
    found = {scan.subject: scan for scan in catalog(tmp_path, owner=owner)}
    assert found["IXI002"].status == "ok"
    assert found[""].reason == Reason.UNMATCHED
    assert (
        found[""].detail == rf"folder 'sub-02_ses-1' does not match `owner` {owner!r}" or "sub-01" in found[""].detail
    )


def test_an_owner_whose_group_stays_empty_matches_nothing() -> None:
    source = FreeSurferSource(dataset="d", root="x", owner=r"(?:(?P<subject>sub-\d+)|pilot).*")
    assert (source.owner_of("sub-1_b"), source.owner_of("pilot_b")) == (("sub-1", ""), None)


@pytest.mark.parametrize("owner", [r"(?P<who>.*)", r".*", r"(?P<subject>a)(?P<run>b)"])
def test_owners_need_a_group_for_the_subject(owner: str) -> None:
    with pytest.raises(ValidationError, match=r"has the groups .*; use subject and session"):
        FreeSurferSource(dataset="d", root="x", owner=owner)


def broken(tmp_path: Path, change: object, side: str = "rh") -> Scan:
    """Return the row of a subject whose file of one hemisphere was changed."""
    stats = write_freesurfer(tmp_path / "fs", "sub-01", regional())
    path = stats / f"{side}.aparc.stats"
    path.write_text(change(path.read_text()))  # type: ignore[operator]
    (scan,) = catalog(tmp_path)
    assert scan.status == "left out"
    return scan


@pytest.mark.parametrize(
    ("old", "new", "reason", "text"),
    [
        ("TableCol  5 Units     mm\n", "TableCol  5 Units     cm\n", Reason.DESCRIPTOR_UNITS,
         "rh.aparc.stats: column ThickAvg is in cm, mm is expected"),
        ("TableCol  3 Units     mm^2\n", "TableCol  3 Units     cm^2\n", Reason.DESCRIPTOR_UNITS,
         "column SurfArea is in cm^2, mm^2 is expected"),
        ("# TableCol  4 Units     mm^3\n", "", Reason.DESCRIPTOR_UNITS, "GrayVol is in no unit, mm^3 is expected"),
        ("GrayVol", "GreyVol", Reason.DESCRIPTOR_MEASURES, "no column GrayVol; its columns: StructName NumVert"),
        ("# hemi rh", "# hemi lh", Reason.ONE_HEMISPHERE, "it says hemi lh, its name says rh"),
        ("insula", "hippocampus", Reason.DESCRIPTOR_REGIONS, "region 'hippocampus' is none of atlas desikan_killiany"),
        ("cuneus ", "lingual", Reason.DESCRIPTOR_REGIONS, "region lingual comes twice"),
        ("2.340 0.5", "nan 0.5", Reason.DESCRIPTOR_VALUES, "cortical_thickness_mm of rh_bankssts is nan"),
        ("2.340 0.5", "-2.34 0.5", Reason.DESCRIPTOR_VALUES, "rh_bankssts is -2.34; it must be a positive number"),
        ("2.340 0.5", "0.234 0.5", Reason.DESCRIPTOR_UNITS, "rh_bankssts is 0.234, plausible are 0.5 to 6; are"),
        ("2.340 0.5", "thick 0.5", Reason.DESCRIPTOR_VALUES, "ThickAvg of bankssts is 'thick', a number is expected"),
        ("2.340 0.5", "", Reason.DESCRIPTOR_VALUES, "the row of bankssts has 4 cells, ColHeaders names 6"),
        (" 100 ", " ", Reason.DESCRIPTOR_VALUES, "the row of bankssts has 5 cells, ColHeaders names 6"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used(tmp_path: Path, old: str, new: str, reason: Reason, text: str) -> None:
    scan = broken(tmp_path, lambda body: body.replace(old, new, 1) if old != "GrayVol" else body.replace(old, new))
    assert (scan.reason, scan.subject) == (reason, "sub-01")
    assert text in scan.detail


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (write_freesurfer(tmp_path / "fs", "sub-01", regional()) / "lh.aparc.stats").open("wb") as file:
        file.truncate(5 << 30)
    read: list[str] = []
    monkeypatch.setattr("tasks.sources.regional.storage.read_bytes", read.append)
    (scan,) = catalog(tmp_path)
    assert (scan.reason, read) == (Reason.UNREADABLE, [])
    assert "has 5,368,709,120 bytes, 4,194,304 are allowed for a table of regions" in scan.detail


def test_centimetres_are_noticed_without_a_header_that_says_so(tmp_path: Path) -> None:
    values = {**regional(), CT: [value / 10 for value in regional()[CT]]}
    write_freesurfer(tmp_path / "fs", "sub-01", values)
    (scan,) = catalog(tmp_path)
    assert scan.reason == Reason.DESCRIPTOR_UNITS
    assert (
        "the median of cortical_thickness_mm is 0.2335, plausible are 1 to 5; it looks like centimetres" in scan.detail
    )


def test_early_freesurfer_called_cubic_millimetres_mm() -> None:
    text = stats_text("lh", regional(), GrayVol="mm")
    assert parse_stats(text.encode(), "desikan_killiany", "lh")[GMV]["lh_bankssts"] == 4000
    with pytest.raises(DescriptorError, match="column SurfArea is in mm, mm\\^2 is expected"):
        parse_stats(stats_text("lh", regional(), SurfArea="mm").encode(), "desikan_killiany", "lh")
    with pytest.raises(DescriptorError, match="it is no text: byte 2 is not UTF-8"):
        parse_stats(b"# \xff", "desikan_killiany", "lh")


@given(st.binary(max_size=200) | st.text("#\n hemilrTbcoUn1m^2 insula", max_size=200).map(str.encode))
def test_any_bytes_are_statistics_or_refused(raw: bytes) -> None:
    with suppress(DescriptorError):
        parse_stats(raw, "desikan_killiany", "lh")
    for text in (raw, b'{"atlas": "destrieux", "basis": "cat12", "values": ' + raw + b"}"):
        with suppress(BadScanError):
            parse_table(text, "a")
    for text in (raw, b"\x93NUMPY\x01\x00" + raw):
        with pytest.raises(BadScanError):
            parse_image(text, "a.npy")


def test_one_hemisphere_is_not_enough(tmp_path: Path) -> None:
    stats = write_freesurfer(tmp_path / "fs", "sub-01", regional())
    (stats / "lh.aparc.stats").unlink()
    (scan,) = catalog(tmp_path)
    assert scan.reason == Reason.ONE_HEMISPHERE
    assert scan.detail == (
        "sub-01/stats/rh.aparc.stats is there and lh.aparc.stats is not; run recon-all for both hemispheres"
    )


def test_missing_regions_are_left_out_or_allowed(tmp_path: Path) -> None:
    stats = write_freesurfer(tmp_path / "fs", "sub-01", regional())
    path = stats / "lh.aparc.stats"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("bankssts")))
    (scan,) = catalog(tmp_path)
    assert scan.reason == Reason.DESCRIPTOR_REGIONS
    assert "1 of 68 regions are missing (lh_bankssts), 0 may be; measure them, or raise missing_regions" in scan.detail
    (scan,) = catalog(tmp_path, missing_regions=1)
    assert np.isnan(table_at(scan)).sum(axis=1).tolist() == [1, 1, 1]


@pytest.fixture
def two_folders(tmp_path: Path) -> list[Cat12Source | FreeSurferSource]:
    """CAT12 maps of a, b and d, FreeSurfer statistics of a, b (one hemisphere) and c."""
    for n, name in enumerate(("a", "b", "d")):
        write_map(tmp_path / "cat" / f"sub-{name}" / "mri" / f"mwp1sub-{name}_T1w.nii.gz", n)
    for name in ("wmsub-a_T1w.nii", "mwp2sub-a_T1w.nii", "s6mwp1sub-a_T1w.nii", "mwp1notes.txt"):
        (tmp_path / "cat" / "sub-a" / "mri" / name).write_text("another result of CAT12")
    for n, name in enumerate("abc"):
        write_freesurfer(tmp_path / "fs", f"sub-{name}", regional(n))
    (tmp_path / "fs/sub-b/stats/lh.aparc.stats").unlink()
    people = [{"participant_id": name, "age": 60 + n} for n, name in enumerate("abd")]
    pd.DataFrame(people).to_csv(tmp_path / "cat" / "participants.tsv", sep="\t", index=False)
    return [
        Cat12Source(dataset="demo", root=str(tmp_path / "cat")),
        FreeSurferSource(dataset="demo", root=str(tmp_path / "fs")),
    ]


def test_maps_and_statistics_of_two_folders_are_one_case(
    tmp_path: Path, two_folders: list[Cat12Source | FreeSurferSource]
) -> None:
    result = build_catalog(two_folders, workspace=str(tmp_path / "ws"))
    assert [(scan.case, scan.modality, scan.reason) for scan in result.scans] == [
        ("sub-a", "gm", ""),
        ("sub-a", "descriptors", ""),
        ("sub-b", "gm", ""),
        ("sub-b", "descriptors", Reason.ONE_HEMISPHERE),
        ("sub-c", "descriptors", Reason.NO_SCAN),
        ("sub-d", "gm", ""),
    ]
    assert result.scans[4].detail == "sub-c has descriptors but no usable image"
    assert (result.report["scans"], result.report["cases"]) == (3, 3)
    assert cases_left_out(result.scans) == {}
    assert result.phenotypes[["subject", "age"]].to_numpy().tolist() == [["sub-a", 60], ["sub-b", 61], ["sub-d", 62]]
    again = build_catalog(two_folders, workspace=str(tmp_path / "ws"), checksums=True)
    assert [s.etag for s in again.scans if s.modality == "descriptors"] == [
        s.etag for s in result.scans if s.modality == "descriptors"
    ]
    assert build_catalog(two_folders, workspace=str(tmp_path / "moved")).report["digest"] == result.report["digest"]


def test_a_dry_run_writes_nothing(tmp_path: Path, two_folders: list[Cat12Source | FreeSurferSource]) -> None:
    text = estimate_catalog(two_folders, str(tmp_path / "ws"))
    assert "demo (cat12): 3 files" in text
    assert "demo (freesurfer): 3 files" in text
    assert not (tmp_path / "ws").exists()
    with pytest.raises(ValueError, match="dataset demo: regional descriptors need a workspace to be written into"):
        build_catalog(two_folders)


def test_a_dataset_has_one_atlas(tmp_path: Path, two_folders: list[Cat12Source | FreeSurferSource]) -> None:
    other = FreeSurferSource(dataset="demo", root=str(tmp_path / "fs"), atlas="destrieux")
    text = "dataset demo: one source gives descriptors of atlas desikan_killiany by freesurfer, another of destrieux by"
    with pytest.raises(ValueError, match=text):
        build_catalog([*two_folders, other], workspace=str(tmp_path / "ws"))
    twice = build_catalog([*two_folders, two_folders[1]], workspace=str(tmp_path / "ws")).scans
    assert [s.reason for s in twice if s.case == "sub-a"] == ["", "", Reason.DUPLICATE_SCAN]


def test_smoothed_maps_and_foreign_names_of_cat12(tmp_path: Path) -> None:
    for name in ("s6mwp1IXI002-Guys-T1.nii", "s6mwp1IXI003-Guys-T1.nii", "mwp1IXI002-Guys-T1.nii"):
        write_map(tmp_path / "mri" / name)
    source = Cat12Source(dataset="d", root=str(tmp_path), prefix="s6mwp1", owner=r"(?P<subject>IXI\d+)-.*")
    assert [(s.subject, s.path.rsplit("/", 1)[-1]) for s in find_scans(source).scans] == [
        ("IXI002", "s6mwp1IXI002-Guys-T1.nii"),
        ("IXI003", "s6mwp1IXI003-Guys-T1.nii"),
    ]
    (scan, _) = find_scans(source.replace(owner=r"(?P<subject>IXI2\d+)-.*")).scans
    assert (scan.reason, scan.detail[:30]) == (Reason.UNMATCHED, "'IXI002-Guys-T1' of mri/s6mwp1")


def wide(rows: list[dict[str, object]], path: Path) -> DescriptorTableSource:
    pd.DataFrame(rows).to_csv(path / "aparc.csv", index=False)
    return DescriptorTableSource(dataset="demo", root=str(path), table="aparc.csv")


def line(subject: str, n: int, names: str = "{measure}:{region}") -> dict[str, object]:
    from models.anatomy import DESIKAN_KILLIANY

    values = regional(n)
    cells = {names.format(measure=m, region=r): values[m][k] for m in MEASURES for k, r in enumerate(DESIKAN_KILLIANY)}
    return {"subject": subject, **cells}


def test_a_wide_table_of_descriptors(tmp_path: Path) -> None:
    rows = [line("a", 0), line("b", 1), line("a", 2), {**line("c", 3), f"{CT}:lh_cuneus": ""}]
    source = wide(
        [*rows, {**line("d", 4), f"{SA}:rh_insula": "-3"}, {**line("e", 5), f"{CT}:lh_cuneus": "x"}], tmp_path
    )
    scans = find_scans(source, str(tmp_path / "ws")).scans
    np.testing.assert_array_equal(table_at(scans[1]), np.float32([regional(1)[name] for name in MEASURES]))
    assert [(s.subject, s.reason) for s in scans[3:]] == [
        ("c", Reason.DESCRIPTOR_REGIONS),
        ("d", Reason.DESCRIPTOR_VALUES),
        ("e", Reason.DESCRIPTOR_VALUES),
    ]
    assert scans[3].detail.startswith(
        "aparc.csv, row 5: cortical_thickness_mm: 1 of 68 regions are missing (lh_cuneus)"
    )
    assert scans[4].detail == "aparc.csv, row 6: surface_area_mm2 of rh_insula is -3; it must be a positive number"
    for name in "abc":
        write_map(tmp_path / "cat" / f"mwp1{name}.nii")
    maps = Cat12Source(dataset="demo", root=str(tmp_path / "cat"))
    found = build_catalog([maps, source], workspace=str(tmp_path / "ws")).scans
    assert [s.reason for s in found if s.case == "a"] == ["", "", Reason.DUPLICATE_SCAN]


def test_columns_of_aparcstats2table(tmp_path: Path) -> None:
    row = line("a", 0, "{region}_{measure}")
    source = wide([row], tmp_path)
    with pytest.raises(
        ValueError, match=r"aparc\.csv has no column 'cortical_thickness_mm:lh_bankssts'; its columns: su"
    ):
        find_scans(source, str(tmp_path / "ws"))
    with pytest.raises(ValueError, match=r"has no column 'lh_bankssts_\{0\}'; its columns: subject"):
        find_scans(source.replace(columns={CT: "{region}_{0}"}), str(tmp_path / "ws"))
    named = source.replace(columns={CT: f"{{region}}_{CT}"}, basis="cat12")
    (scan,) = find_scans(named, str(tmp_path / "ws")).scans
    assert np.isnan(table_at(scan)).all(axis=1).tolist() == [False, True, True]
    assert parse_table(Path(scan.path).read_bytes(), "a").basis == "cat12"


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"thickness": "{region}"}, "unknown measure 'thickness'; use some of cortical_thickness_mm"),
        ({CT: "thickness"}, r"'thickness' must hold the field \{region\} once"),
        ({}, "at least 1 item"),
    ],
)
def test_columns_that_make_no_sense(columns: dict[str, str], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        DescriptorTableSource(dataset="d", root="x", table="t.csv", columns=columns)


@pytest.mark.full
def test_folders_on_s3_give_the_same_files_of_descriptors(
    tmp_path: Path, two_folders: list[Cat12Source | FreeSurferSource], s3_url: str
) -> None:
    here = build_catalog(two_folders, workspace=str(tmp_path / "ws"))
    for path in (path for name in ("cat", "fs") for path in (tmp_path / name).rglob("*") if path.is_file()):
        storage.write_bytes(storage.join(s3_url, str(path.relative_to(tmp_path))), path.read_bytes())
    sources = [
        source.replace(root=storage.join(s3_url, name)) for source, name in zip(two_folders, ("cat", "fs"), strict=True)
    ]
    ws = storage.join(s3_url, "ws")
    there = build_catalog(sources, workspace=ws)
    assert [(s.case, s.modality, s.reason) for s in there.scans] == [(s.case, s.modality, s.reason) for s in here.scans]
    one, other = (next(s for s in found.scans if s.modality == "descriptors") for found in (here, there))
    assert (one.etag, one.size_bytes) == (other.etag, other.size_bytes)
    assert other.path.startswith(f"{ws}/descriptors/demo/sub-a-")
    assert storage.read_bytes(other.path) == Path(one.path).read_bytes()
    assert build_catalog(sources, workspace=ws).scans == there.scans
