"""Copies of phantom subjects are found; different phantom subjects are not (48 of them in the full tests)."""

import numpy as np
import pyarrow as pa
import pytest
from scipy import ndimage
from store_builds import ingest, three_subjects

from models.spec import PreprocessSpec
from models.store import open_store
from tasks import duplicates
from tasks.duplicates import THRESHOLD, find_duplicates, linked_to, links, passed_over, read_duplicates, remove_subject
from tasks.fingerprint import EDGE, fingerprint
from tasks.phantom import PhantomConfig
from tasks.phantom.layout import bids_place, datalist_place
from tasks.phantom.subject import draw_subject_traits, make_subject
from tasks.splits import SplitError, make_split

CONFIG = PhantomConfig(
    seed=11, bids_subjects=24, datalist_subjects=24, spacing_mm=4.0, modalities=("t1",), missing_share=0
)


def copied(volume, affine, rng):
    """Return a scan moved and turned by up to 3 mm and 3 degrees, on another grid, re-scaled and re-masked."""
    shape = np.array([80, 96, 80])
    grid = np.diag([2.5, 2.5, 2.5, 1.0])
    centre = affine[:3, :3] @ np.array(ndimage.center_of_mass(volume > 0)) + affine[:3, 3]
    grid[:3, 3] = centre - 2.5 * (shape - 1) / 2
    angles = np.deg2rad(rng.uniform(-3, 3, 3))
    turn = np.array([[1, -angles[2], angles[1]], [angles[2], 1, -angles[0]], [-angles[1], angles[0], 1]])
    move = np.eye(4)
    move[:3, :3] = np.linalg.svd(turn)[0] @ np.linalg.svd(turn)[2]
    move[:3, 3] = centre - move[:3, :3] @ centre + rng.uniform(-3, 3, 3)
    voxels = np.linalg.inv(affine) @ move @ grid
    out = ndimage.affine_transform(volume, voxels[:3, :3], voxels[:3, 3], output_shape=tuple(shape), order=1)
    mask = ndimage.affine_transform(
        (volume > 0).astype(np.float32), voxels[:3, :3], voxels[:3, 3], output_shape=tuple(shape), order=1
    )
    tissue = ndimage.binary_erosion(mask > 0.5)
    scaled = (out / out.max()) ** rng.uniform(0.8, 1.25)
    return np.where(tissue, 0.02 + 0.9 * scaled, 0).astype(np.float32), grid


def line(dataset, subject, print_, modalities=("t1",), status="stored"):
    return {
        "dataset": dataset,
        "subject": subject,
        "case": subject,
        "status": status,
        "modalities": list(modalities),
        "fingerprint": list(print_),
    }


