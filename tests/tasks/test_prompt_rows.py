"""Rows of a prompting table on made embeddings: who is scored, what is fitted on whom, controls, the table itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from probe_phantoms import NETWORK
from prompt_phantoms import TEMPERATURE, TOY
from sklearn.metrics import roc_auc_score

from models.connectomes import ConnectomeSpec
from models.records import SelectedCase
from tasks.embeddings import EncoderSource
from tasks.network_embeddings import PairSource
from tasks.probe_cohort import ProbeCohort
from tasks.probe_summary import summarise_probes
from tasks.probing import EncoderRow
from tasks.prompt_baselines import CONNECTOME, MAE, MAJORITY, SUPERVISED, TANGENT, ImageRow
from tasks.prompt_baselines import NETWORK as SUPERVISED_NETWORK
from tasks.prompt_cohort import PromptCohort
from tasks.prompt_report import calibration_errors, pooled, prompt_section
from tasks.prompt_rows import absent_lines, make_rows, score_rows
from tasks.prompt_seeds import Embedder, PairRow, PromptSettings
from tasks.prompting import PromptError
from tasks.tables import to_markdown

N, REGIONS = 60, 5
CLASS = np.arange(N) // 5 % 2
RNG = np.random.default_rng(4)
OWN = RNG.standard_normal((N, 3)) + np.outer(2 * CLASS - 1, [2.0, 0, 0])
SPACES = {
    (name, side): OWN * (name == "good") + noise * RNG.standard_normal((N, 3))
    for name, noise in (("good", 0.3), ("noise", 1.0))
    for side in ("image", "network")
}
SETTINGS = PromptSettings(variants=("mean", "knn"), shares=(1.0, 0.1), draws=2, k=3)


def matrices() -> np.ndarray:
    """Return connectomes (N, 5, 5) whose first connection follows the class."""
    values = 0.2 * np.random.default_rng(1).standard_normal((N, REGIONS, REGIONS))
    values = (values + values.transpose(0, 2, 1)) / 2
    values[:, 0, 1] = values[:, 1, 0] = 0.4 * (2 * CLASS - 1) + values[:, 0, 1]
    values[:, range(REGIONS), range(REGIONS)] = 0
    return values.astype(np.float32)


def make_cohort(
    benchmark: Any = TOY, without_image: Any = (), without_network: Any = (), target: Any = CLASS, **spec: Any
) -> PromptCohort:
    """Return 60 subjects in five folds of a store that is never read."""
    connectome = ConnectomeSpec(atlas="five", regions=tuple("abcde"), values=(1, 2, 3, 4, 5), **spec)
    store = SimpleNamespace(spec=SimpleNamespace(connectome=connectome), url="nowhere")
    cases = tuple(
        SelectedCase(
            dataset="toys", row=k, case=f"c{k}", subject=f"s{k}", digest=f"d{k}", role="test",
            target=benchmark.classes[target[k]],
        )
        for k in range(N)
    )  # fmt: skip
    people = pd.DataFrame({"age": np.arange(N) + 20.0, "sex": np.where(np.arange(N) % 3 == 0, "F", "M")})
    everybody = ProbeCohort(benchmark, cast("Any", store), cases, np.arange(N) % 5, "folds", people)
    here = [~np.isin(np.arange(N), list(some)) for some in (without_image, without_network)]
    cohort = PromptCohort(everybody, here[0], here[1], np.arange(N))
    cohort.__dict__["matrices"] = matrices()[here[1]]
    return cohort


def pair(name: str) -> PairSource:
    source = PairSource(EncoderSource(name, NETWORK, f"weights of {name}"))
    source.__dict__["pair"] = SimpleNamespace(temperature=TEMPERATURE, modality="t1")
    return source


@pytest.fixture(autouse=True)
def synthetic(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give trainings synthetic embeddings; returns what was embedded."""
    asked: list[str] = []

    def embeddings(source: PairSource, store: object, cases: Any, side: str, *rest: object) -> tuple[Any, int]:
        asked.append(f"{source.name} {side}")
        values = SPACES[source.name, side][[case.row for case in cases]].astype(np.float32)
        return (values, values), len(cases)

    def images(cohort: ProbeCohort, source: EncoderSource, workspace: Path) -> np.ndarray:
        return SPACES[source.name, "image"][[case.row for case in cohort.cases]]

    monkeypatch.setattr("tasks.prompt_seeds.pair_embeddings", embeddings)
    monkeypatch.setattr("tasks.prompt_baselines.embed_row", images)
    for name in ("tasks.probes", "tasks.connectome_baselines"):
        monkeypatch.setattr(f"{name}.GRID", (1.0,))
        monkeypatch.setattr(f"{name}.INNER_FOLDS", 2)
    return asked


