"""What is left to do, told from plans, cases.parquet and receipts."""

import json
from pathlib import Path

import pytest
from nifti_files import SMALL, write_dataset

from flows.preprocess import _refuse, plan_work
from flows.preprocess_params import PreprocessParams, pending
from infra import storage
from models.store import create_or_open, open_store
from tasks import receipts, shards
from tasks.catalog import rows_digest, summarise
from tasks.phenotypes import combine
from tasks.preprocess import preprocess_batch
from tasks.verify import verify

PLAIN = PreprocessParams(catalog="not read", store="not read")


def unreadable(body):
    return body[:-30]


def newer(body):
    return json.dumps({**json.loads(body), "of_a_later_version": 1}).encode()


def of_another_spec(body):
    return json.dumps({**json.loads(body), "spec_digest": "other"}).encode()


@pytest.mark.parametrize("change", [unreadable, newer, of_another_spec])
def test_a_receipt_that_does_not_count_is_deleted_and_its_case_preprocessed_again(tmp_path, store_url, change):
    scans = write_dataset(tmp_path / "src", 3)
    writer = create_or_open(store_url, SMALL)
    first = plan_work(writer, scans, {}, PLAIN)
    preprocess_batch(store_url, [case.model_dump(mode="json") for case in first.todo[:2]], "killed")
    receipt = receipts.receipt_url(store_url, "toy", 1)
    storage.write_bytes(receipt, change(storage.read_bytes(receipt)))
    assert [case.row for case in pending(store_url, first.current, retry_quarantined=False)] == [1, 2]
    assert storage.exists(receipt)  # a dry run asks too and changes nothing

    second = plan_work(writer, scans, {}, PLAIN)
    assert [case.row for case in second.todo] == [1, 2]
    assert receipts.receipt_rows(store_url, ["toy"]) == {("toy", 0)}
    preprocess_batch(store_url, [case.model_dump(mode="json") for case in second.todo], "again")
    shards.finalise(store_url, second.current)
    assert open_store(store_url).dataset("toy").rows == [0, 1, 2]
    assert pending(store_url, second.current, retry_quarantined=False) == ()
    assert verify(store_url, deep=True) == []


def lose_image(url):
    storage.delete(f"{url}/toy/image/c/1")


def flip_bits(url):
    shard = f"{url}/toy/image/c/1/0/0/0/0"
    body = bytearray(storage.read_bytes(shard))
    body[40:60] = bytes(255 - byte for byte in body[40:60])
    storage.write_bytes(shard, bytes(body))


def lose_receipt(url):
    storage.delete(receipts.receipt_url(url, "toy", 1))


@pytest.mark.parametrize("damage", [lose_image, flip_bits, lose_receipt])
def test_repair_makes_damaged_rows_again_in_their_place(tmp_path, store_url, damage, caplog):
    scans = write_dataset(tmp_path / "src", 3)
    writer = create_or_open(store_url, SMALL)
    first = plan_work(writer, scans, {}, PLAIN.model_copy(update={"repair": True}))
    assert first.repaired == frozenset()  # of a new store
    preprocess_batch(store_url, [case.model_dump(mode="json") for case in first.todo], "first")
    digest = shards.finalise(store_url, first.current)
    damage(store_url)
    assert verify(store_url, deep=True) != []
    assert plan_work(writer, scans, {}, PLAIN).todo == ()

    others = [scan for scan in scans if scan.case != "s1"]
    assert plan_work(writer, others, {}, PLAIN.model_copy(update={"repair": True})).todo == ()
    assert "0 stored rows are damaged and are made again; 1 others are damaged too and not in the" in caplog.text
    again = plan_work(writer, scans, {}, PLAIN.model_copy(update={"repair": True}))
    assert [case.row for case in again.todo] == [1]
    assert caplog.messages[-1] == "1 stored rows are damaged and are made again"
    preprocess_batch(store_url, [case.model_dump(mode="json") for case in again.todo], "again")
    assert shards.finalise(store_url, again.current, again.repaired) == digest
    assert verify(store_url, deep=True) == []


