"""Crosswalks: who is who in two datasets, from files of people, and where it counts: splits, folds, leaks, overlaps."""

from __future__ import annotations

import logging
from pathlib import Path

import pandas as pd
import pytest

from models.records import SelectedCase
from tasks import folds, splits
from tasks.benchmarks import BENCHMARKS
from tasks.crosswalk import (
    CrosswalkError,
    crosswalk_digest,
    crosswalk_links,
    person_links,
    read_crosswalk,
    read_crosswalks,
    remarks,
)
from tasks.evaluation import Cohort, without_seen
from tasks.leaks import SAME, leak_note
from tasks.overlap import overlap_sentence, shared_sentences
from tasks.scores import ScoreError
from tasks.splits import made_from, people_of, workspace_split

LONG = "person,dataset,subject\np1,brats2021,B-1\np1,upenn-gbm,U-1\np2,brats2021,B-2\np2,upenn-gbm,U-2\n"
PAIRS = [(("brats2021", f"B-{k}"), ("upenn-gbm", f"U-{k}")) for k in (1, 2)]
UPENN = BENCHMARKS["upenn-gbm"]


def write(workspace: Path, text: str = LONG, name: str = "map.csv", columns: str = "") -> Path:
    folder = workspace / "crosswalks"
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    if columns:
        (folder / name).with_suffix(".yaml").write_text(columns)
    return folder / name


def people(count: int = 20) -> pd.DataFrame:
    """Return stored cases of two datasets with as many subjects each."""
    names = [("brats2021", f"B-{k}") for k in range(count)] + [("upenn-gbm", f"U-{k}") for k in range(count)]
    return pd.DataFrame([{"dataset": d, "subject": s, "session": "", "status": "stored"} for d, s in names])


def test_the_long_form_and_tables_of_other_formats(tmp_path: Path) -> None:
    assert (read_crosswalks(tmp_path), crosswalk_links(tmp_path), crosswalk_digest(tmp_path)) == ([], [], "")
    path = write(tmp_path)
    (path.parent / "notes.md").write_text("who made the map")
    assert crosswalk_links(tmp_path) == PAIRS
    digest = crosswalk_digest(tmp_path)
    path.unlink()
    pd.read_csv(write(tmp_path)).sample(frac=1, random_state=1).to_parquet(path.with_suffix(".parquet"))
    path.unlink()
    assert crosswalk_digest(tmp_path) == digest
    assert {frozenset(pair) for pair in crosswalk_links(tmp_path)} == {frozenset(pair) for pair in PAIRS}


def test_a_name_mapping_with_a_column_for_each_dataset(tmp_path: Path) -> None:
    table = "BraTS21ID,BraTS_2018_subject_ID,Site\nB-1,Brats18_1,3\nB-2,NA,3\nB-3,Brats18_3,4\n"
    columns = "columns: {brats2021: BraTS21ID, brats2018: BraTS_2018_subject_ID}\n"
    path = write(tmp_path, table, "brats.csv", columns)
    assert crosswalk_links(tmp_path) == [(("brats2021", f"B-{k}"), ("brats2018", f"Brats18_{k}")) for k in (1, 3)]
    write(tmp_path, table, "brats.csv", "columns: {brats2021: BraTS21ID, brats2019: BraTS19}\n")
    with pytest.raises(CrosswalkError, match=r"brats\.csv has no column 'BraTS19'; its columns: BraTS21ID, BraTS_2018"):
        read_crosswalk(path)
    for wrong in ("columns: [BraTS21ID]\n", "columns: {brats2021: BraTS21ID}\n", "columns: {a\n"):
        write(tmp_path, table, "brats.csv", wrong)
        with pytest.raises(CrosswalkError, match=r"brats\.yaml does not explain brats\.csv: write `columns: {dataset:"):
            read_crosswalk(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "map.csv is empty; a line of column names is expected"),
        ("person,dataset,subject\n", "map.csv has no line that names a subject; fill it, or remove the file"),
        ("a,b\n1,2\n", r"lacks the columns person, dataset, subject; its columns: a, b\. Write one line an id with"),
        (f"{LONG}p3,,B-9\n", r"map\.csv, row 6: dataset is empty; fill it, or remove the line"),
        (
            f"{LONG}p3,upenn-gbm,U-1\n",
            r"map\.csv, row 6: subject upenn-gbm/U-1 belongs to person 'p3', but to 'p1' in row 3; give all ids of one",
        ),
        ("person,dataset,subject\np1,a\n", "row 2: 2 cells, the first line names 3 columns"),
    ],
)
def test_what_is_no_crosswalk_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(CrosswalkError, match=words):
        read_crosswalk(write(tmp_path, text))


