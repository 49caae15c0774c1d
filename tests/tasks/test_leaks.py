"""Test subjects that a pre-training has seen: found by id and by looks, and refused when nothing is left."""

from __future__ import annotations

import pandas as pd
import pytest

from models.records import SelectedCase
from tasks.benchmarks import BENCHMARKS
from tasks.evaluation import Cohort, without_seen
from tasks.leaks import SAME, find_leaks
from tasks.scores import ScoreError

DIAGNOSIS = BENCHMARKS["phantom-diagnosis"]
DATASET = DIAGNOSIS.datasets[0]


def case(subject: str, role: str = "test", target: str = "", dataset: str = DATASET) -> SelectedCase:
    return SelectedCase(dataset=dataset, row=0, case=subject, subject=subject, digest="", role=role, target=target)


@pytest.fixture
def cohort() -> Cohort:
    tested = [case(name, target=DIAGNOSIS.classes[k % 2]) for k, name in enumerate("abcdef")]
    return Cohort(DIAGNOSIS, (case("t", "train"), *tested), pd.DataFrame(), store=None)  # type: ignore[arg-type]


def test_by_id_and_by_looks(cohort: Cohort) -> None:
    seen = [case("a", "train"), case("b"), case("x", "val", dataset="other"), case("z", "train", dataset="other")]
    links = [((DATASET, "c"), ("third", "y")), (("third", "y"), ("other", "x")), ((DATASET, "d"), ("other", "w"))]
    assert find_leaks(seen, cohort, links) == {(DATASET, "a"): SAME, (DATASET, "c"): "looks like other/x"}
    assert find_leaks([], cohort, links) == {}


def test_scores_of_leaking_subjects_do_not_count(cohort: Cohort) -> None:
    scores = pd.DataFrame({"dataset": DATASET, "subject": list("abcdef"), "value": 1.0})
    assert cohort.without_leaks(scores) is scores
    clean = without_seen([case("a", "train")], cohort, ())
    assert clean.without_leaks(scores)["subject"].tolist() == list("bcdef")


def test_too_few_that_are_left_are_refused(cohort: Cohort) -> None:
    first = [case(name, "train") for name in "ace"]
    with pytest.raises(ScoreError, match=r"3 test subjects were in the pre-training, first .*/a, and no test subject"):
        find_leaks(first, cohort)
    with pytest.raises(ScoreError, match=r"6 test subjects were in the pre-training, .* and none is left without them"):
        find_leaks([case(name, "train") for name in "abcdef"], cohort)
