import json
import shutil

import numpy as np
import pytest
from nifti_files import SMALL, blob, planned, write_case, write_nifti
from store_builds import ingest, scans_of

from flows.preprocess_params import pending
from infra import storage
from models.selection import SelectionError, check_selection
from models.store import create_or_open, open_store, store_digest
from tasks import plan as plans
from tasks import receipts, shards
from tasks.compact import compact
from tasks.headers import file_checksum
from tasks.preprocess import preprocess_batch
from tasks.selection import select_cases
from tasks.verify import verify


@pytest.fixture
def url(store_url):
    return store_url


def test_a_changed_case_gets_a_new_row_and_the_old_one_is_retired(tmp_path, url):
    a, b = write_case(tmp_path, "a", 1), write_case(tmp_path, "b", 2)
    ingest(url, [*scans_of(a, "a"), *scans_of(b, "b")])
    before = store_digest(url)
    write_nifti(b["t1"], blob(seed=9))
    (now_a, now_b) = ingest(url, [*scans_of(a, "a"), *scans_of(b, "b")])
    assert (now_a.row, now_b.row) == (0, 2)
    table = open_store(url).cases().to_pylist()
    assert [(line["case"], line["row"], line["status"]) for line in table] == [
        ("a", 0, "stored"),
        ("b", 1, "retired"),
        ("b", 2, "stored"),
    ]
    data = open_store(url).dataset("toy")
    assert data.rows == [0, 2]
    with pytest.raises(RuntimeError, match="row 1 of toy cannot be read: it is retired"):
        data.read_case(1)
    assert store_digest(url) != before
    assert verify(url, deep=True) == []


def test_moved_files_and_files_that_the_spec_ignores_keep_the_row(tmp_path, url):
    """The table says where the files are now; with checksums switched on later they are still the same files."""
    files = write_case(tmp_path / "one", "a")
    ingest(url, scans_of(files, "a"))
    digest = store_digest(url)
    shutil.move(tmp_path / "one", tmp_path / "two")
    moved = {modality: tmp_path / "two" / path.name for modality, path in files.items()}
    moved["pd"] = write_nifti(tmp_path / "two/a_pd.nii.gz", blob(seed=5))
    for scans in (scans_of(moved, "a"), [s.replace(etag=file_checksum(s.path)) for s in scans_of(moved, "a")]):
        rows = plans.plan_rows(plans.cases_from_scans(scans), plans.read_plans(url), SMALL)
        plans.write_plan(url, rows.news, SMALL.content_digest())
        (case,) = rows.current
        assert case.row == 0
        assert pending(url, rows.current, retry_quarantined=False) == ()
        shards.finalise(url, rows.current)
        (line,) = open_store(url).cases().to_pylist()
        wanted = {scan.modality: {"path": scan.path, "etag": scan.etag} for scan in scans}
        assert {f["modality"]: {"path": f["path"], "etag": f["etag"]} for f in json.loads(line["files"])} == wanted
        assert (line["status"], store_digest(url)) == ("stored", digest)
        assert plans.read_plans(url) == [case]
    assert plans.plan_numbers(url) == [1, 2, 3]
    assert verify(url, deep=True) == []
    compact(url)
    assert open_store(url).dataset("toy").rows == [0]


def test_a_corrected_split_changes_the_table_and_no_voxel(tmp_path, url):
    files = write_case(tmp_path, "a")
    ingest(url, scans_of(files, "a"))
    digest = store_digest(url)
    (case,) = ingest(url, scans_of(files, "a", split="test"))
    assert case.row == 0
    assert open_store(url).cases().column("split").to_pylist() == ["test"]
    assert store_digest(url) == digest


def test_finalise_twice_writes_nothing(tmp_path, url, monkeypatch):
    current = ingest(url, scans_of(write_case(tmp_path, "a"), "a"))
    monkeypatch.setattr(storage, "write_bytes", stopped)
    monkeypatch.setattr(shards.StoreWriter, "mark_stored", stopped)
    assert shards.finalise(url, current) == store_digest(url)