def test_strangers_repetitions_and_single_ids_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = f"{LONG}p2,upenn-gbm,U-2\np3,BraTS21,B-1\np4,brats2021,B-0099\n"
    cases = people(5)
    found = remarks(read_crosswalk(write(tmp_path, text)), zip(cases["dataset"], cases["subject"], strict=True))
    assert found == [
        "map.csv: dataset 'BraTS21' is not in the store, which has: brats2021, upenn-gbm",
        "map.csv: 1 of 3 subjects of brats2021 are not in the store, first 'B-0099'; the store's are like 'B-0'",
        "map.csv: 1 lines repeat an earlier one",
        "map.csv: 2 of 4 persons have one id, which links nobody",
    ]
    with caplog.at_level(logging.WARNING):
        people_of(cases, tmp_path)
    assert [record.message for record in caplog.records] == [f"crosswalk {sentence}" for sentence in found]


def test_one_person_has_one_role_and_one_fold_across_datasets(tmp_path: Path) -> None:
    chain = "".join(f"p{k},brats2021,B-{k}\np{k},upenn-gbm,U-{(k * 7) % 20}\n" for k in range(20))
    write(tmp_path, f"person,dataset,subject\n{chain}")
    url, links = str(tmp_path / "store.zarr"), crosswalk_links(tmp_path)
    assert person_links(tmp_path, url) == links, "no search for look-alikes was made yet"
    split, digest = workspace_split(tmp_path, "default", url, people())
    assert splits.parted(splits.roles(split), links) is None
    assert splits.parted(folds.fold_of(folds.ensure_folds(tmp_path, "default", url, people())), links) is None
    assert made_from(tmp_path, "default", digest).crosswalks_digest == crosswalk_digest(tmp_path)
    roles = splits.roles(split)
    apart = [next(name for name, role in sorted(roles.items()) if role == wanted) for wanted in ("train", "test")]
    lines = "".join(f"x,{'/'.join(name).replace('/', ',')}\n" for name in apart)
    write(tmp_path, f"person,dataset,subject\n{lines}", "later.csv")
    with pytest.raises(splits.SplitError, match=r"or a crosswalk says so, and must share a role; write a split of ano"):
        workspace_split(tmp_path, "default", url, people())


def case(dataset: str, subject: str, role: str = "test") -> SelectedCase:
    return SelectedCase(dataset=dataset, row=0, case=subject, subject=subject, digest="", role=role, target="")


@pytest.fixture
def cohort() -> Cohort:
    tested = [case("upenn-gbm", f"U-{k}") for k in range(5)]
    table = people(4).assign(also_in=["upenn-gbm", *[None] * 7])
    return Cohort(UPENN, tuple(tested), table, store=None)  # type: ignore[arg-type]


def test_published_overlaps_are_refused_or_left_out_by_crosswalk(cohort: Cohort) -> None:
    seen = [case("brats2021", f"B-{k}", "train") for k in range(3)]
    with pytest.raises(
        ScoreError, match=r"first brats2021/B-0, are people of upenn-gbm under other ids; say who is who in a crosswalk"
    ):
        without_seen(seen, cohort, (), PAIRS)
    told = [*PAIRS, (("brats2021", "B-0"), ("upenn-gbm", "U-9"))]
    clean = without_seen(
        [*seen, case("upenn-gbm", "U-3", "val")], cohort, [(("upenn-gbm", "U-0"), ("brats2021", "B-0"))], told
    )
    assert clean.leaks == {
        ("upenn-gbm", "U-0"): "looks like brats2021/B-0",
        ("upenn-gbm", "U-1"): "the same person as brats2021/B-1 (crosswalk)",
        ("upenn-gbm", "U-2"): "the same person as brats2021/B-2 (crosswalk)",
        ("upenn-gbm", "U-3"): SAME,
    }


def test_datasets_that_share_people_are_pointed_out_until_a_crosswalk_covers_them(cohort: Cohort) -> None:
    seen = [case("brats2021", "B-1", "train")]
    pointed = without_seen(seen, cohort, ())
    assert pointed.overlaps == (
        "upenn-gbm and brats2021, which a pre-training has seen, share people under different ids (published); left "
        "out is who looks alike; say who is who in a crosswalk (a table in <workspace>/crosswalks, see docs/splits.md) "
        "to be sure.",
    )
    covered = without_seen(seen, cohort, (), PAIRS)
    assert covered.overlaps == ()
    assert leak_note(covered)[0].startswith(
        "1 of 5 test subjects were in the pre-training, by id, by looks or by crosswalk: left out of every number here"
    )
    assert shared_sentences([("ixi", "1")], ["upenn-gbm"]) == ()


def test_people_who_may_be_anyones_are_known_by_a_crosswalk() -> None:
    table = pd.DataFrame({"dataset": "openbhb", "subject": ["1", "2"], "also_in": ["unknown", "unknown"]})
    seen, told = [("openbhb", "1"), ("openbhb", "2")], [(("openbhb", "1"), ("abide-i", "5"))]
    assert overlap_sentence(table, seen, ["abide-i"], told=told).startswith("1 subjects of the pre-tr")
    told.append((("openbhb", "2"), ("abide-i", "6")))
    assert overlap_sentence(table, seen, ["abide-i"], told=told) == ""
