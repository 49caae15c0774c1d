"""Fewer labels: who is left, the same number of steps, and a table with a curve."""

from __future__ import annotations

import csv
import io
import itertools

import numpy as np
import pandas as pd
import pytest

from models.recipes import find_recipe
from models.records import SelectedCase
from models.schedule import plan_steps
from tasks.benchmarks import BENCHMARKS
from tasks.cohort import fewer_labels
from tasks.evaluation import Cohort
from tasks.finetune import with_fewer_labels
from tasks.label_efficiency import check_shares, label_table, of_share, training_subjects
from tasks.report import TableSection
from tasks.sections import with_further
from tasks.tables import BenchmarkTable

DIAGNOSIS = BENCHMARKS["phantom-diagnosis"]
ROLES = ["train"] * 20 + ["val"] * 4 + ["test"] * 12


def cases() -> list[SelectedCase]:
    """36 subjects of two classes in turn; the first one has two sessions."""
    lines = [(f"sub-{k:02d}", f"sub-{k:02d}", role, DIAGNOSIS.classes[k % 2]) for k, role in enumerate(ROLES)]
    lines.append(("sub-00_ses-2", "sub-00", "train", DIAGNOSIS.classes[0]))
    return [
        SelectedCase(dataset=DIAGNOSIS.datasets[0], row=row, case=c, subject=s, digest=c, role=role, target=target)
        for row, (c, s, role, target) in enumerate(lines)
    ]


def subjects(some: list[SelectedCase], role: str = "train") -> set[str]:
    return {case.subject for case in some if case.role == role}


def test_smaller_shares_are_parts_of_larger_ones_and_hold_every_class():
    parts = {share: fewer_labels(cases(), share, seed=3) for share in (0.05, 0.2, 0.5, 1.0)}
    assert [len(subjects(some)) for some in parts.values()] == [4, 4, 10, 20], "two of each class at least"
    trained = [subjects(some) for some in parts.values()]
    assert all(small <= large for small, large in itertools.pairwise(trained))
    for some in parts.values():
        assert {case.target for case in some if case.role == "train"} == set(DIAGNOSIS.classes)
        assert (subjects(some, "val"), subjects(some, "test")) == (subjects(cases(), "val"), subjects(cases(), "test"))
    assert subjects(fewer_labels(cases(), 0.5, seed=4)) != subjects(parts[0.5])
    assert parts[1.0] == cases()


def test_a_share_of_the_labels_gets_as_many_steps():
    config = find_recipe("classification_tiny")("s.zarr", "x", modalities=("t1",), classes=DIAGNOSIS.classes, epochs=9)
    config = config.replace(select_every=3)
    smaller, kept = with_fewer_labels(config, cases(), 0.5)
    few = sum(case.role == "train" for case in kept)
    assert abs(plan_steps(smaller, few, 1).total_steps - plan_steps(config, 21, 1).total_steps) <= 1
    looks = (config.epochs / config.select_every, smaller.epochs / smaller.select_every)
    assert looks[0] == pytest.approx(looks[1], rel=0.1)


def scores(shift: float, share: float) -> pd.DataFrame:
    """Probabilities of the test subjects: the pre-trained row better by `shift`."""
    name, rng, lines = of_share(DIAGNOSIS, share).name, np.random.default_rng(0), []
    for row, gain in (("pre-trained", shift), ("scratch", 0.0), ("majority", 0.0)):
        for case in (case for case in cases() if case.role == "test"):
            sign = 1 if case.target == DIAGNOSIS.classes[1] else -1
            p = float(np.clip(0.5 + sign * gain + 0.2 * rng.standard_normal(), 0.01, 0.99))
            common = {"benchmark": name, "row": row, "seed": 0, "dataset": case.dataset, "case": case.case}
            common |= {"subject": case.subject, "metric": "probability", "target": case.target, "note": ""}
            both = zip(DIAGNOSIS.classes, (1 - p, p), strict=True)
            lines += [{**common, "region": region, "value": value} for region, value in both]
    return pd.DataFrame(lines)


@pytest.fixture(scope="module")
def found():
    cohort = Cohort(DIAGNOSIS, tuple(cases()), pd.DataFrame(), store=None)  # type: ignore[arg-type]
    return label_table(cohort, {1.0: scores(0.4, 1), 0.2: scores(0.0, 0.2)}, replicates=400)


def test_the_table_shows_rows_by_share_and_corrects_over_shares(found):
    points = [(point.share, point.subjects, point.line.row, point.line.metric) for point in found.points]
    assert points == [
        (0.2, 4, "pre-trained", "auroc"),
        (0.2, 4, "scratch", "auroc"),
        (1.0, 20, "pre-trained", "auroc"),
        (1.0, 20, "scratch", "auroc"),
    ]
    small, large = found.points[1].line, found.points[3].line
    assert large.p_holm == pytest.approx(min(1, 2 * large.p)), "two shares are two tests"
    assert large.p < small.p
    text = found.to_markdown()
    assert text.startswith("### Phantom diagnosis")
    assert "| 20 % | 4 | scratch |" in text
    assert "as many optimiser steps as with all labels" in text
    lines = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [line["share"] for line in lines] == ["0.2", "0.2", "1.0", "1.0"]
    assert float(lines[3]["difference"]) == large.difference


def test_the_section_gets_the_curve(found):
    section = TableSection(BenchmarkTable(benchmark=DIAGNOSIS, lines=()))
    assert with_further(section, {}) == section
    (picture,) = with_further(section, {"labels": found}).pictures
    assert picture.png.startswith(b"\x89PNG")
    assert picture.alt.endswith("with fewer labels: curve")


def test_a_share_has_a_name_of_its_own_and_all_labels_have_none():
    assert of_share(DIAGNOSIS, 0.05).name == "phantom-diagnosis-labels5"
    assert of_share(DIAGNOSIS, 0.125).name == "phantom-diagnosis-labels12.5"
    assert of_share(DIAGNOSIS, 1) is DIAGNOSIS


def test_the_number_of_subjects_is_that_of_the_first_seed():
    cohort = Cohort(DIAGNOSIS, tuple(cases()), pd.DataFrame(), store=None)  # type: ignore[arg-type]
    assert [training_subjects(cohort, share) for share in (0.2, 1.0)] == [4, 20]


@pytest.mark.parametrize(
    ("shares", "told"),
    [
        ([0.5, 1.0], "label shares lie between 0 and 1, got 1; all labels are always trained on"),
        ([0.0], "label shares lie between 0 and 1, got 0"),
        ([0.2, 0.2], r"label shares are given once each, got 0\.2, 0\.2"),
    ],
)
def test_shares_that_make_no_sense_are_refused(shares, told):
    with pytest.raises(ValueError, match=told):
        check_shares(shares)