def rows_of(cohort: PromptCohort, workspace: Path, *names: str, images: Any = (), **changes: Any) -> Any:
    settings = PromptSettings(**{**vars(SETTINGS), **changes})
    embedder = Embedder(cohort, workspace)
    together = changes.pop("together", "seeds")
    rows = [PairRow("CINP", tuple(pair(name) for name in names or ("good",)), together)]
    return make_rows(cohort, rows, images, settings, embedder), rows, settings, embedder


def test_prompting_is_above_the_majority_and_the_table_says_how(tmp_path: Path) -> None:
    cohort = make_cohort()
    image = ImageRow(EncoderRow("masked", (EncoderSource("good", NETWORK, "w"),)), "mae")
    rows, pairs, settings, embedder = rows_of(cohort, tmp_path, images=[image])
    scores, fresh = score_rows(cohort, rows, tmp_path)
    section = prompt_section(cohort, pairs, rows, scores, settings, embedder, ["A note."], [("x", "0")], "")
    lines = {line.row: line for line in section.table.lines if line.metric == "balanced_accuracy"}
    first = lines["CINP: mean, 100 %"]
    assert (first.low or 0) > 0.8 > (lines[MAJORITY].estimate or 0) == 0.5
    assert (lines[MAJORITY].p_holm or 1) < 0.01
    assert first.p is None
    assert lines["CINP: mean, 10 %"].seeds == 2, "two draws"
    assert lines["CINP: knn, 100 %"].seeds == 1, "of everybody there is one draw"
    for name in (CONNECTOME, TANGENT, "CINP: network probe", "CINP: image+network probe", "masked"):
        assert (lines[name].estimate or 0) > 0.8, name
    assert {lines[name].kind for name in (CONNECTOME, TANGENT, "masked", "age+sex")} == {"baseline"}
    text = to_markdown(section.table)
    for words in (
        "n = 60 queries, each tested once (30 control, 30 hypoconnected); one subject is worth 1.67 points",
        "knn: the mean of the 3 highest cosines of a class",
        "at the temperature that each training ended with, 0.2 (good); nothing is fitted to labels",
        f"| {SUPERVISED} (none under image_only) | – |",
        f"| {SUPERVISED_NETWORK} (left out: network_epochs is 0) | – |",
        "A note.",
    ):
        assert words in text, words
    assert f"| {MAE}" not in text
    assert [picture.png[:4] for picture in section.pictures] == [b"\x89PNG"] * 4
    assert set(section.reliability["row"]) == {row.name for row in rows if row.variant}  # type: ignore[index]
    error = calibration_errors(scores, TOY, rows[:1])["CINP: mean, 100 %"]
    target, probabilities = pooled(scores, TOY, "CINP: mean, 100 %")[0]
    claimed = probabilities[:, 1]
    bins = np.minimum((10 * claimed).astype(int), 9)
    gaps = [abs(claimed[bins == k].sum() - target[bins == k].sum()) for k in range(10)]
    assert error == pytest.approx(sum(gaps) / N)
    assert score_rows(cohort, rows, tmp_path)[1] == 0 < fresh


def test_the_interval_of_a_negative_control_holds_chance(tmp_path: Path) -> None:
    shuffled = TOY.replace(name="toy-shuffled", shuffle_seed=7, control="negative")
    cohort = make_cohort(shuffled)
    rows, *_ = rows_of(cohort, tmp_path, shares=(1.0, 0.5), variants=("mean",), draws=4)
    scores, _ = score_rows(cohort, [row for row in rows if row.variant or row.name == TANGENT], tmp_path)
    lines = summarise_probes(scores, cohort.everybody, {row.name: row.kind for row in rows})
    found = [line for line in lines if line.metric in ("balanced_accuracy", "auroc") and line.kind == "ours"]
    assert {line.seeds for line in found} == {4}, "as many shuffles of the full support"
    for line in found:
        assert (line.low or 1) < 0.5 < (line.high or 0), line
    seeds = scores[scores["row"] == TANGENT].groupby("seed")
    targets = [part.drop_duplicates("case")["target"].tolist() for _, part in seeds]
    assert len(targets) == 4, "baselines see as many shuffles"
    assert targets[0] != targets[1]


