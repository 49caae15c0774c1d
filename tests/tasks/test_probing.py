"""Rows of a probe table: encoders and ensembles, simple features, what is absent, and the table itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from probe_phantoms import AD, AGE, NETWORK

from models.records import SelectedCase
from models.store_descriptors import Descriptors
from tasks.embeddings import EncoderSource
from tasks.fold_statistics import fold_interval
from tasks.probe_cohort import ProbeCohort
from tasks.probe_summary import class_metric, fold_scores, probe_table, regression_metric
from tasks.probe_tasks import PROBES
from tasks.probes import probe_classes
from tasks.probing import (
    CEILING,
    RANDOM,
    EncoderRow,
    absent_lines,
    feature_rows,
    row_kinds,
    score_encoders,
    score_features,
)
from tasks.tables import to_csv, to_latex, to_markdown

N = 40
CLASS = np.arange(N) // 5 % 2
RNG = np.random.default_rng(3)
FEATURES = {name: RNG.standard_normal((N, 3)) + 2 * CLASS[:, None] * k for k, name in enumerate(("noise", "a", "b"))}


def descriptors(atlas: str = "desikan_killiany") -> Descriptors:
    values = RNG.uniform(2, 3, (N, 2, 3)).astype(np.float32)
    return Descriptors(values, ("m1", "m2"), ("r1", "r2", "r3"), atlas, "approximate")


def make_cohort(benchmark: Any = AD, found: Descriptors | None = None) -> ProbeCohort:
    """Return 40 subjects in five folds of a store that is never read."""
    store = SimpleNamespace(dataset=lambda name: SimpleNamespace(descriptors=found))
    age = np.round(30 + 10 * FEATURES["a"][:, 0], 2)
    targets = [str(x) for x in age] if benchmark.kind == "regression" else [benchmark.classes[k] for k in CLASS]
    cases = tuple(
        SelectedCase(dataset="blobs", row=k, case=f"c{k}", subject=f"s{k}", digest=f"d{k}", role="test", target=target)
        for k, target in enumerate(targets)
    )
    people = pd.DataFrame({"age": age, "sex": np.where(np.arange(N) % 3 == 0, "F", "M"), "modalities": [["gm"]] * N})
    people = people.assign(dataset="blobs", site=["AB"[k // 2 % 2] for k in range(N)])
    latents = pd.DataFrame({"subject": [case.subject for case in cases], "age": age, "thinning": CLASS * 1.0})
    return ProbeCohort(benchmark, cast("Any", store), cases, np.arange(N) % 5, "folds", people, latents)


def encoder(name: str) -> EncoderSource:
    return EncoderSource(name, NETWORK, f"weights of {name}")


@pytest.fixture(autouse=True)
def synthetic(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give encoders synthetic embeddings; returns the names that were embedded."""
    asked: list[str] = []

    def case_features(source: EncoderSource, *rest: object) -> np.ndarray:
        asked.append(source.name)
        return FEATURES[source.name].astype(np.float32)

    monkeypatch.setattr("tasks.probing.case_features", case_features)
    monkeypatch.setattr("tasks.probes.GRID", (1.0,))
    monkeypatch.setattr("tasks.probes.INNER_FOLDS", 2)
    return asked


def test_an_ensemble_is_the_mean_of_its_members_probabilities(tmp_path: Path, synthetic: list[str]) -> None:
    cohort = make_cohort()
    both = (encoder("a"), encoder("noise"))
    seeds, fresh = score_encoders(cohort, EncoderRow("seeds", both), tmp_path)
    ensemble, more = score_encoders(cohort, EncoderRow("folds", both, "ensemble"), tmp_path)
    assert (fresh, more, synthetic) == (2, 1, ["a", "noise", "a", "noise"])
    positive = ensemble[ensemble["region"] == "ad-like"]["value"].to_numpy()
    parts = [
        probe_classes(FEATURES[name].astype(np.float32).astype(float), CLASS, cohort.fold, 2, "")
        for name in ("a", "noise")
    ]
    np.testing.assert_allclose(positive, np.mean(parts, axis=0)[:, 1])
    assert (seeds.groupby("seed").size().tolist(), set(ensemble["seed"])) == ([2 * N] * 2, {0})
    again, none = score_encoders(cohort, EncoderRow("seeds", both), tmp_path)
    assert (none, len(synthetic)) == (0, 4), "kept scores need no embeddings"
    pd.testing.assert_frame_equal(again, seeds)


def test_kept_scores_follow_weights_targets_and_folds(tmp_path: Path) -> None:
    cohort, row = make_cohort(), EncoderRow("x", (encoder("a"),))
    assert score_encoders(cohort, row, tmp_path)[1] == 1
    other = EncoderSource("a", NETWORK, "other weights")
    assert score_encoders(cohort, EncoderRow("x", (other,)), tmp_path)[1] == 1
    assert score_encoders(make_cohort(AD.replace(classes=("ad-like", "control"))), row, tmp_path)[1] == 1
    moved = ProbeCohort(AD, cohort.store, cohort.cases, cohort.fold, "other folds", cohort.people)
    assert score_encoders(moved, row, tmp_path)[1] == 1


