"""A workspace after a forget: every table, page, picture and prediction of the subject, and nothing of the others."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from models.records import SelectedCase
from models.selection import read_selection, write_selection
from tasks import forget_files
from tasks.folds import read_folds
from tasks.forget_files import erase, is_workspace, reach
from tasks.forget_reach import Person
from tasks.seen_prints import FILE
from tasks.splits import read_split, write_recorded, write_split

WHO = Person("toy", "person-b", ("person-b_2",), ("digest-b",))
CASES = [
    SelectedCase(
        dataset="toy", row=row, case=f"person-{x}_2", subject=f"person-{x}", digest=f"digest-{x}", role="train"
    )
    for row, x in enumerate("abc")
]


def write(path: Path, content: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def table(path: Path, /, **columns: list[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_parquet(path)


@pytest.fixture
def ws(tmp_path: Path) -> Path:
    """Return a workspace in which every kind of file names person-b, and a look-alike."""
    ws, subjects = tmp_path / "ws", [f"person-{x}" for x in "abc"]
    for name, role in (("pre", "train"), ("superseded/pre.0", "val"), ("late", "test")):
        (ws / "trainings" / name).mkdir(parents=True)
        lines = [case.replace(role=role, age=50.0, target="ill") for case in CASES]
        write_selection(ws / "trainings" / name / "selection.parquet", lines)
    late = ws / "trainings/late"
    table(
        late / "predictions/predictions.parquet",
        dataset=["toy"] * 3, case=[f"{s}_2" for s in subjects], file=["one.npz", "two.npz", "three.npz"],
    )  # fmt: skip
    for name in ("one", "two", "three", "person-b_2"):
        write(late / f"predictions/{name}.npz")
    write(ws / "trainings/pre/pictures/reconstruction.png")
    table(ws / f"trainings/pre/{FILE}", dataset=["toy"] * 3, subject=subjects, fingerprint=[[1], [2], [3]])
    write(ws / "trainings/pre/train.log", "reads person-a_2\nreads person-b_2\nreads person-b22\n")
    write_split(
        pd.DataFrame({"dataset": "toy", "subject": subjects, "split": ["train", "test", "train"]}),
        ws / "splits/default.parquet",
    )
    folds = pd.DataFrame({"dataset": "toy", "subject": subjects, "fold": [0, 1, 1]})
    write_recorded(folds, ws / "splits/f.folds.parquet", {"count": 2, "digest": "old", "subjects": {}})
    made = [str(ws / "converted/toy/k2/image.nii.gz"), str(ws / "descriptors/toy/d2.json")]
    for path in (*made, ws / "converted/toy/k1/image.nii.gz", ws / "converted/toy/index.parquet"):
        write(Path(path))
    table(
        ws / "catalog.parquet",
        dataset=["toy"] * 4, subject=["person-a", "person-b", "person-b", "person-c"],
        path=[str(ws / "converted/toy/k1/image.nii.gz"), *made, "/elsewhere/c.nii.gz"],
    )  # fmt: skip
    table(ws / "phenotypes.parquet", dataset=["toy", "ixi"], subject=["person-b"] * 2, age=[50, 60])
    table(ws / "scores.parquet", dataset=["toy"] * 2, case=["person-a_2", "person-b_2"], value=[0.1, 0.2])
    table(ws / "probes/scores.parquet", dataset=["toy"] * 2, subject=["person-b", "person-c"], value=[0.1, 0.2])
    table(ws / "embeddings/e.parquet", case_digest=["digest-a", "digest-b"], embedding=[[1.0], [2.0]])
    table(ws / "versions/pairs.parquet", dataset_a=["ixi"], subject_a=["x"], dataset_b=["toy"], subject_b=["person-b"])
    write(ws / "crosswalks/wide.csv", "toy_id,ixi_id\nperson-b,x\nperson-a,y\n")
    write(ws / "crosswalks/long.tsv", "person\tdataset\tsubject\np\ttoy\tperson-b\np\tixi\tx\n")
    write(ws / "tables/cases.csv", "case,dice\nperson-b_2,0.5\nperson-b2,0.6\n")
    write(ws / "report/index.html", "<p>worst: person-b_2</p>")
    write(ws / "report/methods.md", "nobody, not even person-b2")
    write(ws / "notes.md", "person-b was scanned twice")
    write(ws / "sources/toy/person-b/t1.nii.gz")
    write(ws / "sources/toy/participants.tsv", "participant_id\nperson-b\n")
    write(ws / "broken.parquet")
    return ws


def names(ws: Path, found: forget_files.Reached, action: str) -> set[str]:
    return {str(one.path.relative_to(ws)) for one in found.findings if one.action == action}


def test_everything_is_found_and_nothing_is_changed(ws: Path) -> None:
    before = {path: path.read_bytes() for path in ws.rglob("*") if path.is_file()}
    found = reach(ws, WHO)
    assert names(ws, found, "lines") == {
        "catalog.parquet", "phenotypes.parquet", "scores.parquet", "probes/scores.parquet", "embeddings/e.parquet",
        "versions/pairs.parquet", "crosswalks/wide.csv", "crosswalks/long.tsv", "tables/cases.csv",
        f"trainings/pre/{FILE}", "trainings/pre/train.log", "trainings/late/predictions/predictions.parquet",
        "splits/default.parquet",
        "splits/f.folds.parquet", *(str(p.relative_to(ws)) for p in (ws / "splits/versions").glob("*.parquet")),
    }  # fmt: skip
    assert names(ws, found, "names") == {
        f"trainings/{name}/selection.parquet" for name in ("pre", "superseded/pre.0", "late")
    }
    assert names(ws, found, "file") == {
        "converted/toy/k2", "converted/toy/index.parquet", "descriptors/toy/d2.json", "report/index.html",
        "trainings/late/predictions/person-b_2.npz", "trainings/pre/pictures/reconstruction.png",
    }  # fmt: skip
    assert names(ws, found, "left") == {"notes.md", "sources/toy/person-b/t1.nii.gz", "sources/toy/participants.tsv"}
    assert found.trained == ("pre", "superseded/pre.0")
    assert found.unread == (ws / "broken.parquet",)
    assert {path: path.read_bytes() for path in ws.rglob("*") if path.is_file()} == before


def left_names(ws: Path) -> set[str]:
    """Return the files that still hold the subject, but for those that are left on purpose."""
    return {str(one.path.relative_to(ws)) for one in reach(ws, WHO).findings if one.action != "left"}


def check_erased(ws: Path) -> None:
    assert left_names(ws) == set()
    assert reach(ws, WHO).trained == ("pre", "superseded/pre.0"), "who trained on it is still told"
    kept = read_selection(ws / "trainings/pre/selection.parquet")
    assert [(c.row, c.subject, c.age, c.target) for c in kept] == [
        (0, "person-a", 50.0, "ill"), (1, WHO.mark, None, ""), (2, "person-c", 50.0, "ill"),
    ]  # fmt: skip
    assert sorted(p.name for p in (ws / "trainings/late/predictions").iterdir()) == [
        "one.npz", "predictions.parquet", "three.npz",
    ]  # fmt: skip
    assert pd.read_parquet(ws / f"trainings/pre/{FILE}")["subject"].tolist() == ["person-a", "person-c"]
    assert read_split(ws / "splits/default.parquet")[0]["subject"].tolist() == ["person-a", "person-c"]
    assert json.loads((ws / "splits/default.json").read_text())["subjects"] == {"train": 2, "val": 0, "test": 0}
    assert read_folds(ws / "splits/f.folds.parquet")[1]["subjects"] == {"0": 1, "1": 1}
    assert pd.read_parquet(ws / "phenotypes.parquet")["dataset"].tolist() == ["ixi"]
    assert pd.read_parquet(ws / "embeddings/e.parquet")["case_digest"].tolist() == ["digest-a"]
    assert (ws / "crosswalks/wide.csv").read_text() == "toy_id,ixi_id\n,x\nperson-a,y\n"
    assert (ws / "crosswalks/long.tsv").read_text() == "person\tdataset\tsubject\np\tixi\tx\n"
    assert (ws / "tables/cases.csv").read_text() == "case,dice\nperson-b2,0.6\n"
    assert (ws / "trainings/pre/train.log").read_text() == "reads person-a_2\nreads person-b22\n"
    assert (ws / "converted/toy/k1/image.nii.gz").exists()
    assert not (ws / "converted/toy/k2").exists()
    assert (ws / "sources/toy/person-b/t1.nii.gz").exists()


def test_everything_is_erased_and_the_others_stay(ws: Path) -> None:
    erase(reach(ws, WHO), WHO)
    check_erased(ws)


@pytest.mark.parametrize("at", range(0, 26, 5))
def test_a_killed_erasure_is_completed_by_the_next(ws: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    count = 0

    def step(real: object) -> object:
        def done(*arguments: object) -> None:
            nonlocal count
            if count == at:
                raise KeyboardInterrupt
            count += 1
            real(*arguments)  # type: ignore[operator]

        return done

    with monkeypatch.context() as patch:
        for name in ("without_subject", "without_names", "_delete_predictions"):
            patch.setattr(forget_files, name, step(getattr(forget_files, name)))
        try:
            erase(reach(ws, WHO), WHO)
        except KeyboardInterrupt:
            assert left_names(ws)
    erase(reach(ws, WHO), WHO)
    check_erased(ws)


def test_a_short_id_is_looked_for_in_columns_only(tmp_path: Path) -> None:
    short = Person("toy", "b")
    assert not short.is_told_by_words
    write(tmp_path / "report/b.html", "b")
    table(tmp_path / "splits/s.parquet", dataset=["toy"], subject=["b"])
    write(tmp_path / "crosswalks/wide.csv", "toy_id,ixi_id\nb,x\n")
    assert names(tmp_path, reach(tmp_path, short), "lines") == {"splits/s.parquet", "crosswalks/wide.csv"}


def test_of_other_stores_the_table_is_read_and_left(tmp_path: Path) -> None:
    write(tmp_path / "other.zarr/zarr.json", '{"person-b": 1}')
    table(tmp_path / "other.zarr/cases.parquet", dataset=["toy"], subject=["person-b"], case=["x"])
    found = reach(tmp_path, WHO)
    assert names(tmp_path, found, "left") == {"other.zarr/cases.parquet"}
    assert reach(tmp_path, WHO, [tmp_path / "other.zarr"]).findings == ()


def test_metadata_of_tables_stay(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    table(path, dataset=["toy"], subject=["person-b"])
    kept = pq.read_table(path).replace_schema_metadata({"inputs": "x"})
    pq.write_table(kept, path)
    erase(reach(tmp_path, WHO), WHO)
    assert pq.read_schema(path).metadata[b"inputs"] == b"x"
    assert pq.read_table(path).num_rows == 0


def test_what_a_workspace_is(tmp_path: Path) -> None:
    assert not is_workspace(tmp_path)
    (tmp_path / "trainings").mkdir()
    assert is_workspace(tmp_path)
