from __future__ import annotations

import json
import os

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from flows.catalog import StrictCatalogError, refuse_left_out
from models.records import Reason, Scan
from tasks.catalog import (
    build_catalog,
    cases_left_out,
    mark_duplicates,
    mark_label_shapes,
    mark_orphans,
    read_catalog,
    read_headers,
    read_phenotypes,
    sort_scans,
    summarise,
    write_catalog,
)
from tasks.catalog_report import catalog_report, left_out_table, markdown_table, modality_combinations
from tasks.sources import BidsSource, DatalistSource


def put(path, shape=(4, 5, 6), spacing=2.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.ones(shape, np.int16), np.diag([spacing, spacing, spacing, 1])), path)


@pytest.fixture
def sources(tmp_path):
    """A BIDS tree and a datalist with one of each fault."""
    bids, listed = tmp_path / "bids", tmp_path / "listed"
    for subject in ("sub-1", "sub-2"):
        for suffix in ("T1w", "FLAIR"):
            put(bids / f"{subject}/anat/{subject}_{suffix}.nii.gz")
    put(bids / "sub-1/anat/sub-1_run-2_T1w.nii.gz")
    put(bids / "sub-2/anat/sub-2_T2w.nii.gz", shape=(4, 4, 4, 3))
    put(bids / "derivatives/x/sub-1/anat/sub-1_dseg.nii.gz")
    put(bids / "derivatives/x/sub-9/anat/sub-9_dseg.nii.gz")
    (bids / "participants.tsv").write_text("participant_id\tage\tsex\nsub-1\t50\tF\nsub-2\t60\tM\n")
    put(listed / "P1_t1ce.nii.gz", spacing=0.5)
    (listed / "P1_t2.nii.gz").write_bytes(b"not an image")
    entry = {"image": ["P1_t1ce.nii.gz", "P1_t2.nii.gz", "P1_adc.nii.gz", "P1_swi.nii.gz", "../P1_pd.nii.gz"]}
    (listed / "dataset.json").write_text(json.dumps({"training": [entry]}))
    return [
        BidsSource(dataset="ixi", root=str(bids)),
        DatalistSource(dataset="brats2021", root=str(listed), label_scheme="brats2021"),
    ]


def test_every_fault_is_left_out_with_its_reason_and_nothing_else(sources):
    result = build_catalog(sources)
    assert [(row["case"], row["file"], row["reason"]) for row in left_out_table(result.scans)] == [
        ("P1", "P1_t2.nii.gz", Reason.UNREADABLE),
        ("P1", "P1_pd.nii.gz", Reason.OUTSIDE_ROOT),
        ("P1", "P1_adc.nii.gz", Reason.MISSING_FILE),
        ("P1", "P1_swi.nii.gz", Reason.UNKNOWN_MODALITY),
        ("sub-1", "sub-1_run-2_T1w.nii.gz", Reason.DUPLICATE_SCAN),
        ("sub-2", "sub-2_T2w.nii.gz", Reason.NOT_3D),
        ("sub-9", "sub-9_dseg.nii.gz", Reason.NO_SCAN),
    ]
    used = [(scan.dataset, scan.case, scan.modality) for scan in result.scans if scan.status == "ok"]
    assert used == [
        ("brats2021", "P1", "t1c"),
        ("ixi", "sub-1", "flair"),
        ("ixi", "sub-1", "t1"),
        ("ixi", "sub-1", "label"),
        ("ixi", "sub-2", "flair"),
        ("ixi", "sub-2", "t1"),
    ]
    t1c = result.scans[0]
    assert (t1c.shape, t1c.spacing_mm, t1c.dtype, t1c.split) == ((4, 5, 6), (0.5, 0.5, 0.5), "int16", "training")
    assert t1c.size_bytes > 0
    assert t1c.etag


def test_the_order_of_sources_changes_nothing(sources):
    forth, back = build_catalog(sources), build_catalog(sources[::-1])
    assert forth.scans == back.scans
    assert forth.report == back.report


def test_the_digest_ignores_times_and_places_but_not_content(sources, tmp_path):
    first = build_catalog(sources).report
    flair = tmp_path / "bids/sub-1/anat/sub-1_FLAIR.nii.gz"
    os.utime(flair, ns=(1, 1))
    touched = build_catalog(sources).report
    assert touched["digest"] == first["digest"]
    assert touched["identity"] != first["identity"]
    (tmp_path / "bids").rename(tmp_path / "moved")
    moved = build_catalog([sources[0].replace(root=str(tmp_path / "moved")), sources[1]]).report
    assert moved["digest"] == first["digest"]
    put(tmp_path / "moved/sub-1/anat/sub-1_FLAIR.nii.gz", shape=(4, 5, 7))
    changed = build_catalog([sources[0].replace(root=str(tmp_path / "moved")), sources[1]]).report
    assert changed["digest"] != first["digest"]