def test_several_classes_are_told_apart_one_against_the_rest(tmp_path: Path) -> None:
    benchmark = TOY.replace(name="toy-three", classes=("a", "b", "c"))
    cohort = make_cohort(benchmark, target=np.where(np.arange(N) >= 45, 2, CLASS))
    rows, pairs, settings, embedder = rows_of(cohort, tmp_path, shares=(1.0,), variants=("mean",))
    scores, _ = score_rows(cohort, rows, tmp_path)
    section = prompt_section(cohort, pairs, rows, scores, settings, embedder, (), (), "")
    lines = {(line.row, line.metric): line.estimate for line in section.table.lines}
    name = "CINP: mean, 100 %"
    assert {metric for row, metric in lines if row == name} == set(benchmark.metrics)
    target, probabilities = pooled(scores, benchmark, name)[0]
    areas = []
    for fold in range(5):
        mine = np.arange(N // 5) + fold * (N // 5)  # pooled fold by fold
        one_against_rest = [roc_auc_score(target[mine] == k, probabilities[mine, k]) for k in range(3)]
        areas.append(np.mean(one_against_rest))
    assert lines[name, "auroc"] == pytest.approx(np.mean(areas))
    assert lines[MAJORITY, "balanced_accuracy"] == pytest.approx(1 / 3)
    assert (lines[TANGENT, "auroc"] or 0) > 0.5


def test_rows_that_see_the_network_are_scored_on_who_has_both(tmp_path: Path) -> None:
    cohort = make_cohort(without_image=range(4), without_network=range(50, 55))
    rows, *_ = rows_of(cohort, tmp_path)
    scores, _ = score_rows(cohort, rows, tmp_path)
    counts = scores.groupby("row")["case"].nunique()
    prompted, both = counts["CINP: mean, 100 %"], counts[CONNECTOME]
    assert (prompted, counts["age+sex"], both, counts[TANGENT], counts["CINP: network probe"]) == (56, 56, 51, 51, 51)
    assert not {f"c{k}" for k in range(4)} & set(scores["case"])


def test_an_ensemble_is_one_model_and_seeds_are_several(tmp_path: Path) -> None:
    cohort = make_cohort()
    rows, *_ = rows_of(cohort, tmp_path, "good", "noise")
    seeds = {row.name: len(row.seeds) for row in rows}
    assert (seeds["CINP: mean, 100 %"], seeds["CINP: mean, 10 %"], seeds["CINP: image probe"]) == (2, 4, 2)
    embedder = Embedder(cohort, tmp_path)
    together = PairRow("CINP", (pair("good"), pair("noise")), "ensemble")
    ensemble = make_rows(cohort, [together], [], SETTINGS, embedder)[0]
    alone = [make_rows(cohort, [PairRow(n, (pair(n),))], [], SETTINGS, embedder)[0] for n in ("good", "noise")]
    mean, parts = ensemble.seeds[0].predict(cohort.everybody), [r.seeds[0].predict(cohort.everybody) for r in alone]
    np.testing.assert_allclose(mean, np.mean(parts, axis=0))


def test_kept_scores_follow_weights_settings_and_roles(tmp_path: Path, synthetic: list[str]) -> None:
    def fresh(cohort: PromptCohort, **changes: Any) -> int:
        rows = rows_of(cohort, tmp_path, **{"shares": (1.0,), **changes})[0]
        return score_rows(cohort, [row for row in rows if row.variant], tmp_path)[1]

    assert fresh(make_cohort()) == 2
    asked = len(synthetic)
    assert (fresh(make_cohort()), len(synthetic)) == (0, asked), "kept scores need no embeddings"
    assert fresh(make_cohort(), k=4) == 1, "k is of knn alone"
    assert fresh(make_cohort(without_network=[9]), k=4) == 2


def test_what_is_absent_says_why(tmp_path: Path) -> None:
    few = make_cohort(without_network=[k for k in range(N) if k % 5 == 0 and CLASS[k]])
    rows, *_ = rows_of(few, tmp_path)
    why = "nobody in fold 0 is hypoconnected and has both image and connectome"
    absent = {line.row: line.note for line in absent_lines(few, rows)}
    assert {absent[name] for name in (CONNECTOME, TANGENT, SUPERVISED_NETWORK, "CINP: network probe")} == {why}
    assert score_rows(few, rows, tmp_path)[0].groupby("row")["case"].nunique()["CINP: mean, 100 %"] == N
    partial = rows_of(make_cohort(kind="partial correlation"), tmp_path)[0]
    notes = {row.name: row.absent for row in partial}
    assert notes[TANGENT] == "the store holds partial correlations, tangent space is one of correlations"
    assert notes[CONNECTOME] == ""


def test_rows_that_would_share_a_file_are_refused(tmp_path: Path) -> None:
    image = ImageRow(EncoderRow("CINP image-probe", (EncoderSource("good", NETWORK, "w"),)))
    with pytest.raises(PromptError, match="called 'CINP: image probe' and 'CINP image-probe', which"):
        rows_of(make_cohort(), tmp_path, images=[image])
