"""Derivatives of fMRIPrep, BOLD images of BIDS trees, and the headers of both."""

from __future__ import annotations

import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from connectome_layouts import SPACE, write, write_anatomy, write_bold, write_image
from pydantic import ValidationError

from models.records import Reason, Scan
from tasks.catalog import build_catalog, cases_left_out, mark_orphans
from tasks.catalog_estimate import estimate_catalog
from tasks.catalog_report import catalog_report
from tasks.headers import MAX_FRAMES, HeaderError, parse_header
from tasks.sources import BidsSource, FmriprepSource, TableSource, find_scans


def fmriprep(root: Path, **fields: object) -> FmriprepSource:
    return FmriprepSource.model_validate({"dataset": "ours", "root": str(root)} | fields)


def rows(root: Path, **fields: object) -> list[tuple[str, str, str, str]]:
    """Return case, modality, name without the subject, and reason of every row."""
    return [
        (scan.case, scan.modality, scan.path.rsplit("/", 1)[-1].removeprefix(f"{scan.subject}_"), scan.reason)
        for scan in find_scans(fmriprep(root, **fields)).scans
    ]


def test_one_subject_gives_t1_mask_bold_and_confounds(tmp_path: Path) -> None:
    write_anatomy(tmp_path, "sub-01")
    write_anatomy(tmp_path, "sub-01", space="")
    write_bold(tmp_path, "sub-01")
    write_bold(tmp_path, "sub-01", entities="task-nback")
    write(tmp_path / "sub-01.html", "report")
    result = build_catalog([fmriprep(tmp_path)])
    assert [(scan.modality, scan.status, scan.shape) for scan in result.scans] == [
        ("t1", "ok", (5, 4, 3)),
        ("bold", "ok", (5, 4, 3, 6)),
        ("brain_mask", "ok", (5, 4, 3)),
        ("bold_confounds", "ok", ()),
    ]
    assert {scan.case for scan in result.scans} == {"sub-01"}
    confounds = result.scans[-1]
    assert confounds.path.endswith("func/sub-01_task-rest_desc-confounds_timeseries.tsv")
    assert (confounds.size_bytes, confounds.dtype, bool(confounds.etag)) == (31, "", True)
    assert result.scans[1].spacing_mm == (2.0, 2.0, 2.5)
    assert (result.report["scans"], result.report["cases"], result.report["left_out"]) == (2, 1, 0)
    page = catalog_report(result)
    assert "| ours | t1 bold brain_mask bold_confounds | 1 |" in page
    assert "5 x 4 x 3 and 1 others" in page


def test_the_native_t1_beside_bold_in_mni_space(tmp_path: Path) -> None:
    write_anatomy(tmp_path, "sub-01")
    write_anatomy(tmp_path, "sub-01", space="")
    write_bold(tmp_path, "sub-01")
    assert [name for _, _, name, _ in rows(tmp_path, native_t1=True)] == [
        "desc-preproc_T1w.nii.gz",
        "desc-brain_mask.nii.gz",
        f"task-rest_{SPACE}_desc-preproc_bold.nii.gz",
        "task-rest_desc-confounds_timeseries.tsv",
    ]


def test_confounds_of_old_versions_and_missing_ones(tmp_path: Path) -> None:
    write_bold(tmp_path, "sub-01", confounds="regressors")
    write_bold(tmp_path, "sub-02", confounds="")
    write_anatomy(tmp_path, "sub-02")
    (tmp_path / f"sub-02/anat/sub-02_{SPACE}_desc-brain_mask.nii.gz").unlink()
    scans = build_catalog([fmriprep(tmp_path)]).scans
    assert [(scan.case, scan.modality, scan.reason) for scan in scans] == [
        ("sub-01", "bold", ""),
        ("sub-01", "bold_confounds", ""),
        ("sub-02", "t1", ""),
        ("sub-02", "bold", ""),
        ("sub-02", "brain_mask", Reason.MISSING_FILE),
        ("sub-02", "bold_confounds", Reason.MISSING_FILE),
    ]
    assert scans[1].path.endswith("_desc-confounds_regressors.tsv")
    assert "sub-02_task-rest_desc-confounds_timeseries.tsv does not exist; restore it" in scans[-1].detail
    assert cases_left_out(scans) == {}


@pytest.mark.parametrize("part", ["_part-mag", ""])
def test_confounds_of_a_magnitude_image_with_and_without_its_part(tmp_path: Path, part: str) -> None:
    write_bold(tmp_path, "sub-01", entities="task-rest_part-mag", confounds="")
    write(tmp_path / f"sub-01/func/sub-01_task-rest{part}_desc-confounds_timeseries.tsv")
    assert [(modality, reason) for _, modality, _, reason in rows(tmp_path)] == [("bold", ""), ("bold_confounds", "")]