def test_rows_without_receipt_stay_invisible(tmp_path, url):
    files = write_case(tmp_path, "a")
    current = ingest(url, scans_of(files, "a"))
    late = planned(write_case(tmp_path, "b", 2), row=1, subject="b")
    plans.write_plan(url, [late], SMALL.content_digest())
    create_or_open(url, SMALL).grow("toy", 2, False)
    digest = shards.finalise(url, [*current, late])
    assert open_store(url).dataset("toy").rows == [0]
    assert digest == store_digest(url)


def test_quarantine_is_data(tmp_path, url):
    files = write_case(tmp_path, "a")
    files["t1"].write_bytes(files["t1"].read_bytes()[:400])
    ingest(url, scans_of(files, "a"))
    (line,) = open_store(url).cases().to_pylist()
    assert (line["status"], line["reason"], line["digest"]) == ("quarantined", "unreadable", "")
    assert line["detail"].startswith("a_t1.nii.gz")
    assert json.loads(line["files"])[0]["modality"] == "t1"
    assert verify(url, deep=True) == []


def test_row_order_does_not_change_the_digest(tmp_path, url):
    a, b = scans_of(write_case(tmp_path, "a", 1), "a"), scans_of(write_case(tmp_path, "b", 2), "b")
    ingest(url, a)
    ingest(url, [*a, *b])
    other = str(tmp_path / "o.zarr")
    ingest(other, b)
    ingest(other, [*a, *b])
    assert store_digest(other) == store_digest(url)


def test_a_growing_store_does_not_disturb_the_selection_of_a_training(tmp_path, url):
    a, b = scans_of(write_case(tmp_path, "a", 1), "a"), scans_of(write_case(tmp_path, "b", 2), "b")
    ingest(url, a)
    selected = select_cases(open_store(url).cases())
    ingest(url, [*a, *b])
    check_selection(selected, open_store(url))
    changed = scans_of(write_case(tmp_path, "a", 5), "a")
    ingest(url, [*changed, *b])
    with pytest.raises(SelectionError, match=r"1 of 1 selected cases .*: toy/a \(row 0\): retired"):
        check_selection(selected, open_store(url))


@pytest.mark.parametrize("step", ["_write_small", "_mark_stored", "search_duplicates"])
def test_a_killed_finalise_is_repeated(tmp_path, url, monkeypatch, step):
    a, b = scans_of(write_case(tmp_path, "a", 1), "a"), scans_of(write_case(tmp_path, "b", 2), "b")
    ingest(url, a)
    with monkeypatch.context() as patch:
        patch.setattr(shards, step, stopped)
        with pytest.raises(KeyboardInterrupt):
            ingest(url, [*a, *b])
    ingest(url, [*a, *b])
    assert open_store(url).dataset("toy").rows == [0, 1]
    assert verify(url, deep=True) == []


def test_a_kill_between_the_table_and_the_finalised_attribute_is_noticed_and_repaired(tmp_path, url, monkeypatch):
    a, b = scans_of(write_case(tmp_path, "a", 1), "a"), scans_of(write_case(tmp_path, "b", 2), "b")
    ingest(url, a)
    with monkeypatch.context() as patch:
        patch.setattr("models.store_writer._write_attributes", stopped)
        with pytest.raises(KeyboardInterrupt):
            ingest(url, [*a, *b])
    (problem,) = verify(url)
    assert problem.startswith("store digest: it is ")
    ingest(url, [*a, *b])
    assert verify(url, deep=True) == []


def stopped(*_, **__):
    raise KeyboardInterrupt


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    url = str(tmp_path / "s.zarr")
    ingest(url, scans_of(write_case(tmp_path, "a"), "a"))
    for name in ("toy/image/c/0/x.partial", "_build/.plan-9.json.abc.tmp"):
        (tmp_path / "s.zarr" / name).write_bytes(b"half")
    assert shards.clean_partials(url) == 2
    assert shards.clean_partials(url) == 0
    assert verify(url, deep=True) == []


