"""Probes after ComBat: what it is told of a cohort, when it is not possible, and the table beside."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from probe_phantoms import AD, AGE, NETWORK

from models.records import SelectedCase
from tasks.embeddings import EncoderSource
from tasks.probe_cohort import ProbeCohort
from tasks.probe_combat import combat_table, combat_twins, without_combat
from tasks.probe_scans import acquisition_of
from tasks.probe_tasks import PROBES
from tasks.probing import DESCRIPTORS, EncoderRow, FeatureRow, score_encoders, score_features

N = 60
SITE = np.array(["A", "B"])[np.arange(N) // 2 % 2]
CLASS = np.arange(N) % 2
RNG = np.random.default_rng(2)
IMAGED = RNG.standard_normal((N, 6)) + 6 * (SITE == "B")[:, None] + 1.2 * CLASS[:, None]
"""A diagnosis that is hidden under what the scanner adds."""


@pytest.fixture(autouse=True)
def synthetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.probing.case_features", lambda *_: IMAGED.astype(np.float32))
    monkeypatch.setattr("tasks.probes.GRID", (1.0,))
    monkeypatch.setattr("tasks.probes.INNER_FOLDS", 2)


def make_cohort(sites: Sequence[str | None] = list(SITE), benchmark: Any = AD, **people: Any) -> ProbeCohort:
    classes = benchmark.classes
    targets = [str(40 + k) for k in range(N)] if not classes else [classes[k % len(classes)] for k in range(N)]
    cases = tuple(
        SelectedCase(dataset="blobs", row=k, case=f"c{k}", subject=f"s{k}", digest=f"d{k}", role="test", target=target)
        for k, target in enumerate(targets)
    )
    table = pd.DataFrame({"dataset": "blobs", "site": sites, "modalities": [["gm"]] * N} | people)
    return ProbeCohort(benchmark, cast("Any", SimpleNamespace()), cases, np.arange(N) // 4 % 5, "folds", table)


def test_sites_are_told_apart_by_dataset_and_the_target_is_no_covariate() -> None:
    people: dict[str, Any] = {"age": [50.0, *[np.nan] * (N - 1)], "sex": ["F", "M", *[None] * (N - 2)]}
    found = acquisition_of(make_cohort(["A", None, *["B"] * (N - 2)], **people))
    assert found.sites[:3] == ("blobs/A", "", "blobs/B")
    np.testing.assert_array_equal(found.covariates[:3], [[50, 1], [np.nan, 0], [np.nan, np.nan]])
    of_age = acquisition_of(make_cohort(benchmark=AGE, **people)).covariates
    np.testing.assert_array_equal(of_age[:2], [[1], [0]])
    sex = PROBES["phantom-anat-sex"]
    assert acquisition_of(make_cohort(benchmark=sex, **people)).covariates[0] == [50]
    assert acquisition_of(make_cohort()).covariates.shape == (N, 0)
    nameless = make_cohort([None] * N, dataset=["one", *["two"] * (N - 1)])
    assert acquisition_of(nameless).sites[:2] == ("one/", "two/"), "a dataset without sites counts as one"


def test_without_two_sites_to_fit_there_is_a_reason() -> None:
    assert without_combat(make_cohort()) == ""
    assert without_combat(make_cohort(["A"] * N)) == (
        "No table after ComBat: it needs two sites, known here is blobs/A."
    )
    few = ["B" if k in {0, 40} else "A" for k in range(N)]
    assert without_combat(make_cohort(few)) == (
        "No table after ComBat: it needs two sites with 2 training subjects each; without fold 0 there is blobs/A."
    )


def test_a_twin_of_every_row_of_images_is_probed_and_shown_beside(tmp_path: Any) -> None:
    cohort = make_cohort([*SITE[:-1], "C"], age=np.arange(N) + 20.0)
    rows = [EncoderRow("ours", (EncoderSource("a", NETWORK, "a"),))]
    simple = [
        FeatureRow(f"{DESCRIPTORS} (cat12)", IMAGED),
        FeatureRow("age", np.ones((N, 1))),
        FeatureRow(DESCRIPTORS, None, "none"),
    ]
    twins = combat_twins(rows, simple)
    assert [row.name for row in twins.encoders] == ["ours, ComBat"]
    assert [row.name for row in twins.features] == ["raw descriptors (cat12), ComBat"]
    scored = [score_encoders(cohort, row, tmp_path) for row in (*rows, *twins.encoders)]
    scored += [score_features(cohort, row, 1, tmp_path) for row in (simple[0], *twins.features)]
    assert [fresh for _, fresh in scored] == [1, 1, 1, 1]
    before, after = (pd.concat([scored[k][0], scored[k + 2][0]]) for k in (0, 1))
    assert not before["value"].equals(after["value"])
    table = combat_table(cohort, before, after)
    assert table.body[0][:3] == ["ours", "60", "balanced accuracy"]
    assert {line[0] for line in table.body} == {"ours", "raw descriptors (cat12)"}
    first = table.lines[0]
    assert first.change.estimate == pytest.approx(first.after.estimate - first.without.estimate)  # type: ignore[operator]
    text = table.to_markdown()
    for words in (
        "### Phantom AD-like vs control (strong effect: positive control): after ComBat",
        "| row | n | metric | without ComBat | after ComBat | change |",
        "have no rank, no p, and no part in its correction or in a leaderboard",
        "Sites: 3. Kept in the features: age, where known, else their mean; the target is no covariate",
        "Left as they are: 1 of 60 test subjects, whose site is not known or has fewer than 2 training subjects.",
    ):
        assert words in text, words
    header, line, *_ = table.to_csv().splitlines()
    assert header.startswith("row,metric,n,without_estimate,without_low,without_high,after_estimate")
    assert line.startswith("ours,balanced_accuracy,60,0.")
    # Another site is another harmonisation; what decides nothing is read back.
    assert score_encoders(cohort, twins.encoders[0], tmp_path)[1] == 0
    assert score_encoders(make_cohort(age=np.arange(N) + 20.0), twins.encoders[0], tmp_path)[1] == 1
    assert score_features(make_cohort(), twins.features[0], 1, tmp_path)[1] == 1


def test_no_target_reaches_the_harmonisation(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    seen: list[tuple[np.ndarray, ...]] = []

    def harmonised(features: np.ndarray, acquisition: Any, train: np.ndarray) -> np.ndarray:
        seen.append((features, np.array(acquisition.sites), acquisition.covariates, train))
        return features

    monkeypatch.setattr("tasks.probing.harmonised", harmonised)
    row = combat_twins([EncoderRow("ours", (EncoderSource("a", NETWORK, "a"),))], []).encoders[0]
    cohort = make_cohort(age=np.arange(N) + 20.0)
    for one in (cohort, cohort.of_seed(0)):
        score_encoders(one, row, tmp_path / str(len(seen)))
    swapped = ProbeCohort(
        AD, cohort.store, tuple(case.replace(target=AD.classes[0] if case.target == AD.classes[1] else AD.classes[1])
                                for case in cohort.cases), cohort.fold, "folds", cohort.people,
    )  # fmt: skip
    score_encoders(swapped, row, tmp_path / "swapped")
    folds = len(seen) // 3
    for first, second in zip(seen[:folds], seen[2 * folds :], strict=True):
        for own, others in zip(first, second, strict=True):
            np.testing.assert_array_equal(own, others)
    assert [sorted(set(range(N)) - set(train)) for *_, train in seen[:folds]] == [
        [k for k in range(N) if k // 4 % 5 == fold] for fold in range(folds)
    ]


def test_what_is_left_of_the_sites_is_told(tmp_path: Any) -> None:
    sites = PROBES["phantom-anat-ad"].replace(name="site", title="Site effect", target="site", classes=("A", "B"))
    cohort = make_cohort(["A" if k % 2 == 0 else "B" for k in range(N)], sites)
    features = FeatureRow(f"{DESCRIPTORS} (cat12)", RNG.standard_normal((N, 6)) + 6 * (np.arange(N) % 2)[:, None])
    twin = combat_twins([], [features]).features[0]
    before, after = (score_features(cohort, row, 1, tmp_path)[0] for row in (features, twin))
    table = combat_table(cohort, before, after)
    line = table.lines[0]
    assert line.without.estimate == 1.0
    assert cast("float", line.after.estimate) < 0.6
    text = table.to_markdown()
    assert "The lower, the less of the sites is left; chance is 0.500." in text
    assert "1.000 [no interval]" in text
    assert "Nothing is kept; the target is no covariate" in text
