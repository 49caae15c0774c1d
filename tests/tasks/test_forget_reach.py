from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import pytest
import torch
from store_builds import ingest, three_subjects

from models.distributed import World
from models.stage_room import list_copies
from models.staging import stage_store
from models.store import open_store
from models.store_layout import open_array
from tasks.forget import forget
from tasks.forget_reach import Person, erase_staged, other_copies
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
    assert done.person.cases == ("person-b",)
    assert len(done.person.digests) == 1
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
