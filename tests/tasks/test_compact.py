import pytest
from nifti_files import write_case
from store_builds import ingest, scans_of, three_subjects

from infra import storage
from models.selection import SelectionError, check_selection
from models.store import open_store, store_digest
from tasks import compact as compacting
from tasks.compact import compact
from tasks.lease import Lease, LeaseError
from tasks.selection import select_cases
from tasks.verify import verify


def build(tmp_path, url):
    """Write a store whose case b was changed: row 1 is retired, row 3 is current; return the selection from before."""
    scans = three_subjects(tmp_path)
    ingest(url, scans)
    before = select_cases(open_store(url).cases())
    changed = scans_of(write_case(tmp_path, "b", seed=9, label=True), "b")
    ingest(url, [*changed, *(scan for scan in scans if scan.case != "b")])
    return before


@pytest.fixture
def url(store_url):
    return store_url


def rows(url):
    return {line["row"]: line["status"] for line in open_store(url).cases().to_pylist()}


def test_voxels_of_retired_rows_go_and_the_digest_stays(tmp_path, url):
    build(tmp_path, url)
    before = store_digest(url)
    assert rows(url) == {0: "stored", 1: "retired", 2: "stored", 3: "stored"}
    current = {row: open_store(url).dataset("toy").read_case(row)[0] for row in (0, 2, 3)}
    done = compact(url)
    assert done.rows == 1
    assert done.freed_bytes > 0
    assert done.digest == before == store_digest(url)
    assert rows(url) == {0: "stored", 1: "dropped", 2: "stored", 3: "stored"}
    assert storage.listdir(storage.join(url, "toy", "image", "c")) == ["0", "2", "3"]
    for row, image in current.items():
        assert (open_store(url).dataset("toy").read_case(row)[0] == image).all()
    assert verify(url, deep=True) == []
    assert compact(url) == compacting.Compacted(0, 0, before)


def test_selections_of_current_rows_stay_valid_and_older_ones_are_refused_by_name(tmp_path, url):
    old = build(tmp_path, url)
    current = select_cases(open_store(url).cases())
    with pytest.raises(SelectionError, match=r"toy/b \(row 1\): retired"):
        check_selection(old, open_store(url))
    compact(url)
    with pytest.raises(SelectionError, match=r"toy/b \(row 1\): dropped"):
        check_selection(old, open_store(url))
    check_selection(current, open_store(url))


@pytest.mark.parametrize("step", ["erase_case", "clear_rows", "publish"])
def test_killed_at_any_point_it_is_completed_by_running_it_again(tmp_path, url, monkeypatch, step):
    build(tmp_path, url)
    before = store_digest(url)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"models.store_writer.StoreWriter.{step}", killed)
        with pytest.raises(KeyboardInterrupt):
            compact(url)
    assert store_digest(url) == before
    compact(url)
    assert storage.listdir(storage.join(url, "_build", "receipts", "toy")) == [f"{row:08d}.json" for row in (0, 2, 3)]
    assert verify(url, deep=True) == []


def test_an_ingest_after_a_compact_continues_the_rows(tmp_path, url):
    build(tmp_path, url)
    compact(url)
    (case,) = ingest(url, scans_of(write_case(tmp_path, "d", 4), "d"))
    assert case.row == 4
    assert "retired" not in rows(url).values()
    assert verify(url, deep=True) == []


def test_a_store_that_is_written_is_not_compacted(tmp_path, url):
    build(tmp_path, url)
    with Lease(url, "nightly ingest"), pytest.raises(LeaseError, match="is being written by 'nightly ingest'"):
        compact(url)
