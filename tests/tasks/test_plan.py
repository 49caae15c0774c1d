import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nifti_files import FIXED, SMALL, blob, scan_of, write_nifti

from infra import storage
from models.records import Scan
from models.store import StoreError
from tasks import plan as plans
from tasks.headers import file_checksum


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
    first = plans.plan_rows(wanted(scan("a"), scan("b")), [], SMALL)
    assert [case.row for case in first.current] == [0, 1]
    changed = plans.plan_rows(wanted(scan("a"), scan("b", etag="2"), scan("c")), first.added, SMALL)
    assert [(case.case, case.row) for case in changed.current] == [("a", 0), ("b", 2), ("c", 3)]
    assert [case.case for case in changed.added] == ["b", "c"]
    back = plans.plan_rows(wanted(scan("b")), [*first.added, *changed.added], SMALL)
    assert [case.row for case in back.added] == [4]


def test_metadata_may_change_without_a_new_row():
    first = plans.plan_rows(wanted(scan("a")), [], SMALL)
    again = plans.plan_rows(wanted(scan("a", split="test")), first.added, SMALL)
    assert again.added == ()
    assert again.current[0].split == "test"


def test_only_what_the_spec_reads_decides_about_a_new_row():
    files = [scan("a"), scan("a", "label"), scan("a", "pd"), scan("a", "brain_mask")]
    first = plans.plan_rows(wanted(*files), [], SMALL)

    def again(changed, spec=SMALL):
        return plans.plan_rows(wanted(*changed), first.added, spec)

    assert again(files).news == ()
    # SMALL knows no pd and reads no brain mask: they may change, come and go.
    for others in ([], [files[2].replace(etag="2")], [*files[2:], scan("a", "bold")]):
        kept = again([*files[:2], *others])
        assert (kept.added, kept.renewed, kept.current[0].row) == ((), kept.current, 0)
    moved = again([file.replace(path=f"/elsewhere/{file.modality}") for file in files])
    assert (moved.added, moved.news) == ((), moved.current)
    assert moved.current[0].files[-1].path == "/elsewhere/t1"
    for changed in (
        [files[0].replace(etag="2"), *files[1:]],
        [files[0].replace(size_bytes=7), *files[1:]],
        [files[0], files[1].replace(etag="2"), *files[2:]],
        [files[0], *files[2:]],
        [*files, scan("a", "t2")],
    ):
        assert [case.row for case in again(changed).added] == [1]
    masked = SMALL.replace(brain_mask="file")
    assert [case.row for case in again([*files[:3], files[3].replace(etag="2")], masked).added] == [1]


def test_checksums_that_were_switched_on_later_change_nothing_if_the_file_is_as_it_was(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", blob())
    before = scan_of(path, "t1")
    first = plans.plan_rows(wanted(before), [], SMALL)
    checked = before.replace(etag=file_checksum(str(path)))
    on = plans.plan_rows(wanted(checked), first.added, SMALL)
    assert (on.added, on.renewed) == ((), on.current)
    # From then on contents decide: a file that was only touched is the same.
    os.utime(path)
    assert plans.plan_rows(wanted(checked), on.renewed, SMALL).news == ()
    # Touched before they were switched on, nothing says that it is; nor does anything once they are off.
    assert [case.row for case in plans.plan_rows(wanted(checked), first.added, SMALL).added] == [1]
    off = plans.plan_rows(wanted(scan_of(path, "t1")), on.renewed, SMALL)
    assert [case.row for case in off.added] == [1]
    path.unlink()
    assert [case.row for case in plans.plan_rows(wanted(checked), first.added, SMALL).added] == [1]


@given(st.lists(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("123")), max_size=5), max_size=6))
def test_a_row_has_one_owner_for_ever(rounds):
    known = []
    for chosen in rounds:
        latest = dict(chosen)
        rows = plans.plan_rows(wanted(*(scan(case, etag=tag) for case, tag in latest.items())), known, SMALL)
        known += rows.added
        assert {case.case for case in rows.current} == set(latest)
    assert [case.row for case in known] == list(range(len(known)))


def test_plans_are_appended_and_read_in_order(tmp_path):
    url = str(tmp_path / "s.zarr")
    first = plans.plan_rows(wanted(scan("a")), [], SMALL)
    assert plans.write_plan(url, first.added, "digest") == 1
    second = plans.plan_rows(wanted(scan("b")), plans.read_plans(url), SMALL)
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


def test_the_projection_counts_what_the_spec_reads():
    t1 = scan(shape=(200, 200, 200), spacing_mm=(1.0, 1.0, 1.0), dtype="int16")
    t2, pd, label, mask = (t1.replace(modality=name) for name in ("t2", "pd", "label", "brain_mask"))
    need = plans.projected_bytes
    alone = need([t1], SMALL)
    assert need([t1, pd, mask], SMALL) == alone  # SMALL has no pd, and reads no mask
    assert need([t1, label], SMALL) - alone == 8_000_000  # kept as uint8
    masked = SMALL.replace(brain_mask="file")
    assert need([t1, mask], masked) - need([t1], masked) == 8_000_000
    assert need([t1, t2], SMALL) - alone == 8_000_000 * (4 + 4 + 2)
    n4 = SMALL.replace(bias_correction="n4")
    assert need([t1], n4) > alone
    rigid = FIXED.replace(registration="rigid")
    assert need([t1], rigid) > need([t1], FIXED) + plans.EXTRA_BYTES
    assert need([], SMALL) == need([label], SMALL) == 0