def test_of_several_runs_the_first_is_used_or_the_wanted_one(tmp_path: Path) -> None:
    for run in (10, 2):
        write_bold(tmp_path, "sub-01", entities=f"task-rest_run-{run}")
    write_bold(tmp_path, "sub-02", entities="task-rest")
    image, table = "_desc-preproc_bold.nii.gz", "_desc-confounds_timeseries.tsv"
    assert rows(tmp_path) == [
        ("sub-01", "bold", f"task-rest_run-10_{SPACE}{image}", Reason.OTHER_RUN),
        ("sub-01", "bold", f"task-rest_run-2_{SPACE}{image}", ""),
        ("sub-01", "bold_confounds", f"task-rest_run-2{table}", ""),
        ("sub-02", "bold", f"task-rest_{SPACE}{image}", ""),
        ("sub-02", "bold_confounds", f"task-rest{table}", ""),
    ]
    scans = find_scans(fmriprep(tmp_path, run=10)).scans
    assert [(scan.case, scan.reason) for scan in scans] == [
        ("sub-01", Reason.OTHER_RUN),
        ("sub-01", ""),
        ("sub-01", ""),
        ("sub-02", Reason.OTHER_RUN),
    ]
    assert scans[0].detail.endswith(f"is run 2; used is sub-01_task-rest_run-10_{SPACE}{image}")
    assert scans[-1].detail.endswith("is run 1; wanted is run 10")
    assert [reason for case, *_, reason in rows(tmp_path, run=1) if case == "sub-02"] == ["", ""]


def test_resolutions_and_echoes(tmp_path: Path) -> None:
    for more in ("_res-2", "", "_res-1"):
        write_anatomy(tmp_path, "sub-01", space=f"{SPACE}{more}")
        write_bold(tmp_path, "sub-01", space=f"{SPACE}{more}")
    write_bold(tmp_path, "sub-02", entities="task-rest_echo-1", confounds="")
    used = [(case, name) for case, _, name, reason in rows(tmp_path) if not reason]
    assert used == [
        ("sub-01", f"{SPACE}_desc-preproc_T1w.nii.gz"),
        ("sub-01", f"{SPACE}_desc-brain_mask.nii.gz"),
        ("sub-01", f"task-rest_{SPACE}_desc-preproc_bold.nii.gz"),
        ("sub-01", "task-rest_desc-confounds_timeseries.tsv"),
    ]
    lost = [scan for scan in find_scans(fmriprep(tmp_path)).scans if scan.status != "ok"]
    assert {scan.reason for scan in lost} == {Reason.OTHER_RUN}
    assert f"is run 1 at resolution 2; used is sub-01_{SPACE}_desc-preproc_T1w" in [scan.detail for scan in lost][1]
    assert lost[-1].detail.endswith("is a single echo; wanted is the image of the combined echoes")
    finer = [name for *_, name, reason in rows(tmp_path, space="MNI152NLin2009cAsym:res-1") if not reason]
    assert finer[0] == f"{SPACE}_res-1_desc-preproc_T1w.nii.gz"
    assert finer[2:] == [f"task-rest_{SPACE}_res-1_desc-preproc_bold.nii.gz", "task-rest_desc-confounds_timeseries.tsv"]
    write_bold(tmp_path, "sub-02", entities="task-rest_echo-1_part-mag", confounds="")
    write_bold(tmp_path, "sub-02")
    assert [name for case, m, name, reason in rows(tmp_path) if case == "sub-02" and not reason] == [
        f"task-rest_{SPACE}_desc-preproc_bold.nii.gz",
        "task-rest_desc-confounds_timeseries.tsv",
    ]