def make_cohort(subjects, copies):
    """Return lines of two datasets of some subjects each, and of copies of some of them in a third."""
    places = [place(CONFIG, number) for place in (bids_place, datalist_place) for number in range(subjects)]
    rng = np.random.default_rng(1)
    lines, copied_lines = [], []
    for number, place in enumerate(places):
        scan = make_subject(CONFIG, place, draw_subject_traits(CONFIG, place)).scans["t1"]
        values = np.maximum(scan.stored.astype(np.float32) * scan.slope + scan.intercept, 0)
        values /= values.max()
        dataset = "bids" if number < subjects else "datalist"
        lines.append(line(dataset, f"s{number}", fingerprint(values, scan.affine)))
        if number % (2 * subjects // copies) == 0:
            copied_lines.append(line("copies", f"copy-of-s{number}", fingerprint(*copied(values, scan.affine, rng))))
    return lines, copied_lines


@pytest.fixture(scope="module")
def cohort():
    return make_cohort(subjects=8, copies=4)


def search(lines, threshold=THRESHOLD):
    return find_duplicates(pa.Table.from_pylist(lines), ("t1",), threshold)


def separation(lines, copies):
    """Return the lowest similarity of a copy and the highest of strangers."""
    pairs = search([*lines, *copies], threshold=-1)
    by_names = {frozenset((p["subject_a"], p["subject_b"])): p["similarity"] for p in pairs}
    same = [by_names.pop(frozenset((c["subject"], c["subject"].removeprefix("copy-of-")))) for c in copies]
    return min(same), max(by_names.values())


def check_separation(lines, copies):
    assert search(lines) == []
    pairs = search([*copies, *lines])
    found = {frozenset((p["subject_a"], p["subject_b"])) for p in pairs}
    assert found == {frozenset((c["subject"], c["subject"].removeprefix("copy-of-"))) for c in copies}
    assert all(p["dataset_a"] != p["dataset_b"] for p in pairs)
    similarities = [p["similarity"] for p in pairs]
    assert similarities == sorted(similarities, reverse=True)
    lowest, highest = separation(lines, copies)
    assert lowest > THRESHOLD + 0.05
    assert highest < THRESHOLD - 0.05


def test_copies_are_found_across_datasets_and_strangers_are_not(cohort):
    check_separation(*cohort)


@pytest.mark.full
def test_copies_among_48_subjects():
    lines, copies = make_cohort(subjects=24, copies=8)
    assert len(lines) == 48
    check_separation(lines, copies)


def test_cases_of_one_subject_are_no_duplicates_and_the_best_pair_counts(cohort):
    lines, copies = cohort
    again = {**copies[0], "case": "second-session"}
    pairs = search([*lines, copies[0], again])
    assert len(pairs) == 1


def test_only_what_can_be_compared_is(cohort):
    lines, copies = cohort
    assert search([*lines[:5], copies[0]]) == []  # too few subjects
    flair = {**copies[0], "modalities": ["flair"]}
    assert find_duplicates(pa.Table.from_pylist([*lines, flair]), ("t1", "flair")) == []
    retired = {**copies[0], "status": "retired"}
    empty = {**copies[0], "subject": "empty", "fingerprint": [0.0] * EDGE**3}
    short = {**copies[0], "subject": "short", "fingerprint": []}
    assert search([*lines, retired, empty, short]) == []


def test_few_subjects_must_be_more_alike(cohort, monkeypatch):
    asked = []
    monkeypatch.setattr(duplicates, "_pairs", lambda group, limit: asked.append((len(group), limit)) or iter(()))
    print_ = cohort[0][0]["fingerprint"]
    for count in (11, 12, 17, 23, 24, 200):
        table = pa.Table.from_pylist([line("d", f"s{n}", print_) for n in range(count)])
        find_duplicates(table, ("t1",))
        assert passed_over(table, ("t1",)) == ({"t1": 11} if count == 11 else {})
    assert asked == [(12, 0.6), (17, 0.6), (23, 0.6), (24, THRESHOLD), (200, THRESHOLD)]
    find_duplicates(table, ("t1",), 0.3)
    assert asked[-1] == (200, 0.3)


def test_the_search_is_one_matrix_product_in_blocks(cohort, monkeypatch):
    lines, copies = cohort
    whole = search([*lines, *copies])
    monkeypatch.setattr(duplicates, "BLOCK", 7)
    assert search([*lines, *copies]) == whole


def test_the_table_beside_the_store(tmp_path, cohort, monkeypatch):
    url = str(tmp_path / "s.zarr")
    ingest(url, three_subjects(tmp_path))
    assert read_duplicates(url) == []
    assert (tmp_path / "s.zarr" / "duplicates.parquet").exists()
    lines, copies = cohort
    duplicates.refresh(url, pa.Table.from_pylist([*lines, *copies]), PreprocessSpec(name="x"))
    assert len(links(url)) == 4
    first = ("bids", "s0")
    assert linked_to(url, *first) == [("copies", "copy-of-s0")]
    assert linked_to(url, "copies", "copy-of-s0") == [first]
    remove_subject(url, *first)
    assert len(links(url)) == 3
    assert linked_to(url, "copies", "copy-of-s0") == []
    assert open_store(url).datasets == ["toy"]


def test_splits_keep_linked_subjects_together(cohort):
    import pandas as pd

    lines, copies = cohort
    cases = pd.DataFrame([{"dataset": x["dataset"], "subject": x["subject"]} for x in [*lines, *copies]])
    pairs = [((p["dataset_a"], p["subject_a"]), (p["dataset_b"], p["subject_b"])) for p in search([*lines, *copies])]
    for seed in range(5):
        split = make_split(cases, seed, links=pairs)
        role = {(d, s): r for d, s, r in split[["dataset", "subject", "split"]].itertuples(index=False)}
        assert all(role[a] == role[b] for a, b in pairs)
        apart = make_split(cases, seed)
        role = {(d, s): r for d, s, r in apart[["dataset", "subject", "split"]].itertuples(index=False)}
        if any(role[a] != role[b] for a, b in pairs):
            with pytest.raises(SplitError, match=r"look like one person .* must share a role"):
                make_split(cases, seed, existing=apart, links=pairs)
            break
    else:
        raise AssertionError("no seed separates a pair by chance")
