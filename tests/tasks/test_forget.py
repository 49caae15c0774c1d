import numpy as np
import pytest
import zarr
from nifti_files import write_case
from store_builds import ingest, scans_of, texts_of, three_subjects

from infra import storage
from models.selection import SelectionError, check_selection
from models.store import StoreError, open_store, store_digest
from tasks import forget as forgetting
from tasks import plan as plans
from tasks import receipts
from tasks.compact import compact
from tasks.forget import forget, lift, tombstones, without_forgotten
from tasks.lease import Lease, LeaseError
from tasks.preprocess import preprocess_batch, preprocess_case
from tasks.selection import select_cases
from tasks.verify import verify


@pytest.fixture
def scans(tmp_path):
    return [
        scan.replace(subject=f"person-{scan.subject}", case=f"person-{scan.case}") for scan in three_subjects(tmp_path)
    ]


@pytest.fixture
def url(store_url, scans):
    ingest(store_url, scans)
    return store_url


def statuses(url):
    return [(line["row"], line["case"], line["status"]) for line in open_store(url).cases().to_pylist()]


def test_nothing_of_a_forgotten_subject_remains_and_the_others_are_untouched(url):
    kept = open_store(url).dataset("toy").read_case(0)[0]
    receipts.claim_attempt(url, "old-lease", plans.read_plans(url)[1])
    assert "person-b" in texts_of(url)
    done = forget(url, "toy", "person-b")
    assert done.rows == (1,)
    assert done.digest == store_digest(url)
    assert "person-b" not in texts_of(url)
    for name in ("image", "label"):
        assert not storage.exists(storage.join(url, "toy", name, "c", "1"))
    assert statuses(url) == [(0, "person-a", "stored"), (1, "", "forgotten"), (2, "person-c", "stored")]
    array = zarr.open_group(storage.zarr_store(url), mode="r")["toy"]
    assert array["case"][:].tolist() == ["person-a", "", "person-c"]
    assert array["stored"][:].tolist() == [True, False, True]
    assert not np.asarray(array["source_affine"][1]).any()
    np.testing.assert_array_equal(open_store(url).dataset("toy").read_case(0)[0], kept)
    assert verify(url, deep=True) == []


def test_a_later_ingest_does_not_bring_it_back_until_the_tombstone_is_lifted(url, scans):
    forget(url, "toy", "person-b")
    allowed, refused = without_forgotten(url, scans)
    assert refused == [("toy", "person-b")]
    assert {scan.subject for scan in allowed} == {"person-a", "person-c"}
    ingest(url, scans)
    assert statuses(url)[1] == (1, "", "forgotten")
    assert len(statuses(url)) == 3
    lift(url, "toy", "person-b")
    ingest(url, scans)
    assert statuses(url)[1:] == [(1, "", "forgotten"), (2, "person-c", "stored"), (3, "person-b", "stored")]
    assert verify(url, deep=True) == []


def test_trainings_that_used_it_refuse_by_name(url):
    store = open_store(url)
    selected = select_cases(store.cases())
    check_selection(selected, store)
    forget(url, "toy", "person-b")
    with pytest.raises(SelectionError, match=r"1 of 3 selected cases .*: toy/person-b \(row 1\): forgotten"):
        check_selection(selected, open_store(url))
    check_selection([case for case in selected if case.row != 1], open_store(url))


STEPS = (
    (forgetting.shards, "rewrite"),
    (forgetting.receipts, "clear_attempts_of"),
    (forgetting.duplicates, "remove_subject"),
    (forgetting, "_redact_plans"),
    (forgetting.plans, "rewrite_plan"),
)


@pytest.mark.parametrize(("module", "step"), STEPS, ids=[step for _, step in STEPS])
def test_a_killed_forget_is_completed_by_running_it_again(url, scans, monkeypatch, module, step):
    expected = {"person-a", "person-c"}

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, step, killed)
        with pytest.raises(KeyboardInterrupt):
            forget(url, "toy", "person-b")
    assert [stone.done for stone in tombstones(url)] == [False]
    with pytest.raises(StoreError, match="'person-b' of 'toy' is only half forgotten; run `store forget` again"):
        lift(url, "toy", "person-b")
    # A nightly ingest in between neither folds its receipt nor preprocesses it.
    ingest(url, scans)
    assert "toy rows 1: forgetting was interrupted; run `store forget` again" in verify(url)
    forget(url, "toy", "person-b")
    assert "person-b" not in texts_of(url)
    assert {case for _, case, status in statuses(url) if status == "stored"} == expected
    assert verify(url, deep=True) == []
    assert forget(url, "toy", "person-b").rows == (1,)


