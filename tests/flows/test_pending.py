"""What is left to do, told from plans, cases.parquet and receipts."""

import json

import pytest
from nifti_files import SMALL, write_dataset

from flows.preprocess import plan_work
from flows.preprocess_params import pending
from infra import storage
from models.store import create_or_open, open_store
from tasks import receipts, shards
from tasks.preprocess import preprocess_batch
from tasks.verify import verify


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
    first = plan_work(writer, scans, {}, retry_quarantined=False)
    preprocess_batch(store_url, [case.model_dump(mode="json") for case in first.todo[:2]], "killed")
    receipt = receipts.receipt_url(store_url, "toy", 1)
    storage.write_bytes(receipt, change(storage.read_bytes(receipt)))
    assert [case.row for case in pending(store_url, first.current, retry_quarantined=False)] == [1, 2]
    assert storage.exists(receipt)  # a dry run asks too and changes nothing

    second = plan_work(writer, scans, {}, retry_quarantined=False)
    assert [case.row for case in second.todo] == [1, 2]
    assert receipts.receipt_rows(store_url, ["toy"]) == {("toy", 0)}
    preprocess_batch(store_url, [case.model_dump(mode="json") for case in second.todo], "again")
    shards.finalise(store_url, second.current)
    assert open_store(store_url).dataset("toy").rows == [0, 1, 2]
    assert pending(store_url, second.current, retry_quarantined=False) == ()
    assert verify(store_url, deep=True) == []