def test_one_anatomy_serves_all_sessions_of_a_subject(tmp_path: Path) -> None:
    write_anatomy(tmp_path, "sub-01")
    write_anatomy(tmp_path, "sub-02", "ses-1")
    for subject in ("sub-01", "sub-02"):
        for session in ("ses-1", "ses-2"):
            write_bold(tmp_path, subject, session)
    for session in ("ses-1", "ses-2", "ses-3"):
        write_anatomy(tmp_path, "sub-03", session)
    write_bold(tmp_path, "sub-03", "ses-2")
    write_bold(tmp_path, "sub-03", "ses-4")
    write_anatomy(tmp_path, "sub-04")
    t1s = {scan.case: scan.path for scan in find_scans(fmriprep(tmp_path)).scans if scan.modality == "t1"}
    places = {case: path.removeprefix(f"{tmp_path}/").rsplit("/", 1)[0] for case, path in t1s.items()}
    assert places == {
        "sub-01_ses-1": "sub-01/anat",
        "sub-01_ses-2": "sub-01/anat",
        "sub-02_ses-1": "sub-02/ses-1/anat",
        "sub-02_ses-2": "sub-02/ses-1/anat",
        "sub-03_ses-1": "sub-03/ses-1/anat",
        "sub-03_ses-2": "sub-03/ses-2/anat",
        "sub-03_ses-3": "sub-03/ses-3/anat",
        "sub-04": "sub-04/anat",
    }
    result = build_catalog([fmriprep(tmp_path)])
    assert result.report["left_out"] == 0
    assert result.report["cases"] == 9


def test_a_second_t1_is_left_out(tmp_path: Path) -> None:
    write_anatomy(tmp_path, "sub-01", space=f"run-2_{SPACE}")
    write_anatomy(tmp_path, "sub-01", space=f"run-1_{SPACE}")
    assert rows(tmp_path, task="") == [
        ("sub-01", "t1", f"run-1_{SPACE}_desc-preproc_T1w.nii.gz", ""),
        ("sub-01", "brain_mask", f"run-1_{SPACE}_desc-brain_mask.nii.gz", ""),
        ("sub-01", "t1", f"run-2_{SPACE}_desc-preproc_T1w.nii.gz", Reason.OTHER_RUN),
    ]


def test_what_is_there_is_told_when_nothing_fits(tmp_path: Path) -> None:
    write_anatomy(tmp_path, "sub-01")
    text = r"no preprocessed T1 or BOLD image in space MNI152NLin6Asym below sub-\*; correct `root` or `space`; spaces"
    with pytest.raises(ValueError, match=rf"dataset ours: .* holds {text} there are: MNI152NLin2009cAsym$"):
        find_scans(fmriprep(tmp_path, space="MNI152NLin6Asym"))
    with pytest.raises(
        ValueError, match=r"of task 'rest' in space .*, or leave `task` empty .* the tasks none and the"
    ):
        find_scans(fmriprep(tmp_path))
    write_bold(tmp_path, "sub-01", entities="task-movie")
    with pytest.raises(ValueError, match=r"there are the tasks movie and the spaces MNI152NLin2009cAsym$"):
        find_scans(fmriprep(tmp_path))
    assert [modality for _, modality, *_ in rows(tmp_path, task="")] == ["t1", "brain_mask"]