def test_attempts_are_counted_by_lease_and_cleared(tmp_path, url):
    case = planned(write_case(tmp_path, "a"))
    assert [receipts.claim_attempt(url, "one", case) for _ in range(3)] == [True, True, False]
    assert receipts.claim_attempt(url, "two", case)
    assert receipts.claim_attempt(url, receipts.attempt_token("two", 1), case)  # the storage was away in between
    assert receipts.interrupted(url) == {("toy", 0): 2}
    receipts.clear_attempts(url)
    assert not receipts.interrupted(url)
    assert not storage.exists(storage.join(url, "_build", "attempts"))


@pytest.mark.full
def test_the_same_store_comes_out_on_s3(tmp_path, s3_url):
    a, b = scans_of(write_case(tmp_path, "a", 1), "a"), scans_of(write_case(tmp_path, "b", 2), "b")
    here, there = str(tmp_path / "s.zarr"), storage.join(s3_url, "s.zarr")
    for store in (here, there):
        ingest(store, a)
        ingest(store, [*a, *b])
    assert store_digest(there) == store_digest(here)


def statuses(url):
    return [line["status"] for line in open_store(url).cases().to_pylist()]


def test_a_changed_source_that_is_broken_leaves_the_older_row_stored(tmp_path, url):
    files = write_case(tmp_path, "a", 1)
    ingest(url, scans_of(files, "a", split="training"))
    before, digest = open_store(url).dataset("toy").read_case(0)[0], store_digest(url)
    for end in (400, 300):
        files["t1"].write_bytes(files["t1"].read_bytes()[:end])
        ingest(url, scans_of(files, "a", split="test"))
    assert statuses(url) == ["stored", "retired", "quarantined"]
    # What the catalog corrects holds for the row that readers see.
    assert open_store(url).cases().column("split").to_pylist()[0] == "test"
    assert compact(url).digest == digest
    np.testing.assert_array_equal(open_store(url).dataset("toy").read_case(0)[0], before)
    assert verify(url, deep=True) == []
    write_nifti(files["t1"], blob(seed=9))
    ingest(url, scans_of(files, "a"))
    assert statuses(url) == ["retired", "dropped", "retired", "stored"]
    assert verify(url, deep=True) == []


def test_a_corrected_label_scheme_is_checked_against_the_stored_labels(tmp_path, url, monkeypatch):
    files = write_case(tmp_path, "a", label=True)
    mask = np.zeros((30, 28, 24), np.uint8)
    mask[10:14, 10:15, 8:12] = 4
    write_nifti(files["label"], mask)

    def scans(scheme):
        return [scan.replace(label_scheme=scheme) for scan in scans_of(files, "a")]

    ingest(url, scans("brats2021"))
    assert statuses(url) == ["stored"]
    with monkeypatch.context() as patch:
        patch.setattr(receipts, "write_receipt", stopped)
        with pytest.raises(KeyboardInterrupt):
            ingest(url, scans("brats2023"))
    current = ingest(url, scans("brats2023"))
    (line,) = open_store(url).cases().to_pylist()
    assert (line["status"], line["reason"], line["label_scheme"]) == ("quarantined", "label values", "brats2023")
    assert line["detail"].startswith(
        "a_seg.nii.gz: label values [4] are outside scheme 'brats2023', which knows [0, 1, 2, 3] only"
    )
    assert open_store(url).dataset("toy").rows == []
    assert verify(url, deep=True) == []
    with monkeypatch.context() as patch:
        patch.setattr(shards.StoreWriter, "publish", stopped)
        shards.finalise(url, current)
    # Corrected once more, with `retry_quarantined`.
    receipts.delete_receipt(url, current[0])
    again = [case.replace(label_scheme="brats2021") for case in current]
    preprocess_batch(url, [case.model_dump(mode="json") for case in again], "retry")
    shards.finalise(url, again)
    assert statuses(url) == ["stored"]
    assert verify(url, deep=True) == []