def test_counts(sources):
    report = build_catalog(sources).report
    assert (report["cases"], report["scans"], report["labels"], report["left_out"]) == (3, 5, 1, 7)
    assert report["datasets"]["ixi"]["modalities"] == {"flair": 2, "t1": 2, "label": 1}
    assert report["datasets"]["brats2021"]["reasons"] == {
        "missing file": 1,
        "outside root": 1,
        "unknown modality": 1,
        "unreadable": 1,
    }
    assert report["subjects"] == 2


def test_written_and_read_again(sources, tmp_path):
    result = build_catalog(sources)
    ws = str(tmp_path / "ws")
    assert write_catalog(result, ws)
    assert read_catalog(ws) == read_catalog(f"{ws}/catalog.parquet") == result.scans
    pd.testing.assert_frame_equal(read_phenotypes(ws), result.phenotypes)
    assert json.loads((tmp_path / "ws/catalog.json").read_text()) == result.report
    assert not list((tmp_path / "ws").glob("*.tmp"))


def test_an_unchanged_catalog_is_not_written_again(sources, tmp_path):
    ws = tmp_path / "ws"
    assert write_catalog(build_catalog(sources), str(ws))
    before = {path.name: path.stat().st_mtime_ns for path in ws.iterdir()}
    assert not write_catalog(build_catalog(sources), str(ws))
    assert {path.name: path.stat().st_mtime_ns for path in ws.iterdir()} == before
    (tmp_path / "bids/participants.tsv").write_text("participant_id\tage\nsub-1\t51\n")
    assert write_catalog(build_catalog(sources), str(ws))
    assert read_phenotypes(str(ws))["age"].tolist() == [51.0]


def test_a_half_written_catalog_is_written_again(sources, tmp_path):
    ws = tmp_path / "ws"
    result = build_catalog(sources)
    write_catalog(result, str(ws))
    (ws / "catalog.parquet").unlink()
    assert write_catalog(result, str(ws))
    (ws / "catalog.json").write_text("{")
    assert write_catalog(result, str(ws))


def test_an_absent_catalog_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no catalog\.parquet at .*; run the catalog flow first"):
        read_catalog(str(tmp_path))


def test_what_is_no_catalog_is_refused(sources, tmp_path):
    ws = str(tmp_path / "ws")
    write_catalog(build_catalog(sources), ws)
    with pytest.raises(
        ValueError, match=r"phenotypes\.parquet is not a catalog: it has no column 'case'; its columns: data"
    ):
        read_catalog(f"{ws}/phenotypes.parquet")
    (tmp_path / "text.parquet").write_text("dataset,subject")
    with pytest.raises(
        ValueError, match=r"text\.parquet is not a catalog: it is no readable Parquet file .*; give catalog\."
    ):
        read_catalog(str(tmp_path / "text.parquet"))
    table = pd.read_parquet(f"{ws}/catalog.parquet").assign(status="maybe")
    table.to_parquet(tmp_path / "other.parquet")
    with pytest.raises(
        ValueError, match=r"other\.parquet is not a catalog: status is 'maybe': Input should be 'ok' or"
    ):
        read_catalog(str(tmp_path / "other.parquet"))
    with pytest.raises(FileNotFoundError, match=r"there is no catalog\.parquet at .*catalog\.json/catalog\.parquet"):
        read_catalog(f"{ws}/catalog.json")
    pd.DataFrame({"dataset": ["d"], "age": [1.0]}).to_parquet(tmp_path / "ages.parquet")
    with pytest.raises(ValueError, match=r"ages\.parquet is not a table of phenotypes: it has no column 'subject'"):
        read_phenotypes(str(tmp_path / "ages.parquet"))


def test_a_source_without_scans_is_a_wrong_config(tmp_path):
    with pytest.raises(ValueError, match=r"dataset ixi: no scan was found below .* as bids; check `root` and `kind`"):
        build_catalog([BidsSource(dataset="ixi", root=str(tmp_path))])


def test_one_dataset_in_two_lists(tmp_path):
    put(tmp_path / "P1_t1.nii.gz")
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text('{"training": [{"image": ["P1_t1.nii.gz"]}]}')
    result = build_catalog([DatalistSource(dataset="d", root=str(tmp_path), datalist=f"{n}.json") for n in "ab"])
    assert [scan.reason for scan in result.scans] == ["", "duplicate scan"]


@pytest.mark.full
def test_the_same_catalog_from_s3(sources, tmp_path, s3_url):
    from infra import storage

    for path in tmp_path.rglob("*"):
        if path.is_file():
            storage.write_bytes(storage.join(s3_url, str(path.relative_to(tmp_path))), path.read_bytes())
    remote = [
        source.replace(root=storage.join(s3_url, name))
        for source, name in zip(sources, ("bids", "listed"), strict=True)
    ]
    here, there = build_catalog(sources), build_catalog(remote)

    def plain(scans):
        return [scan.model_dump(exclude={"path", "etag", "detail"}) for scan in scans if scan.status == "ok"]

    assert plain(there.scans) == plain(here.scans)
    assert {(row["file"], row["reason"]) for row in left_out_table(there.scans)} == {
        (row["file"], row["reason"]) for row in left_out_table(here.scans)
    }
    assert all(scan.etag and scan.path.startswith(s3_url) for scan in there.scans if scan.status == "ok")
    ws = storage.join(s3_url, "ws")
    assert write_catalog(there, ws)
    assert not write_catalog(build_catalog(remote), ws)
    assert read_catalog(ws) == there.scans