@pytest.mark.parametrize(
    "fields",
    [{"space": "MNI/../x"}, {"space": ""}, {"space": "MNI:res"}, {"task": "a_b"}, {"run": -1}, {"run": 1001}],
)
def test_settings_that_name_nothing_are_refused(tmp_path: Path, fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        fmriprep(tmp_path, **fields)


@pytest.mark.parametrize("frames", [0, 1])
def test_bold_of_one_volume_is_left_out_with_its_confounds(tmp_path: Path, frames: int) -> None:
    write_bold(tmp_path, "sub-01", frames=frames)
    write_anatomy(tmp_path, "sub-01")
    bold, confounds = (s for s in build_catalog([fmriprep(tmp_path)]).scans if s.modality.startswith("bold"))
    assert (bold.reason, confounds.reason) == (Reason.NOT_4D, Reason.NO_SCAN)
    shape = (5, 4, 3, 1)[: 3 + frames]
    assert bold.detail == f"shape {shape}; a BOLD image has three axes of two or more voxels and 2 to 16,384 frames"
    assert confounds.detail == "sub-01 has bold_confounds but no usable BOLD image"


def test_headers_of_bold_are_bounded() -> None:
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_sform(np.eye(4), code=1)
    raw = header.binaryblock

    def shaped(*dim: int) -> bytes:
        text = struct.pack(f"<{len(dim) + 1}h", len(dim), *dim)
        return raw[:40] + text + raw[40 + len(text) : 344] + b"n+1\0" + bytes(4)

    assert parse_header(shaped(5, 5, 5, 9, 1), 10_000, frames=True).shape == (5, 5, 5, 9)
    for dim, text in (
        ((2, 2, 2, MAX_FRAMES + 1), "2 to 16,384 frames"),
        ((5, 5, 5, 9, 2), "2 to 16,384 frames"),
        ((32767, 32767, 32767, 2), "absurd dimensions .* at most 8,589,934,592 voxels"),
        ((50, 50, 50, 9), "more than a file of 10,000 bytes can hold"),
    ):
        with pytest.raises(HeaderError, match=text):
            parse_header(shaped(*dim), 10_000, frames=True)
    with pytest.raises(HeaderError, match="one volume with three axes"):
        parse_header(shaped(5, 5, 5, 9), 10_000)


def test_bold_of_a_raw_tree_is_that_of_its_task(tmp_path: Path) -> None:
    for name in ("task-rest_run-1_bold", "task-rest_run-2_bold", "task-nback_bold", "task-rest_sbref"):
        write_image(tmp_path / f"sub-01/func/sub-01_{name}.nii.gz", frames=4)
    write_image(tmp_path / "sub-01/anat/sub-01_T1w.nii.gz")
    write_image(tmp_path / "derivatives/x/sub-01/func/sub-01_task-rest_desc-brain_mask.nii.gz")

    def found(**fields: object) -> list[tuple[str, str]]:
        source = BidsSource.model_validate({"dataset": "ours", "root": str(tmp_path)} | fields)
        scans = build_catalog([source]).scans
        return [(scan.path.rsplit("/", 1)[-1].removeprefix("sub-01_"), scan.reason) for scan in scans]

    assert found() == [("T1w.nii.gz", "")]
    ignoring = {"datatypes": ("anat", "func"), "aliases": {"sbref": "ignore"}}
    assert found(**ignoring) == [
        ("T1w.nii.gz", ""),
        ("task-rest_run-1_bold.nii.gz", ""),
        ("task-rest_run-2_bold.nii.gz", Reason.DUPLICATE_SCAN),
    ]
    assert ("task-nback_bold.nii.gz", "") in found(**ignoring, task="")
    assert found(datatypes=("func",), task="nback") == [
        ("task-nback_bold.nii.gz", ""),
        ("task-rest_sbref.nii.gz", Reason.UNKNOWN_MODALITY),
    ]


def test_a_table_names_bold_confounds_and_series(tmp_path: Path) -> None:
    write_image(tmp_path / "a.nii.gz", frames=4)
    write(tmp_path / "a.tsv")
    write(tmp_path / "b.1D")
    write(tmp_path / "t.csv", "subject,bold,conf,ts\na,a.nii.gz,a.tsv,\nb,,,b.1D\nc,,a.tsv,\n")
    columns = {"bold": "bold", "bold_confounds": "conf", "roi_series": "ts"}
    cases = TableSource(dataset="ours", root=str(tmp_path), table="t.csv", images=columns)
    wanted = [
        ("a", "bold", ""),
        ("a", "bold_confounds", ""),
        ("b", "roi_series", ""),
        ("c", "bold_confounds", Reason.NO_SCAN),
    ]
    assert [(scan.case, scan.modality, scan.reason) for scan in build_catalog([cases]).scans] == wanted
    write(tmp_path / "r.csv", "subject,file,type\na,a.nii.gz,bold\na,a.tsv,conf\nb,b.1D,ts\nc,a.tsv,conf\n")
    aliases = {"conf": "bold_confounds", "ts": "roi_series"}
    scans = TableSource(
        dataset="ours", root=str(tmp_path), table="r.csv", path="file", modality="type", aliases=aliases
    )
    assert [(scan.case, scan.modality, scan.reason) for scan in build_catalog([scans]).scans] == wanted


def test_masks_need_an_anatomical_image_and_confounds_need_bold() -> None:
    def scan(modality: str, case: str = "s") -> Scan:
        return Scan(dataset="d", subject=case, case=case, modality=modality, path=f"/{modality}")

    kinds = ("bold", "bold_confounds", "roi_series", "brain_mask", "descriptors", "label")
    lost = {one.modality: one.detail for one in mark_orphans([*map(scan, kinds)]) if one.status != "ok"}
    assert lost == {
        "brain_mask": "s has a brain_mask but no usable image",
        "descriptors": "s has descriptors but no usable image",
        "label": "s has a label but no usable image",
    }
    assert all(one.status == "ok" for one in mark_orphans([*map(scan, (*kinds, "t1"))]))


def test_the_dry_run_counts_no_headers_of_text(tmp_path: Path) -> None:
    write_anatomy(tmp_path, "sub-01")
    write_bold(tmp_path, "sub-01")
    text = estimate_catalog([fmriprep(tmp_path)], str(tmp_path / "ws"))
    assert text.startswith("ours (fmriprep): 4 files, 49.2 kB to read, ")
    assert "from reading 3 headers" in text
