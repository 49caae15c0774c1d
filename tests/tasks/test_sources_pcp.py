"""ROI series of ABIDE I and ADHD-200 as the Preprocessed Connectomes Project releases them, and of any other folder."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from connectome_layouts import (
    ABIDE_HEADER,
    ABIDE_ROWS,
    ADHD_HEADER,
    ADHD_ROWS,
    SUBJECTS,
    series,
    write,
    write_abide,
    write_adhd,
    write_image,
    write_rows,
)
from pydantic import ValidationError

from models.records import Reason, Scan
from tasks.catalog import CatalogResult, build_catalog
from tasks.phenotype_layouts import layouts, with_layouts
from tasks.sources import AbidePcpSource, Adhd200PcpSource, BidsSource, RoiSeriesSource, SourceConfig, find_scans

OUTPUTS = "Outputs/cpac/filt_noglobal/rois_cc200"
TABLE = "Phenotypic_V1_0b_preprocessed1.csv"


def abide(root: Path, **fields: object) -> AbidePcpSource:
    return AbidePcpSource.model_validate({"dataset": "abide-i", "root": str(root)} | fields)


def adhd(root: Path, **fields: object) -> Adhd200PcpSource:
    return Adhd200PcpSource.model_validate({"dataset": "adhd-200", "root": str(root)} | fields)


def plain_series(root: Path, **fields: object) -> RoiSeriesSource:
    return RoiSeriesSource.model_validate({"dataset": "ours", "root": str(root)} | fields)


def cases(scans: list[Scan]) -> list[tuple[str, str, str]]:
    return [(scan.case, scan.path.rsplit("/", 1)[-1], scan.reason) for scan in scans]


def told(result: CatalogResult) -> list[tuple[str, str]]:
    return [(issue.subject, issue.detail) for issue in result.issues if issue.problem == "bad value"]


@pytest.mark.parametrize(
    ("inside", "root"),
    [(OUTPUTS, "."), ("ABIDE_pcp/cpac/filt_noglobal", "."), (OUTPUTS, OUTPUTS), (OUTPUTS, "Outputs/cpac")],
    ids=["project", "nilearn", "the folder itself", "its parents"],
)
def test_abide_in_both_layouts(tmp_path: Path, inside: str, root: str) -> None:
    write_abide(tmp_path, inside)
    result = build_catalog([abide(tmp_path / root, phenotypic=str(tmp_path / TABLE))])
    assert [(scan.subject, scan.session, scan.modality, scan.status) for scan in result.scans] == [
        (subject, "", "roi_series", "ok") for subject in SUBJECTS
    ]
    assert all(scan.size_bytes > 1000 and scan.etag and not scan.shape for scan in result.scans)
    assert (result.report["scans"], result.report["cases"], result.report["modalities"]) == (3, 3, {"roi_series": 3})
    people = result.phenotypes.set_index("subject")
    assert list(people.columns) == ["dataset", "session", "age", "sex", "site", "diagnosis", "dsm_iv", "fd_mean_mm"]
    assert list(people.loc["50003"]) == ["abide-i", "", 24.45, "M", "PITT", "autism", "PDD-NOS", 0.3221]
    assert list(people.loc["50004", ["sex", "diagnosis", "dsm_iv"]]) == ["F", "HC", "HC"]
    assert people.loc["51456", ["age", "dsm_iv", "fd_mean_mm"]].isna().all()
    # Whoever has no preprocessed scan may have one of another source.
    assert [(issue.problem, issue.subject) for issue in result.issues] == [("unknown subject", "50002")]


def test_layouts_leave_what_the_source_read_as_it_is(tmp_path: Path) -> None:
    write_abide(tmp_path / "abide")
    write_adhd(tmp_path / "adhd")
    people = build_catalog([abide(tmp_path / "abide"), adhd(tmp_path / "adhd")]).phenotypes
    again = with_layouts(people)
    pd.testing.assert_frame_equal(again.astype(object).fillna(""), people.astype(object).fillna(""))


def test_a_column_of_another_dataset_is_not_taken_for_ours() -> None:
    people = pd.DataFrame(
        {"dataset": ["abide-i", "other"], "diagnosis": ["autism", "2"], "DX_GROUP": ["", "1"], "age": [-9999.0, 3.0]}
    )
    found = with_layouts(people)
    assert found["diagnosis"].tolist() == ["autism", "2"]
    assert found["age"].tolist() == [None, 3.0]


def test_subjects_of_abide_join_the_t1s_of_a_tree(tmp_path: Path) -> None:
    write_abide(tmp_path / "abide")
    write_image(tmp_path / "bids/sub-0050003/anat/sub-0050003_T1w.nii.gz")
    result = build_catalog(
        [
            abide(tmp_path / "abide", subject_name="sub-00{id}"),
            BidsSource(dataset="abide-i", root=str(tmp_path / "bids")),
        ]
    )
    joined = [(scan.modality, scan.status) for scan in result.scans if scan.case == "sub-0050003"]
    assert joined == [("t1", "ok"), ("roi_series", "ok")]
    with pytest.raises(ValidationError, match=r"subject_name 'sub' must hold the field \{id\} once"):
        abide(tmp_path, subject_name="sub")


def test_a_file_that_the_table_does_not_name_is_left_out(tmp_path: Path) -> None:
    write_abide(tmp_path)
    write(tmp_path / OUTPUTS / "Caltech_0051461_rois_cc200.1D")
    write(tmp_path / OUTPUTS / "no_filename_rois_cc200.1D")
    lost = [scan for scan in find_scans(abide(tmp_path)).scans if scan.status != "ok"]
    assert [(scan.subject, scan.reason) for scan in lost] == [("", Reason.UNMATCHED)] * 2
    assert lost[0].detail.startswith(f"{TABLE} has no FILE_ID 'Caltech_0051461', so nobody knows whose series Outputs/")


def test_what_the_release_holds_is_told_when_nothing_fits(tmp_path: Path) -> None:
    write_abide(tmp_path)
    text = (
        r"dataset abide-i: .* holds no <FILE_ID>_rois_aal\.1D of pipeline cpac, strategy filt_noglobal; correct "
        r"`pipeline`, `strategy` or `atlas`; there are: cpac filt_noglobal cc200"
    )
    with pytest.raises(ValueError, match=text):
        find_scans(abide(tmp_path, atlas="aal"))
    with pytest.raises(ValueError, match=r"strategy filt_global; .* there are: cpac filt_noglobal cc200"):
        find_scans(abide(tmp_path, strategy="filt_global"))


BAD_ROWS = {
    "unknown diagnosis": ("DX_GROUP", "3", "row 3: DX_GROUP is '3'; known are 1, 2; left empty"),
    "unknown subtype": ("DSM_IV_TR", "x", "row 3: DSM_IV_TR is 'x'; known are 0, 1, 2, 3, 4; left empty"),
    "negative age": ("AGE_AT_SCAN", "-3", "row 3: AGE_AT_SCAN is '-3'; 0 to 130 is expected; left empty"),
    "old": ("AGE_AT_SCAN", "1e3", "row 3: AGE_AT_SCAN is '1e3'; 0 to 130 is expected; left empty"),
    "no number": ("AGE_AT_SCAN", "young", "row 3: AGE_AT_SCAN is 'young'; a number is expected; left empty"),
    "infinite age": ("AGE_AT_SCAN", "inf", "row 3: AGE_AT_SCAN is 'inf'; 0 to 130 is expected; left empty"),
    "negative motion": (
        "func_mean_fd",
        "-1",
        "row 3: func_mean_fd is '-1'; a number from 0 on is expected; left empty",
    ),
    "unknown sex": ("SEX", "0", "row 3: SEX is '0'; known are 1, 2; left empty"),
}


@pytest.mark.parametrize(("column", "value", "text"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_cells_that_say_nothing_known_are_told(tmp_path: Path, column: str, value: str, text: str) -> None:
    write_abide(tmp_path)
    rows = [list(row) for row in ABIDE_ROWS]
    rows[1][ABIDE_HEADER.index(column)] = value
    write_rows(tmp_path / TABLE, ABIDE_HEADER, tuple(map(tuple, rows)))
    result = build_catalog([abide(tmp_path)])
    assert told(result) == [("50003", f"{TABLE}, {text}")]
    ours = {"DX_GROUP": "diagnosis", "DSM_IV_TR": "dsm_iv", "SEX": "sex", "func_mean_fd": "fd_mean_mm"}.get(
        column, "age"
    )
    cell = result.phenotypes.set_index("subject").loc["50003", ours]
    assert str(cell) in ("nan", "")
    assert result.report["phenotype_issues"] == {"bad value": 1, "unknown subject": 1}


def test_a_subject_that_comes_twice_is_told(tmp_path: Path) -> None:
    write_abide(tmp_path)
    again = list(ABIDE_ROWS[1])
    again[ABIDE_HEADER.index("AGE_AT_SCAN")], again[ABIDE_HEADER.index("FILE_ID")] = "30", "no_filename"
    nobody = list(ABIDE_ROWS[2])
    nobody[ABIDE_HEADER.index("SUB_ID")] = "fifty"
    write_rows(tmp_path / TABLE, ABIDE_HEADER, (*ABIDE_ROWS, tuple(again), tuple(nobody)))
    result = build_catalog([abide(tmp_path)])
    assert told(result) == [
        ("50003", f"{TABLE}, row 6: subject 50003 is already in row 3; keep one"),
        ("", f"{TABLE}, row 7: the subject is 'fifty'; a number is expected; the row is not read"),
    ]
    conflicts = [issue.detail for issue in result.issues if issue.problem == "conflict"]
    assert conflicts == ["age of 50003: 24.45, 30.0; left empty"]
    again[ABIDE_HEADER.index("FILE_ID")] = "Pitt_0050004"
    write_rows(tmp_path / TABLE, ABIDE_HEADER, (*ABIDE_ROWS, tuple(again)))
    with pytest.raises(ValueError, match=r"FILE_ID 'Pitt_0050004' is that of 50004 and 50003; correct one"):
        find_scans(abide(tmp_path))


@pytest.mark.parametrize("column", ["SUB_ID", "FILE_ID"])
def test_a_table_without_its_columns_is_refused(tmp_path: Path, column: str) -> None:
    write_abide(tmp_path)
    header = tuple("other" if name == column else name for name in ABIDE_HEADER)
    write_rows(tmp_path / TABLE, header, ABIDE_ROWS)
    with pytest.raises(ValueError, match=rf"{TABLE} has no column .*{column}.*; its columns: "):
        find_scans(abide(tmp_path))


def test_athena_gives_the_first_run_of_every_subject(tmp_path: Path) -> None:
    write_adhd(tmp_path)
    for run in ("session_1_rest_2", "session_2_rest_1"):
        write(tmp_path / f"NYU/0010001/sfnwmrda0010001_{run}_cc200_TCs.1D")
    write(tmp_path / "OHSU/1084283/sfnwmrda1084283_session_2_rest_10_cc200_TCs.1D")
    write(tmp_path / "OHSU/1084283/sfnwmrda1084283_session_2_rest_9_cc200_TCs.1D")
    write(tmp_path / "NYU/0010001/sfnwmrda0010001_session_1_rest_1_aal_TCs.1D")
    result = build_catalog([adhd(tmp_path)])
    assert sorted(cases(result.scans)) == [
        ("0010001", "sfnwmrda0010001_session_1_rest_1_cc200_TCs.1D", ""),
        ("0010001", "sfnwmrda0010001_session_1_rest_2_cc200_TCs.1D", Reason.OTHER_RUN),
        ("0010001", "sfnwmrda0010001_session_2_rest_1_cc200_TCs.1D", Reason.OTHER_RUN),
        ("0026001", "sfnwmrda0026001_session_1_rest_1_cc200_TCs.1D", ""),
        ("1018959", "sfnwmrda1018959_session_1_rest_1_cc200_TCs.1D", ""),
        ("1084283", "sfnwmrda1084283_session_2_rest_10_cc200_TCs.1D", Reason.OTHER_RUN),
        ("1084283", "sfnwmrda1084283_session_2_rest_9_cc200_TCs.1D", ""),
    ]
    detail = next(scan.detail for scan in result.scans if "session_2_rest_1_" in scan.path)
    assert detail.endswith("the first run of 0010001 is sfnwmrda0010001_session_1_rest_1_cc200_TCs.1D")
    people = result.phenotypes.set_index("subject").astype(object).fillna("")
    names = ["age", "sex", "site", "diagnosis", "adhd_subtype", "qc_rest_1"]
    assert list(people.loc["0010001", names]) == [13.36, "M", "NYU", "ADHD", "inattentive", "pass"]
    assert list(people.loc["1018959", names]) == [12.36, "F", "KKI", "HC", "HC", "questionable"]
    assert list(people.loc["0026001", names]) == ["", "", "WashU", "", "", ""]
    assert told(result) == []
    unfiltered = find_scans(adhd(tmp_path, filtered=False)).scans
    assert {scan.path.rsplit("/", 1)[-1].split("nwmrda")[0] for scan in unfiltered} == {"s"}
    assert len(unfiltered) == 3


def test_athena_reads_the_tables_of_the_sites_without_the_common_one(tmp_path: Path) -> None:
    write_adhd(tmp_path)
    (tmp_path / "adhd200_preprocessed_phenotypics.tsv").unlink()
    write_rows(tmp_path / "NYU/NYU_phenotypic.csv", ADHD_HEADER, ADHD_ROWS[:1])
    # WashU writes the name of the column without its space.
    write_rows(tmp_path / "WashU/WashU_phenotypic.csv", ("ScanDirID", *ADHD_HEADER[1:]), ADHD_ROWS[2:])
    found = find_scans(adhd(tmp_path, subject_name="sub-{id}"))
    assert found.phenotypes["subject"].tolist() == ["sub-0010001", "sub-0026001"]
    assert {scan.subject for scan in found.scans} == {"sub-0010001", "sub-0026001", "sub-1018959"}
    named = find_scans(adhd(tmp_path, phenotypic="NYU/NYU_phenotypic.csv"))
    assert named.phenotypes["subject"].tolist() == ["0010001"]


def test_what_athena_holds_is_told_when_nothing_fits(tmp_path: Path) -> None:
    write_adhd(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"holds no snwmrda\*_session_\*_rest_\*_aal_TCs\.1D; correct `atlas` or `filtered`; there are: "
        r"sfnwmrda\*_cc200_TCs\.1D, snwmrda\*_cc200_TCs\.1D",
    ):
        find_scans(adhd(tmp_path, atlas="aal", filtered=False))


def test_any_folder_of_series(tmp_path: Path) -> None:
    for name in ("sub-01_ses-2_cc200.csv", "a/sub-02_task-rest.tsv", "IXI012-Guys.1D", "notes.md", ".hidden.txt"):
        write(tmp_path / name)
    write(tmp_path / "participants.tsv", "participant_id\tage\n01\t30\n02\t40\n")
    write(tmp_path / "tables/scores.csv", "id,mmse\nsub-01,30\n")
    source = plain_series(tmp_path, phenotypes=[{"path": "tables/scores.csv"}])
    found = find_scans(source)
    assert [(scan.case, scan.modality, scan.status) for scan in found.scans] == [
        ("IXI012-Guys", "roi_series", "ok"),
        ("sub-02", "roi_series", "ok"),
        ("sub-01_ses-2", "roi_series", "ok"),
    ]
    assert found.phenotypes["subject"].tolist() == ["sub-01", "sub-01", "sub-02"]
    owner = r"(?P<subject>IXI\d+)-.*"
    assert [(s.case, s.reason) for s in find_scans(source.replace(owner=owner)).scans] == [
        ("IXI012", ""),
        ("", Reason.UNMATCHED),
        ("", Reason.UNMATCHED),
    ]


def test_series_by_a_pattern(tmp_path: Path) -> None:
    for name in ("s1/v1/rois_cc200.1D", "s1/v2/rois_cc200.1D", "s1/v1/rois_aal.1D", "s1/v1/rois_cc200.json"):
        write(tmp_path / name)
    source = plain_series(tmp_path, pattern="{subject}/{session}/rois_cc200.*")
    assert [scan.case for scan in find_scans(source).scans] == ["s1_v1", "s1_v2"]
    by_owner = source.replace(pattern="**/*_aal.1D", owner="(?P<subject>.*)_aal")
    assert [scan.case for scan in find_scans(by_owner).scans] == ["rois"]
    for pattern, text in (("{modality}.1D", "has the field modality; use"), ("{session}.1D", "none for the subject")):
        with pytest.raises(ValidationError, match=text):
            plain_series(tmp_path, pattern=pattern)


def test_text_that_is_too_large_or_empty_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.1D", "")
    write(tmp_path / "b.1D", series(frames=40))
    write(tmp_path / "c.1D", "1 2\n")
    monkeypatch.setattr("tasks.headers.MAX_TEXT_BYTES", 100)
    a, b, c = build_catalog([plain_series(tmp_path)]).scans
    assert (a.reason, b.reason, c.status) == (Reason.UNREADABLE, Reason.UNREADABLE, "ok")
    assert a.detail.endswith("a.1D is empty; a table of numbers is expected")
    assert "bytes, 100 are allowed for series and confounds" in b.detail


def test_checksums_are_the_identity_of_series_on_request(tmp_path: Path) -> None:
    path = write(tmp_path / "a.1D")
    (scan,) = build_catalog([plain_series(tmp_path)], checksums=True).scans
    path.touch()
    assert build_catalog([plain_series(tmp_path)], checksums=True).scans == [scan]
    assert scan.etag.startswith("sha256:")


def test_a_case_has_series_or_bold_and_the_first_source_wins(tmp_path: Path) -> None:
    write(tmp_path / "series/sub-1.1D")
    write(tmp_path / "more/sub-1_other.1D")
    write_image(tmp_path / "bids/sub-1/func/sub-1_task-rest_bold.nii.gz", frames=3)
    bids = BidsSource(dataset="ours", root=str(tmp_path / "bids"), datatypes=("func",))
    sources: list[SourceConfig] = [plain_series(tmp_path / "series"), bids, plain_series(tmp_path / "more")]
    result = build_catalog(sources)
    kept = tmp_path / "series/sub-1.1D"
    assert [(scan.modality, scan.reason, scan.detail) for scan in result.scans] == [
        ("bold", Reason.DUPLICATE_SCAN, f"roi_series of sub-1 is already {kept}"),
        ("roi_series", Reason.DUPLICATE_SCAN, f"roi_series of sub-1 is already {kept}"),
        ("roi_series", "", ""),
    ]
    first = next(scan for scan in build_catalog(sources[1:]).scans if scan.status == "ok")
    assert first.modality == "bold"


def test_layouts_of_the_network_cohorts_say_how_sure_they_are() -> None:
    known = layouts()
    assert {name: known[name].basis for name in ("abide-i", "adhd-200", "srpbs")} == {
        "abide-i": "confirmed",
        "adhd-200": "inferred",
        "srpbs": "unverified",
    }
    people = pd.DataFrame({"dataset": ["srpbs"] * 4, "diag": ["0", "4", "99", "12"], "sex": ["1", "2", "", "M"]})
    found = with_layouts(people)
    assert found["diagnosis"].tolist() == ["HC", "SCZ", "other", None]
    assert found["sex"].tolist() == ["M", "F", None, "M"]
