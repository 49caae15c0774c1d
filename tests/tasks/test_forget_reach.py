from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import pytest
import torch
from store_builds import ingest, three_subjects

from models.distributed import World
from models.selection import write_selection
from models.stage_room import list_copies
from models.staging import stage_store
from models.store import open_store
from models.store_layout import open_array
from tasks.forget import forget
from tasks.forget_reach import Person, erase_staged, is_workspace, other_copies, reach
from tasks.selection import select_cases

WHO = Person("toy", "person-b", ("person-b_2",))


@pytest.fixture
def url(tmp_path):
    store = str(tmp_path / "ws" / "s.zarr")
    scans = three_subjects(tmp_path / "sources")
    ingest(store, [s.replace(subject=f"person-{s.subject}", case=f"person-{s.case}") for s in scans])
    return store


def stage(url, folder):
    store = open_store(url)
    with ExitStack() as held:
        cases = select_cases(store.cases())
        staged = stage_store(store, cases, folder, 1.0, World(0, 1, torch.device("cpu")), lambda: False, held, "t")
    return Path(staged.url)


def names_in(copy):
    """Return the names in the two places of a copy that have any."""
    table = pd.read_parquet(copy / "cases.parquet")
    return set(table["subject"]) | set(table["case"]) | set(open_array(str(copy), "toy/case")[:].tolist())


def test_staged_copies_go_with_their_receipts_and_names(url, tmp_path):
    copy, elsewhere = stage(url, tmp_path / "stage"), stage(url, tmp_path / "other")
    assert "person-b" in names_in(copy)
    done = forget(url, "toy", "person-b")
    assert done.cases == ("person-b",)
    assert erase_staged(tmp_path / "stage", url, "toy", done.rows) == ([copy], [copy])
    assert names_in(copy) == {"person-a", "", "person-c"}
    assert sorted(list_copies(tmp_path / "stage")[0]) == [f"{copy.name}/toy/0", f"{copy.name}/toy/2"]
    assert open_store(str(copy)).dataset("toy").rows == [0, 2]
    assert erase_staged(tmp_path / "stage", url, "toy", done.rows) == ([], [copy])
    assert erase_staged(tmp_path / "nothing", url, "toy", done.rows) == ([], [])
    assert "person-b" in names_in(elsewhere)


def test_a_copy_under_another_url_is_named_and_left(url, tmp_path):
    link = tmp_path / "link.zarr"
    link.symlink_to(url)
    copy = stage(str(link), tmp_path / "stage")
    done = forget(url, "toy", "person-b")
    assert erase_staged(tmp_path / "stage", url, "toy", done.rows) == ([], [])
    assert other_copies(tmp_path / "stage", [], WHO) == [copy]
    assert other_copies(tmp_path / "stage", [copy], WHO) == []
    assert other_copies(tmp_path / "stage", [], Person("toy", "nobody")) == []


def write(path, content="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_files_of_a_workspace_that_name_it_are_found_and_nothing_is_changed(url):
    ws = Path(url).parent
    selected = select_cases(open_store(url).cases())
    for name, role in (("pre", "train"), ("superseded/pre.0", "val"), ("late", "test")):
        (ws / "trainings" / name).mkdir(parents=True)
        write_selection(ws / "trainings" / name / "selection.parquet", [c.replace(role=role) for c in selected])
    for name in ("report/index.html", "scores/x.csv", "a/notes.md"):
        write(ws / name, "of person-b_2, seen")
    write(ws / "trainings/late/predictions/person-b.npz")
    for name in ("person-bb.txt", "report/other.html", "trainings/late/predictions/person-c.npz"):
        write(ws / name, "person-b2 superperson-b")
    pd.DataFrame({"dataset": ["toy"], "subject": ["person-b"], "age": [50]}).to_parquet(ws / "phenotypes.parquet")
    pd.DataFrame({"dataset": ["ixi"], "subject": ["person-b"]}).to_parquet(ws / "ixi.parquet")
    pd.DataFrame({"case": ["person-b_2"], "x": [1]}).to_parquet(ws / "cases.parquet")
    pd.DataFrame({"x": [1]}).to_parquet(ws / "numbers.parquet")
    write(ws / "broken.parquet")
    before = {path: path.read_bytes() for path in ws.rglob("*") if path.is_file()}
    found = reach(ws, WHO, [Path(url)])
    assert {str(path.relative_to(ws)) for path in found.files} == {
        "a/notes.md", "cases.parquet", "phenotypes.parquet", "report/index.html", "scores/x.csv",
        "trainings/late/predictions/person-b.npz", "trainings/late/selection.parquet",
        "trainings/pre/selection.parquet", "trainings/superseded/pre.0/selection.parquet",
    }  # fmt: skip
    assert found.trained == ("pre", "superseded/pre.0")
    assert found.unread == (ws / "broken.parquet",)
    assert {path: path.read_bytes() for path in ws.rglob("*") if path.is_file()} == before


def test_of_other_stores_the_table_is_read_and_short_ids_are_looked_for_in_tables_only(url, tmp_path):
    assert reach(tmp_path / "ws", WHO).files == (Path(url) / "cases.parquet",)
    write(tmp_path / "ws" / "b.txt", "b")
    short = Person("toy", "b")
    assert short.names == ()
    assert reach(tmp_path / "ws", short).files == ()
    pd.DataFrame({"dataset": ["toy"], "subject": ["b"]}).to_parquet(tmp_path / "ws" / "split.parquet")
    assert reach(tmp_path / "ws", short).files == (tmp_path / "ws" / "split.parquet",)


def test_what_a_workspace_is(tmp_path):
    assert not is_workspace(tmp_path)
    (tmp_path / "trainings").mkdir()
    assert is_workspace(tmp_path)