def test_a_row_whose_source_is_broken_by_now_leaves_the_store_when_it_is_repaired(tmp_path, store_url):
    """Its voxels are lost: the table must not go on calling it stored."""
    scans = write_dataset(tmp_path / "src", 2)
    writer = create_or_open(store_url, SMALL)
    first = plan_work(writer, scans, {}, PLAIN)
    preprocess_batch(store_url, [case.model_dump(mode="json") for case in first.todo], "first")
    shards.finalise(store_url, first.current)
    lose_image(store_url)
    for scan in scans:
        if scan.case == "s1":
            path = Path(scan.path)
            path.write_bytes(path.read_bytes()[:-30])
    again = plan_work(writer, scans, {}, PLAIN.model_copy(update={"repair": True}))
    preprocess_batch(store_url, [case.model_dump(mode="json") for case in again.todo], "again")
    shards.finalise(store_url, again.current, again.repaired)
    assert {line["case"]: line["status"] for line in open_store(store_url).cases().to_pylist()} == {
        "s0": "stored",
        "s1": "quarantined",
    }
    assert verify(store_url, deep=True) == []


def test_a_finalise_that_was_killed_among_the_per_case_arrays_is_done_again(tmp_path, store_url):
    """`stored` is the first of them: it is then ahead of the others, whose chunks are not there."""
    writer = create_or_open(store_url, SMALL)
    work = plan_work(writer, write_dataset(tmp_path / "src", 2), {}, PLAIN)
    preprocess_batch(store_url, [case.model_dump(mode="json") for case in work.todo], "killed")
    writer.mark_stored("toy", [0, 1])
    shards.finalise(store_url, work.current)
    assert verify(store_url, deep=True) == []


def test_a_plan_names_the_catalog_that_it_was_made_from(tmp_path):
    scans = write_dataset(tmp_path / "src", 2)
    catalog = [*scans, scans[0].replace(dataset="other", status="left out", reason="constant image")]
    url = str(tmp_path / "s.zarr")
    plan_work(create_or_open(url, SMALL), scans, {}, PLAIN, catalog)
    plan = storage.read_json(f"{url}/_build/plan-1.json")
    assert plan["catalog_digest"] == rows_digest(catalog) != rows_digest(scans)
    assert summarise(catalog, combine([]))["rows_digest"] == plan["catalog_digest"]
    assert plan["spec_digest"] == SMALL.content_digest()


def test_a_case_during_which_flow_after_flow_died_is_set_aside_until_it_is_asked_for_again(tmp_path, store_url):
    scans = write_dataset(tmp_path / "src", 2)
    writer = create_or_open(store_url, SMALL)
    work = plan_work(writer, scans, {}, PLAIN)
    bad, _ = work.todo
    for number in range(receipts.MAX_INTERRUPTED):
        assert [case.row for case in _refuse(writer, work)] == [0, 1], f"after {number} dead flows"
        assert receipts.claim_attempt(store_url, f"flow-{number}", bad)
    assert [case.row for case in _refuse(writer, work)] == [1]
    receipt = receipts.read_receipt(store_url, bad, SMALL.content_digest())
    assert (receipt.status, receipt.reason) == ("quarantined", "killed the worker")
    assert receipt.detail == "8 flow runs died while it was being preprocessed"

    # The flow that sees it through forgets the attempts: who tries the quarantine again gives the case a new chance.
    preprocess_batch(store_url, [work.todo[1].model_dump(mode="json")], "through")
    shards.finalise(store_url, work.current)
    receipts.clear_attempts(store_url)
    assert plan_work(writer, scans, {}, PLAIN).todo == ()
    again = plan_work(writer, scans, {}, PLAIN.model_copy(update={"retry_quarantined": True}))
    assert [case.row for case in _refuse(writer, again)] == [0]
    preprocess_batch(store_url, [bad.model_dump(mode="json")], "again")
    shards.finalise(store_url, again.current)
    assert open_store(store_url).dataset("toy").rows == [0, 1]