def test_all_rows_of_a_subject_go_retired_and_quarantined_ones_too(tmp_path, url, scans):
    changed = write_case(tmp_path, "b", seed=7)
    later = [s for s in scans if s.subject != "person-b"]
    more = [s.replace(subject="person-b", case="person-b_2") for s in scans_of(changed, "b")]
    changed["t2"].write_bytes(b"broken")
    bad = [s.replace(subject="person-b", case="person-b_3") for s in scans_of({"t2": changed["t2"]}, "b")]
    ingest(url, [*later, *bad, *[m.replace(case="person-b") for m in more[:1]]])
    assert [status for *_, status in statuses(url)] == ["stored", "retired", "stored", "stored", "quarantined"]
    assert forget(url, "toy", "person-b").rows == (1, 3, 4)
    assert "person-b" not in texts_of(url)
    assert verify(url, deep=True) == []


def test_what_cannot_be_forgotten_is_refused(url):
    with pytest.raises(StoreError, match=r"holds no subject 'nobody' of dataset 'toy'; name it as DATASET/SUBJECT"):
        forget(url, "toy", "nobody")
    with pytest.raises(StoreError, match="subject 'person-a' of 'toy' was never forgotten"):
        lift(url, "toy", "person-a")
    with pytest.raises(StoreError, match="nothing is not a store: it has no zarr"):
        lift(f"{url}-nothing", "toy", "person-a")
    with Lease(url, "nightly ingest"), pytest.raises(LeaseError, match="is being written by 'nightly ingest'"):
        forget(url, "toy", "person-a")
    assert statuses(url)[0] == (0, "person-a", "stored")


def batch_of(url):
    return [case.model_dump(mode="json") for case in plans.read_plans(url)]


def test_a_worker_that_outlives_its_flow_brings_nothing_back(url):
    old = batch_of(url)
    forget(url, "toy", "person-b")
    assert [line["case"] for line in preprocess_batch(url, old, "old")] == ["person-a", "person-c"]
    assert "person-b" not in texts_of(url)
    assert verify(url, deep=True) == []


def test_a_case_that_is_forgotten_while_it_is_preprocessed_is_erased_again(url, monkeypatch):
    old = batch_of(url)
    receipts.delete_receipt(url, plans.read_plans(url)[1])

    def slow(planned, *rest):
        receipt = preprocess_case(planned, *rest)
        forget(url, "toy", "person-b")
        return preprocess_case(planned, *rest) and receipt

    monkeypatch.setattr("tasks.preprocess.preprocess_case", slow)
    preprocess_batch(url, old, "old")
    assert "person-b" not in texts_of(url)
    assert verify(url, deep=True) == []


def test_receipts_of_rows_that_are_gone_are_found_and_compact_erases_them(url):
    case = plans.read_plans(url)[1]
    receipt = receipts.read_receipt(url, case, open_store(url).spec.content_digest())
    forget(url, "toy", "person-b")
    receipts.write_receipt(url, receipt)
    assert verify(url) == [
        "toy/- (row 1): receipt: it is still there although the row is forgotten; run `brainloom store compact`"
    ]
    compact(url)
    assert "person-b" not in texts_of(url)
    assert verify(url) == []


def test_a_kill_elsewhere_is_completed_with_the_names_that_the_store_no_longer_has(url):
    def killed(done):
        assert "person-b" not in texts_of(url).replace(storage.read_bytes(stone_of(url)).decode(), "")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forget(url, "toy", "person-b", killed)
    assert verify(url) == ["toy rows 1: forgetting was interrupted; run `store forget` again"]
    told = []
    forget(url, "toy", "person-b", told.append)
    assert told[0].person.cases == ("person-b",)
    assert len(told[0].person.digests) == 1
    assert "person-b" not in texts_of(url)


def stone_of(url):
    (name,) = storage.listdir(f"{url}/_build/forgotten")
    return f"{url}/_build/forgotten/{name}"