def scan(**fields):
    return Scan(**{"dataset": "d", "subject": "s", "case": "s", "modality": "t1", "path": "/x_t1.nii"} | fields)


def test_a_broken_first_run_gives_way_to_the_second():
    broken = scan(path="/run-1", status="left out", reason="unreadable")
    second, third = scan(path="/run-2"), scan(path="/run-3")
    result = mark_duplicates([broken, second, third])
    assert result[:2] == [broken, second]
    assert result[2].reason == Reason.DUPLICATE_SCAN
    assert result[2].detail == "t1 of s is already /run-2"


def test_a_label_without_a_usable_image_is_left_out():
    image = scan(status="left out", reason="unreadable")
    label, other = scan(modality="label", path="/l"), scan(case="o", modality="label")
    result = mark_orphans([image, label, other, scan(case="o")])
    assert [item.reason for item in result] == ["unreadable", Reason.NO_SCAN, "", ""]
    assert result[1].detail == "s has a label but no usable image"


def test_labels_of_another_shape_than_all_images_are_left_out():
    images = [scan(modality="t1", shape=(4, 5, 6)), scan(modality="t2", shape=(8, 8, 8, 1))]
    label = scan(modality="label", shape=(8, 8, 8))
    mask = scan(modality="brain_mask", shape=(2, 2, 2))
    fine = [*images, label, mask]
    assert mark_label_shapes(fine) == fine
    *others, marked = mark_label_shapes([*images, mask, label.replace(shape=(4, 5, 7))])
    assert others == [*images, mask]
    assert (marked.reason, marked.detail) == (
        Reason.LABEL_SHAPE,
        "(4, 5, 7) voxels, the scans have t1 (4, 5, 6), t2 (8, 8, 8)",
    )
    # Only what headers say counts, and only what can be used.
    unread = [scan(modality="t1"), label]
    assert mark_label_shapes(unread) == unread
    absent = [images[0], images[1].replace(status="left out"), label]
    assert mark_label_shapes(absent)[-1].reason == Reason.LABEL_SHAPE


def test_cases_are_lost_when_none_of_their_images_can_be_used():
    broken = {"status": "left out", "reason": Reason.UNREADABLE}
    scans = [
        scan(case="whole"),
        scan(case="partly"),
        scan(case="partly", modality="t2", **broken),
        scan(case="lost", **broken),
        scan(case="lost", modality="t2", status="left out", reason=Reason.MISSING_FILE),
        scan(case="lost", modality="label", status="left out", reason=Reason.NO_SCAN),
        scan(case="a label alone", modality="label", status="left out", reason=Reason.NO_SCAN),
        scan(case="", modality="", status="left out", reason=Reason.UNMATCHED),
    ]
    assert cases_left_out(scans) == {("d", "lost"): Reason.UNREADABLE}


def test_strict_mode_fails_on_a_label_of_another_shape(tmp_path):
    put(tmp_path / "sub-1/anat/sub-1_T1w.nii.gz")
    put(tmp_path / "derivatives/x/sub-1/anat/sub-1_dseg.nii.gz", shape=(4, 5, 7))
    result = build_catalog([BidsSource(dataset="ixi", root=str(tmp_path))])
    with pytest.raises(StrictCatalogError, match=r"sub-1_dseg\.nii\.gz: label shape mismatch \(\(4, 5, 7\) voxels, "):
        refuse_left_out(result)


def test_catalog_order_is_the_template_order():
    names = ["label", "adc", "swi", "t1", "flair", "bold"]
    ordered = [item.modality for item in sort_scans([scan(modality=name) for name in names])]
    assert ordered == ["flair", "t1", "adc", "bold", "label", "swi"]


def test_progress_reaches_the_end():
    seen = []
    read_headers([scan(status="left out")] * 250, lambda done, total: seen.append((done, total)))
    assert seen == [(0, 250), (128, 250), (250, 250)]


def test_the_report_tells_what_is_there_and_what_is_not(sources):
    text = catalog_report(build_catalog(sources))
    assert text.startswith("**3 cases, 5 scans, 1 labels** in 2 datasets; 7 files left out.")
    assert "| ixi | 2 | 4 | 1 | 3 | 0.0 | 2 to 2 | 4 x 5 x 6 |" in text
    assert "| ixi | flair t1 label | 1 |" in text
    assert "| brats2021 | P1 | P1_adc.nii.gz | missing file |" in text


def test_a_report_without_names_counts_the_reasons(sources):
    text = catalog_report(build_catalog(sources), name_files=False)
    assert "| brats2021 | missing file | 1 |" in text
    assert "P1" not in text
    assert "sub-" not in text


def test_the_report_of_nothing():
    assert modality_combinations([]) == []
    assert markdown_table([]) == ["none"]
    assert markdown_table([{"a": "x|y\nz", "n": 1234}])[2] == "| x\\|y z | 1,234 |"
    assert summarise([], pd.DataFrame())["cases"] == 0
