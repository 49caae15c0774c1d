import pytest
from hypothesis import given
from hypothesis import strategies as st
from nifti_files import FIXED, SMALL

from infra import storage
from models.records import Scan
from models.store import StoreError
from tasks import plan as plans


def scan(case="s1", modality="t1", dataset="toy", etag="1", **more):
    return Scan(dataset=dataset, subject=case, case=case, modality=modality, path=f"/d/{case}_{modality}.nii.gz",
                size_bytes=1000, etag=etag, **more)  # fmt: skip


def wanted(*scans):
    return plans.cases_from_scans(scans)


def test_scans_become_cases_in_a_stable_order():
    scans = [scan("b", "t2"), scan("a"), scan("b", "t1"), scan("b", "label", label_scheme="brats"),
             scan("c", status="left out", reason="unreadable")]  # fmt: skip
    cases = wanted(*scans)
    assert [(case.case, [f.modality for f in case.files]) for case in cases] == [
        ("a", ["t1"]),
        ("b", ["label", "t1", "t2"]),
    ]
    assert cases[1].label_scheme == "brats"
    assert wanted(*scans[::-1]) == cases


def test_a_dataset_name_that_is_no_group_is_refused():
    with pytest.raises(StoreError, match=r"dataset name '\.\./x' cannot be a group"):
        wanted(scan(dataset="../x"))


def test_rows_are_appended_kept_and_never_reused():
    first = plans.plan_rows(wanted(scan("a"), scan("b")), [])
    assert [case.row for case in first.current] == [0, 1]
    changed = plans.plan_rows(wanted(scan("a"), scan("b", etag="2"), scan("c")), first.added)
    assert [(case.case, case.row) for case in changed.current] == [("a", 0), ("b", 2), ("c", 3)]
    assert [case.case for case in changed.added] == ["b", "c"]
    back = plans.plan_rows(wanted(scan("b")), [*first.added, *changed.added])
    assert [case.row for case in back.added] == [4]


def test_metadata_may_change_without_a_new_row():
    first = plans.plan_rows(wanted(scan("a")), [])
    again = plans.plan_rows(wanted(scan("a", split="test")), first.added)
    assert again.added == ()
    assert again.current[0].split == "test"


@given(st.lists(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("123")), max_size=5), max_size=6))
def test_a_row_has_one_owner_for_ever(rounds):
    known = []
    for chosen in rounds:
        latest = dict(chosen)
        rows = plans.plan_rows(wanted(*(scan(case, etag=tag) for case, tag in latest.items())), known)
        known += rows.added
        assert {case.case for case in rows.current} == set(latest)
    assert [case.row for case in known] == list(range(len(known)))


def test_plans_are_appended_and_read_in_order(tmp_path):
    url = str(tmp_path / "s.zarr")
    first = plans.plan_rows(wanted(scan("a")), [])
    assert plans.write_plan(url, first.added, "digest") == 1
    second = plans.plan_rows(wanted(scan("b")), plans.read_plans(url))
    assert plans.write_plan(url, second.added, "digest") == 2
    assert [(case.case, case.row) for case in plans.read_plans(url)] == [("a", 0), ("b", 1)]
    assert storage.read_json(storage.join(url, "_build", "plan-2.json"))["number"] == 2
    assert plans.rows_by_dataset(plans.read_plans(url)) == {"toy": 2}


def test_memory_is_projected_from_headers():
    small = scan("small", shape=(30, 28, 24), spacing_mm=(1.0, 1.0, 1.0))
    large = scan("large", shape=(2000, 2000, 2000), spacing_mm=(1.0, 1.0, 1.0))
    cases = {plans.key_of(s): [s] for s in (small, large)}
    sentence, refused = plans.memory_verdicts(cases, SMALL, 2 << 30)
    assert list(refused) == [("toy", "large")]
    assert "MiB per worker, the limit is 2048 MiB" in refused["toy", "large"]
    assert "most for toy/large; limit 2048 MiB; 1 of 2 cases refused" in sentence
    with pytest.raises(StoreError, match=r"memory refused: spec 'fixed' with grid .* needs \d+ MiB per worker, limit"):
        plans.memory_verdicts({}, FIXED, 100 << 20)


def test_spacing_counts_in_the_projection():
    thick = scan(shape=(256, 256, 30), spacing_mm=(1.0, 1.0, 6.0))
    thin = scan(shape=(256, 256, 30), spacing_mm=(1.0, 1.0, 1.0))
    assert plans.projected_bytes([thick], SMALL) > 3 * plans.projected_bytes([thin], SMALL)