def test_simple_rows_and_why_one_is_absent() -> None:
    rows = {row.name: row for row in feature_rows(make_cohort(found=descriptors()))}
    assert set(rows) == {"raw descriptors (approximate)", "age+sex", "no features", CEILING}
    assert rows["raw descriptors (approximate)"].features is not None
    assert rows["raw descriptors (approximate)"].features.shape == (N, 6)
    assert rows[CEILING].features is not None
    assert rows[CEILING].features.shape == (N, 2)
    ages = {row.name: row for row in feature_rows(make_cohort(AGE))}
    assert set(ages) == {"raw descriptors", "no features", CEILING}
    assert (ages["raw descriptors"].features, ages["raw descriptors"].absent) == (None, "blobs has none in the store")
    assert ages[CEILING].features is not None
    assert ages[CEILING].features.shape == (N, 1), "the target itself is never a feature"
    sexes = [row.name for row in feature_rows(make_cohort(AD.replace(target="sex")))]
    assert "age" in sexes
    blank = make_cohort()
    unknown = ProbeCohort(AD, blank.store, blank.cases, blank.fold, "", blank.people.assign(age=np.nan, sex=""))
    assert next(row for row in feature_rows(unknown) if row.name == "age+sex").absent == "neither is known"


def test_expected_baselines_are_shown_as_not_trained() -> None:
    cohort = make_cohort()
    rows = [
        EncoderRow("AnatCL", (encoder("a"),), recipes=("anatcl",)),
        EncoderRow("contrast", (encoder("b"),), recipes=("simclr_tiny",)),
        EncoderRow(RANDOM, (encoder("noise"),)),
    ]
    simple = feature_rows(cohort)
    lines = absent_lines(cohort, rows, simple)
    assert [(line.row, line.note) for line in lines] == [
        ("y-Aware", "not trained"),
        ("ExpW", "not trained"),
        ("age regression", "not trained"),
        ("raw descriptors", "blobs has none in the store"),
    ]
    assert all(line.estimate is None for line in lines)
    kinds = row_kinds(rows, simple)
    assert "AnatCL" not in kinds
    assert (kinds["contrast"], kinds[RANDOM], kinds[CEILING]) == ("baseline", "baseline", "ceiling")


def test_a_negative_control_has_a_shuffle_for_every_seed(tmp_path: Path) -> None:
    cohort = make_cohort(AD.replace(shuffle_seed=1, control="negative"))
    frame, fresh = score_features(cohort, feature_rows(cohort)[-1], 3, tmp_path)
    assert fresh == 3
    targets = [part.drop_duplicates("case")["target"].tolist() for _, part in frame.groupby("seed")]
    assert targets[0] != targets[1] != targets[2]
    assert score_features(make_cohort(), feature_rows(make_cohort())[-1], 3, tmp_path / "plain")[1] == 1


def test_the_table_is_made_of_folds(tmp_path: Path) -> None:
    cohort = make_cohort()
    rows = [EncoderRow("ours", (encoder("a"), encoder("b"))), EncoderRow(RANDOM, (encoder("noise"),))]
    simple = feature_rows(cohort)
    frames = [score_encoders(cohort, row, tmp_path)[0] for row in rows]
    frames += [score_features(cohort, row, 1, tmp_path)[0] for row in simple if row.features is not None]
    scores = pd.concat(frames, ignore_index=True)
    absent = absent_lines(cohort, rows, simple)
    table = probe_table(cohort, scores, row_kinds(rows, simple), absent, ["A note."], [("store digest", "0123")], "")
    by_row = {line.row: line for line in table.lines if line.metric == "balanced_accuracy"}
    values = fold_scores(scores[scores["row"] == "ours"], AD, "balanced_accuracy")
    assert values.shape == (2, 5)
    ours, found = by_row["ours"], fold_interval(values, 0.25, N)
    assert (ours.estimate, ours.low, ours.high, ours.n, ours.seeds) == (found.estimate, found.low, found.high, N, 2)
    assert ours.p is None
    random = by_row[RANDOM]
    assert random.p is not None
    assert random.p_holm is not None
    assert random.p < random.p_holm < 0.3
    assert random.difference == pytest.approx(ours.estimate - random.estimate)  # type: ignore[operator]
    assert by_row[CEILING].p is None
    text = to_markdown(table)
    for words in (
        "| SimCLR (not trained) | – |",
        "n = 40 subjects, each tested once (20 control, 20 ad-like)",
        "A note.",
    ):
        assert words in text, words
    assert "SimCLR" in to_latex(table)
    assert "not trained" in to_csv(table)


def test_metrics_of_a_fold() -> None:
    target = np.array([30.0, 40.0, 50.0])
    assert regression_metric("mae", target, target + np.array([1.0, -2.0, 3.0])) == 2.0
    assert regression_metric("r", target, 2 * target) == pytest.approx(1)
    assert np.isnan(regression_metric("r", target, np.full(3, 40.0)))
    assert np.isnan(regression_metric("r", target[:2], target[:2]))  # of two it is 1 or -1, whatever they are
    indices, probabilities = np.array([0, 0, 0, 1]), np.array([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
    assert class_metric("balanced_accuracy", indices, probabilities) == pytest.approx((2 / 3 + 1) / 2)
    assert class_metric("auroc", indices, probabilities) == 1


def test_without_data_there_is_no_number(tmp_path: Path) -> None:
    cohort = ProbeCohort(PROBES["openbhb-age"], cast("Any", None))
    table = probe_table(cohort, pd.DataFrame(), {}, absent_lines(cohort, [], []), (), (), "")
    assert not table.has_scores
    assert {line.kind for line in table.lines} == {"no data", "published"}
    published = "| AnatCL (published, inferred: the authors' page (conflicts with 2.61)) | – | – | 2.55 |"
    assert published in to_markdown(table)
