"""Splits from the files of papers: datalists and tables, merged, extended, and refused with what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from training_phantoms import write_blobs
from typer.testing import CliRunner

from brainloom.cli import app
from tasks.split_import import Imported, Reading, import_split, read_roles, split_counts
from tasks.splits import SplitError, ensure_split, given, read_record, read_split, roles

SUBJECTS = [f"BraTS2021_{k:05d}" for k in range(10)]
STORED = {("brats2021", name) for name in SUBJECTS} | {("ixi", "IXI-1"), ("ixi", "IXI-2")}
PARTS = {"training": SUBJECTS[:6], "validation": SUBJECTS[6:7], "test": SUBJECTS[7:]}
ROLE_OF = {
    ("brats2021", name): {"training": "train", "validation": "val"}.get(s, s) for s, n in PARTS.items() for name in n
}
BRATS = Reading("brats2021")


def datalist(folder: Path, parts: dict[str, list[str]] | None = None, name: str = "brats.json") -> Path:
    content = {
        section: [{"image": [f"{one}/{one}_{token}.nii.gz" for token in ("flair", "t1")], "label": ""} for one in names]
        for section, names in (parts or PARTS).items()
    }
    (folder / name).write_text(json.dumps({"name": "a paper", **content}))
    return folder / name


def table(folder: Path, text: str, name: str = "split.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


def take(folder: Path, path: Path, reading: Reading = BRATS, **more: object) -> Imported:
    return import_split(folder, "paper", str(folder / "store.zarr"), STORED, path, reading, **more)  # type: ignore[arg-type]


def test_a_datalist_gives_every_subject_its_role_and_the_record_says_so(tmp_path: Path) -> None:
    path = datalist(tmp_path)
    done = take(tmp_path, path)
    assert done.counts == {("brats2021", "test"): 3, ("brats2021", "train"): 6, ("brats2021", "val"): 1}
    split, digest = read_split(done.path)
    assert (roles(split), digest) == (ROLE_OF, done.digest)
    assert take(tmp_path, path) == done, "a second time changes nothing"
    (source,) = read_record(done.path)["imported"]
    assert (source["file"], source["datasets"], source["subjects"], given(source)) == (
        "brats.json", ["brats2021"], 10, 10,
    )  # fmt: skip
    cases = pd.DataFrame(sorted(STORED), columns=["dataset", "subject"])
    grown, _ = ensure_split(done.path, cases, seed=0)
    assert {who: role for who, role in roles(grown).items() if who in ROLE_OF} == ROLE_OF, "an extension moves nobody"
    assert read_record(done.path)["imported"] == [source]
    assert split_counts(done.path).loc["brats2021"].to_dict() == {"train": 6, "val": 1, "test": 3}


def test_tables_of_papers_and_the_catalog_of_a_workspace(tmp_path: Path) -> None:
    plain = table(tmp_path, "subject,role\nIXI-1,Training\nIXI-2,test\n")
    assert read_roles(plain, Reading("ixi")) == {("ixi", "IXI-1"): "train", ("ixi", "IXI-2"): "test"}
    release = "participant_id\tsplit\n101\ttrain\n102\tinternal_test\n103\t\n"
    bhb = table(tmp_path, release, "participants.tsv")
    reading = Reading("openbhb", prefix="sub-", words={"internal_test": "val"})
    assert read_roles(bhb, reading) == {("openbhb", "sub-101"): "train", ("openbhb", "sub-102"): "val"}
    scans = pd.DataFrame({"dataset": ["ixi", "ixi", "brats2021"], "subject": ["IXI-1", "IXI-1", "B"]})
    scans.assign(split=["training", "training", "test"]).to_parquet(tmp_path / "catalog.parquet")
    catalog = tmp_path / "catalog.parquet"
    assert read_roles(catalog, Reading()) == {("ixi", "IXI-1"): "train", ("brats2021", "B"): "test"}
    assert read_roles(catalog, Reading("ixi")) == {("ixi", "IXI-1"): "train"}


def test_two_papers_share_a_split_until_they_disagree(tmp_path: Path) -> None:
    take(tmp_path, datalist(tmp_path))
    plain = table(tmp_path, "subject,role\nIXI-1,train\nIXI-2,test\n")
    done = take(tmp_path, plain, Reading("ixi"))
    assert [one["file"] for one in read_record(done.path)["imported"]] == ["brats.json", "split.csv"]
    assert len(read_split(done.path)[0]) == 12
    other = table(tmp_path, "subject,role\nIXI-1,test\nIXI-2,test\n", "other.csv")
    with pytest.raises(
        SplitError, match=r"1 subjects have another role there, first ixi/IXI-1 \(train, to be test\); im"
    ):
        take(tmp_path, other, Reading("ixi"))


def test_subjects_that_a_file_does_not_name_need_a_role(tmp_path: Path) -> None:
    only_test = datalist(tmp_path, {"test": SUBJECTS[7:]})
    with pytest.raises(
        SplitError,
        match=r"does not name 7 subjects of brats2021 that are in the store, first brats2021/BraTS2021_00000; say",
    ):
        take(tmp_path, only_test)
    done = take(tmp_path, only_test, rest="train")
    (source,) = read_record(done.path)["imported"]
    assert (source["subjects"], given(source)) == (3, 10)
    assert (done.rest, split_counts(done.path).loc["brats2021", "train"]) == (7, 7)


def test_subjects_that_the_store_lacks_are_refused_or_passed_over(tmp_path: Path) -> None:
    more = datalist(tmp_path, {**PARTS, "test": [*PARTS["test"], "BraTS2021_99999"]})
    with pytest.raises(
        SplitError,
        match=r"1 of its 11 subjects are not in the store, first brats2021/BraTS2021_99999; the store's are like",
    ):
        take(tmp_path, more)
    assert take(tmp_path, more, known_only=True).unknown == 1
    for known_only in (False, True):
        with pytest.raises(
            SplitError, match=r"none of its 11 subjects is in the store, first oasis/.*it has: brats2021, ixi"
        ):
            take(tmp_path, more, Reading("oasis"), known_only=known_only)


def test_one_person_in_two_roles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "crosswalks").mkdir()
    lines = f"person,dataset,subject\np,brats2021,{SUBJECTS[0]}\np,brats2021,{SUBJECTS[9]}\n"
    table(tmp_path / "crosswalks", lines, "same.csv")
    with pytest.raises(
        SplitError, match=r"\(train\) and brats2021/BraTS2021_00009 \(test\) look like one person .* cross"
    ):
        take(tmp_path, datalist(tmp_path))


@pytest.mark.parametrize(
    ("text", "reading", "words"),
    [
        ("subject,role\na,train\na,test\n", BRATS, r"subject brats2021/a is train and test; a subject has one role"),
        (
            "subject,role\na,maybe\n",
            BRATS,
            r"brats2021/a has the role 'maybe'; known words are train, training, .* --word",
        ),
        ("subject,role\na,\n", BRATS, r"gives nobody a role in dataset 'brats2021'"),
        ("subject,role\na,train\n", Reading(), r"has no column 'dataset': name the dataset whose subjects these are"),
        ("subject,role\n,train\n", BRATS, r"split\.csv, row 2: the subject is empty"),
        ("name,role\na,train\n", BRATS, r"split\.csv has no column 'participant_id'; its columns: name, role"),
        ("subject,role\na,train\n", Reading("x", words={"a": "b"}), r"'b' is no role; use train, val, test"),
    ],
)
def test_what_gives_no_roles_is_refused(tmp_path: Path, text: str, reading: Reading, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_roles(table(tmp_path, text), reading)


def test_what_is_no_datalist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SplitError, match=r"brats\.json is a datalist, which does not say whose cases they are: name"):
        read_roles(datalist(tmp_path), Reading())
    path = table(tmp_path, "{}", "empty.json")
    with pytest.raises(
        ValueError, match=r"empty\.json has none of the lists train, training, .*; it is not a datalist"
    ):
        read_roles(path, BRATS)


@pytest.mark.parametrize("name", ["../evil", "a b", "", "a.b", "a\n"])
def test_a_split_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(SplitError, match="is no name of a split: use letters, digits, dashes and underscores"):
        import_split(tmp_path, name, "s.zarr", STORED, datalist(tmp_path), BRATS)
    assert not list(tmp_path.parent.rglob("evil*"))


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "x.csv", "is not there")):
        with pytest.raises(SplitError, match=rf"{path.name} {words}; name a datalist or a table"):
            take(tmp_path, path)


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["split", *arguments], env={"COLUMNS": "200"})
    return done.exit_code, done.output + str(done.exception or "")


def test_import_show_and_people_in_a_shell(tmp_path: Path) -> None:
    write_blobs(str(tmp_path / "store.zarr"), cases=4)
    lines = "".join(f"{k},{role}\n" for k, role in enumerate(("train", "train", "dev", "held out")))
    path = table(tmp_path, f"id,set\n{lines}")
    more = ("--dataset", "blobs", "--prefix", "sub-", "--word", "held out=test")
    code, text = run("import", str(path), "-w", str(tmp_path), *more)
    assert (code, "blobs: 2 train" in text, "blobs: 1 test" in text) == (0, True, True), text
    code, text = run("show", "-w", str(tmp_path))
    assert (code, "4 subjects of blobs from split.csv (SHA-256" in text) == (0, True), text
    assert f"no crosswalk in {tmp_path / 'crosswalks'}" in run("people", "-w", str(tmp_path))[1]
    (tmp_path / "crosswalks").mkdir()
    table(tmp_path / "crosswalks", "person,dataset,subject\na,blobs,sub-0\na,blobs,sub-1\nb,ixi,1\n", "who.csv")
    code, text = run("people", "-w", str(tmp_path))
    assert "who.csv: 2 persons, 1 with two ids or more in the store" in text
    assert "  who.csv: dataset 'ixi' is not in the store, which has: blobs" in text
    assert run("import", str(path), "-w", str(tmp_path), "--word", "x")[0] == 2
    code, text = run("show", "-w", str(tmp_path), "--name", "nope")
    assert (code, f"there is no split 'nope' in {tmp_path / 'splits'}; it has: default" in text) == (1, True), text
    assert "is no name of a split" in run("show", "-w", str(tmp_path), "--name", "../x")[1]
