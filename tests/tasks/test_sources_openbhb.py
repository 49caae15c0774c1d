"""The OpenBHB release, and whose people are in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anatomy_files import CHANNELS, empty_array, region_array, regional, write_resources

from models.anatomy import MEASURES, Atlas
from models.records import Reason, Scan, SelectedCase
from tasks.benchmarks import BENCHMARKS
from tasks.catalog import build_catalog
from tasks.descriptors import parse_table
from tasks.evaluation import Cohort, without_seen
from tasks.overlap import overlap_sentence, overlapping
from tasks.scores import ScoreError
from tasks.sources import OpenBhbSource, find_scans

IDS = (101, 102, 103)
PEOPLE: dict[str, list[Any]] = {
    "participant_id": list(IDS),
    "study": ["abide1", "IXI", "abide1"],
    "sex": ["male", "female", "female"],
    "age": [9.5, 61.0, 12.25],
    "site": [3, 7, 3],
    "diagnosis": ["control"] * 3,
    "split": ["train", "external_test", "internal_test"],
}


def write_release(
    root: Path, atlas: Atlas = "desikan_killiany", channels: list[str] | None = None, **people: Any
) -> None:
    """Write maps (holes), regions, participants and resources as they are published, in one folder per split."""
    kind = "desikan" if atlas == "desikan_killiany" else "destrieux"
    write_resources(root, channels, kind)
    pd.DataFrame({**PEOPLE, **people}).to_csv(root / "participants.tsv", sep="\t", index=False)
    for n, number in enumerate(IDS):
        folder = root / ("train" if n == 0 else "val") / "derivatives" / f"sub-{number}" / "ses-1"
        empty_array(folder / f"sub-{number}_preproc-cat12vbm_desc-gm_T1w.npy")
        empty_array(folder / f"sub-{number}_preproc-quasiraw_T1w.npy", (1, 2, 2))
        regions = region_array(regional(n, atlas), channels)
        np.save(folder / f"sub-{number}_preproc-freesurfer_desc-{kind}_ROI.npy", regions)


def source_of(root: Path, **fields: Any) -> OpenBhbSource:
    return OpenBhbSource.model_validate({"dataset": "openbhb", "root": str(root)} | fields)


def scans_of(root: Path, **fields: Any) -> list[Scan]:
    return build_catalog([source_of(root, **fields)], workspace=str(root.parent / "ws")).scans


@pytest.mark.parametrize("atlas", ["desikan_killiany", "destrieux"])
def test_maps_regions_and_people_of_the_release(tmp_path: Path, atlas: Atlas) -> None:
    write_release(tmp_path / "bhb", atlas)
    result = build_catalog([source_of(tmp_path / "bhb", atlas=atlas)], workspace=str(tmp_path / "ws"))
    assert [(s.case, s.modality, s.split, s.reason) for s in result.scans] == [
        (f"sub-{number}", modality, split, "")
        for number, split in zip(IDS, ("training", "validation", "validation"), strict=True)
        for modality in ("gm", "descriptors")
    ]
    assert (result.scans[0].shape, result.scans[0].spacing_mm) == ((121, 145, 121), (1.5, 1.5, 1.5))
    for n in range(3):
        table = parse_table(Path(result.scans[2 * n + 1].path).read_bytes(), "a")
        assert (table.atlas, table.basis) == (atlas, "freesurfer")
        np.testing.assert_array_equal(table.array(), np.float32([regional(n, atlas)[name] for name in MEASURES]))
    columns = ["subject", "age", "sex", "site", "diagnosis", "study", "also_in"]
    assert result.phenotypes[columns].to_numpy().tolist() == [
        ["sub-101", 9.5, "M", "3", "control", "abide1", "abide-i"],
        ["sub-102", 61.0, "F", "7", "control", "IXI", "ixi"],
        ["sub-103", 12.25, "F", "3", "control", "abide1", "abide-i"],
    ]


def test_channels_are_found_by_name_and_never_by_position(tmp_path: Path) -> None:
    write_release(tmp_path / "bhb", channels=CHANNELS[::-1])
    table = parse_table(Path(scans_of(tmp_path / "bhb")[1].path).read_bytes(), "a")
    np.testing.assert_array_equal(table.array(), np.float32([regional(0)[name] for name in MEASURES]))


def changed_resources(root: Path, change: Any) -> None:
    path = root / "resource" / "resources.json"
    content = json.loads(path.read_text())
    change(content["desikan_roi"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda e: e["channels"].remove("average_thickness_mm"),
         r"resources\.json: desikan_roi has no channel 'average_thickness_mm' of its own; its channels: surface"),
        (lambda e: e["features"].remove("lh-cuneus"), r"desikan_roi: region lh_cuneus comes 0 times, once is expected"),
        (lambda e: e["features"].__setitem__(0, "lh-thalamus"), r"desikan_roi: region 'lh-thalamus' is none of atlas"),
        (lambda e: e.pop("channels"), r"has no entry 'desikan_roi' with lists of `channels` and `features`"),
    ],
)  # fmt: skip
def test_resources_that_do_not_name_what_is_needed_are_refused(tmp_path: Path, change: Any, text: str) -> None:
    write_release(tmp_path / "bhb")
    changed_resources(tmp_path / "bhb", change)
    with pytest.raises(ValueError, match=text):
        scans_of(tmp_path / "bhb")
    assert len(scans_of(tmp_path / "bhb", descriptors=False)) == 3


def test_absent_resources_and_participants_are_named(tmp_path: Path) -> None:
    write_release(tmp_path / "bhb")
    (tmp_path / "bhb/resource/resources.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"dataset openbhb: `resources` names .*resources\.json, which does not"
    ):
        scans_of(tmp_path / "bhb")
    (tmp_path / "bhb/participants.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"`participants` names .*participants\.tsv, which does not exist"):
        scans_of(tmp_path / "bhb")


def regions_file(root: Path) -> Path:
    return next(root.rglob("sub-101_*_ROI.npy"))


@pytest.mark.parametrize(
    ("array", "reason", "text"),
    [
        (np.ones((1, 68, 7)), Reason.ARRAY_SHAPE, r"shape (1, 68, 7); resources.json says 7 channels x 68 regions"),
        (np.ones((1, 7, 148)), Reason.ARRAY_SHAPE, r"shape (1, 7, 148); resources.json says 7 channels x 68 regions"),
        (region_array({**regional(), MEASURES[0]: [np.nan] * 68}), Reason.DESCRIPTOR_VALUES, "is nan; it must be a"),
        (region_array({**regional(), MEASURES[0]: [0.25] * 68}), Reason.DESCRIPTOR_UNITS, "it looks like centimetres"),
        (-region_array(regional()), Reason.DESCRIPTOR_VALUES, "is -2; it must be a positive number"),
        (np.array([{}]), Reason.UNREADABLE, "holds pickled objects, which are never read"),
    ],
)
def test_arrays_of_regions_that_cannot_be_used(tmp_path: Path, array: Any, reason: Reason, text: str) -> None:
    write_release(tmp_path / "bhb")
    np.save(regions_file(tmp_path / "bhb"), array, allow_pickle=True)
    image, scan, *_ = scans_of(tmp_path / "bhb")
    assert (image.status, scan.status, scan.reason) == ("ok", "left out", reason)
    assert scan.detail.startswith("sub-101_preproc-freesurfer_desc-desikan_ROI.npy: ")
    assert text in scan.detail


def test_maps_of_another_shape_and_copies_are_left_out(tmp_path: Path) -> None:
    write_release(tmp_path / "bhb")
    empty_array(
        tmp_path / "bhb/train/derivatives/sub-101/ses-1/sub-101_preproc-cat12vbm_desc-gm_T1w.npy", (1, 121, 121, 145)
    )
    empty_array(tmp_path / "bhb/val/sub-102_preproc-cat12vbm_desc-gm_T1w.npy")
    found = {(s.case, s.modality, s.reason) for s in scans_of(tmp_path / "bhb") if s.status != "ok"}
    assert found == {
        ("sub-101", "gm", Reason.ARRAY_SHAPE),
        ("sub-101", "descriptors", Reason.NO_SCAN),
        ("sub-102", "gm", Reason.DUPLICATE_SCAN),
    }


def test_studies_can_be_left_out_and_codes_must_be_explained(tmp_path: Path) -> None:
    write_release(tmp_path / "bhb")
    assert {s.case for s in scans_of(tmp_path / "bhb", exclude=["abide-i"])} == {"sub-102"}
    write_release(tmp_path / "bhb", study=[1, 4, 1])
    with pytest.raises(
        ValueError, match=r"subjects of abide-i are to be excluded, but .*tsv has the studies 1, 4, which"
    ):
        scans_of(tmp_path / "bhb", exclude=["abide-i"])
    explained = scans_of(tmp_path / "bhb", exclude=["abide-i"], studies={"1": "abide-i", "4": "ixi"})
    assert {s.case for s in explained} == {"sub-102"}
    with pytest.raises(
        ValueError, match=r"`exclude` names 'gsp', which no subject of .*tsv comes from; .*abide-i, ixi"
    ):
        scans_of(tmp_path / "bhb", exclude=["gsp"], studies={"1": "abide-i", "4": "ixi"})
    people = find_scans(source_of(tmp_path / "bhb"), str(tmp_path / "ws")).phenotypes
    assert people["also_in"].tolist() == ["unknown"] * 3
    write_release(tmp_path / "bhb")
    table = pd.read_csv(tmp_path / "bhb/participants.tsv", sep="\t").drop(columns="study")
    table.to_csv(tmp_path / "bhb/participants.tsv", sep="\t", index=False)
    with pytest.raises(ValueError, match=r"participants\.tsv has no column 'study', which says what the subjects are"):
        scans_of(tmp_path / "bhb")


def test_people_of_unknown_study_may_be_anyones(tmp_path: Path) -> None:
    write_release(tmp_path / "bhb")
    path = tmp_path / "bhb/participants.tsv"
    table = pd.read_csv(path, sep="\t")
    twice = pd.concat([table, table[:1].assign(study="IXI")])
    twice.to_csv(path, sep="\t", index=False)
    people = build_catalog([source_of(tmp_path / "bhb")], workspace=str(tmp_path / "ws")).phenotypes
    assert overlapping(people, [("openbhb", "sub-101")], ["abide-i"]) == ([], [("openbhb", "sub-101")])
    table[1:].to_csv(path, sep="\t", index=False)
    with pytest.raises(
        ValueError, match=r"participants\.tsv does not name sub-101 \(1 such\), so its study is unknown"
    ):
        scans_of(tmp_path / "bhb", exclude=["abide-i"])


def test_controls_of_abide_in_a_pretraining_are_leakage_for_its_benchmarks(tmp_path: Path) -> None:
    write_release(tmp_path / "bhb")
    people = find_scans(source_of(tmp_path / "bhb"), str(tmp_path / "ws")).phenotypes
    seen = [("openbhb", f"sub-{number}") for number in IDS[:2]]
    assert overlapping(people, seen, ["abide-i"]) == ([("openbhb", "sub-101")], [])
    assert overlap_sentence(people, seen, ["abide-i"]) == (
        "1 subjects of the pre-training, first openbhb/sub-101, are people of abide-i under other ids; say who is "
        "who in a crosswalk (a table in <workspace>/crosswalks, see docs/splits.md), or leave them out at their source "
        "(`exclude`) and pre-train again"
    )
    assert overlap_sentence(people, seen, ["adni"]) == ""
    assert overlap_sentence(people, [], ["abide-i"]) == ""
    assert overlap_sentence(people.drop(columns="also_in"), seen, ["abide-i"]) == ""


def test_a_benchmark_refuses_a_pretraining_that_has_seen_its_people(tmp_path: Path) -> None:
    write_release(tmp_path / "bhb")
    people = find_scans(source_of(tmp_path / "bhb"), str(tmp_path / "ws")).phenotypes
    benchmark = next(b for b in BENCHMARKS.values() if b.datasets == ("abide-i",))
    cohort = Cohort(benchmark, (), people, store=None)  # type: ignore[arg-type]
    seen = SelectedCase(dataset="openbhb", row=0, case="sub-101", subject="sub-101", digest="", role="train")
    with pytest.raises(ScoreError, match=rf"benchmark '{benchmark.name}': 1 subjects of the pre-training, first"):
        without_seen([seen], cohort, ())
    assert without_seen([seen.replace(role="test")], cohort, ()) == cohort
    assert without_seen([seen.replace(subject="sub-102")], cohort, ()) == cohort


def test_a_study_that_nobody_explained_may_be_any(tmp_path: Path) -> None:
    write_release(tmp_path / "bhb", study=[1, 4, 1])
    people = find_scans(source_of(tmp_path / "bhb"), str(tmp_path / "ws")).phenotypes
    seen = [("openbhb", f"sub-{number}") for number in IDS]
    assert overlap_sentence(people, seen, ["abide-i"]).startswith(
        "3 subjects of the pre-training, first openbhb/sub-101, may be people of abide-i under other ids: say at their"
    )
    assert overlap_sentence(people, seen, ["oasis-3"]) == ""
