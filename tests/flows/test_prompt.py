"""The prompt flow on a real small store with trainings in closed form: tables, report, resume, refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from connectome_stores import DATASET, FEW, SPEC, Made
from prompt_phantoms import BOTH, CASES, SHUFFLED, TOY, write_pair, write_workspace
from pydantic import ValidationError

from flows.prompt import PromptParams, prompt, run_name, score
from infra.server import ServerInfo
from models.embed_networks import PairError
from models.export import NotFinishedError
from models.records import SelectedCase
from models.selection import write_selection
from tasks.prompt_baselines import CONNECTOME, MAJORITY, NETWORK
from tasks.prompt_tasks import PROMPT_TASKS
from tasks.prompting import PromptError

ROWS = [{"name": "CINP", "trainings": ["one"]}]
IMAGES = [{"name": "masked images", "trainings": ["masked"]}]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompting")
    selection = write_workspace(folder)
    for k, name in enumerate(("one", "two")):
        write_pair(folder / "trainings" / name, k, selection)
    write_pair(folder / "trainings" / "masked", 2, weight_contrast=0.0, weight_matching=0.0)
    write_pair(folder / "trainings" / "matched", 3, weight_contrast=0.0)
    other = FEW.model_copy(update={"atlas": "other_six"})
    write_pair(folder / "trainings" / "other", 4, spec=SPEC.replace(connectome=other))
    return folder


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Register tasks of the toys and shorten the grids; returns the published pages."""
    published: dict[str, str] = {}
    for one in (TOY, SHUFFLED):
        monkeypatch.setitem(PROMPT_TASKS, one.name, one)
    for name in ("tasks.probes", "tasks.connectome_baselines"):
        monkeypatch.setattr(f"{name}.GRID", (1.0,))
        monkeypatch.setattr(f"{name}.INNER_FOLDS", 2)
    monkeypatch.setattr("flows.results.publish_markdown", lambda key, text, *_: published.update({key: text}))
    return published


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the task as a plain function: together with `prompt.fn` no server is needed."""
    monkeypatch.setattr("flows.prompt.score", score.fn)


def params(workspace: Path, **changes: Any) -> PromptParams:
    values = {"workspace": str(workspace), "rows": ROWS, "image_only": IMAGES, "folds": 3, "network_epochs": 0}
    values |= {"shares": [1.0, 0.5], "draws": 2, "variants": ["mean"], "benchmarks": ["toy-diagnosis", "cinp-abide"]}
    return PromptParams(**{**values, **changes})


def test_tables_report_and_resume(workspace: Path, unwatched: None, registered: dict[str, str]) -> None:
    first = prompt.fn(params(workspace))
    assert first["no_data"] == ["cinp-abide"]
    # Prompting with all and twice with half; three probes, one of images alone; two of connectomes; majority, age+sex,
    # ceiling.
    assert first["scored"] == 3 + 3 + 1 + 2 + 3
    scores = pd.read_parquet(workspace / "prompts" / "scores.parquet")
    assert scores.groupby("row")["subject"].nunique()[["CINP: mean, 100 %", CONNECTOME]].tolist() == [BOTH + 3, BOTH]
    tables = workspace / "prompts" / "tables"
    text = (tables / "toy-diagnosis.md").read_text()
    for words in (
        "| CINP: mean, 100 % | 33 | 1 |",
        "| CINP: mean, 50 % | 33 | 2 |",
        "| masked images | 33 | 1 |",
        f"| {NETWORK} (left out: network_epochs is 0) |",
        "at the temperature that each training ended with, 0.2 (one); nothing is fitted to labels",
        "Queries have an image (33 subjects), supports a connectome (33); 30 have both.",
        "Compared with the first row on the 30 subjects that both have",
    ):
        assert words in text, words
    absent = (tables / "cinp-abide.md").read_text()
    assert "| no data |" in absent
    assert (
        "Published, no score of one model: CINP, arXiv 2503.04205, MICCAI 2025 states a gain of 1.46 points" in absent
    )
    for suffix in ("csv", "tex", "reliability.csv", "0.png", "3.png"):
        assert (tables / f"toy-diagnosis.{suffix}").stat().st_size > 100
    assert set(registered) == {f"benchmark-{name}" for name in first["tables"]}
    page = Path(first["report"]).read_text()
    for words in ("Not for clinical use", "support size", "similarities of", "SRPBS autism", "reliability curves of"):
        assert words in page, words
    methods = (workspace / "prompts" / "methods.md").read_text()
    for words in (
        "A 3D vision transformer [2] was pre-trained with CINP [3] (recipe cinp_tiny, preset ",
        "Supports are connectomes of the other folds, 100 % and 50 % of them by class (2 draws of every part, seed 0)",
        "CINP with the first support and variant was compared with every other row",
    ):
        assert words in methods, words
    assert "Methods, for a paper" in page
    found = pd.read_csv(tables / "toy-diagnosis.csv").query("metric == 'balanced_accuracy'").set_index("row")
    assert found["low"]["CINP: mean, 100 %"] > found["estimate"][MAJORITY] == 0.5

    kept = {path: path.stat().st_mtime_ns for path in (workspace / "embeddings").iterdir()}
    again = prompt.fn(params(workspace))
    assert (again["scored"], again["tables"]) == (0, first["tables"])
    assert {path: path.stat().st_mtime_ns for path in (workspace / "embeddings").iterdir()} == kept


def test_who_was_seen_is_named_with_both_numbers(workspace: Path, unwatched: None) -> None:
    folder = workspace / "trainings" / "seen"
    shutil.copytree(workspace / "trainings" / "one", folder)
    line = {"dataset": DATASET, "digest": "x", "target": "", "role": "train"}
    write_selection(folder / "selection.parquet", [SelectedCase(**line, row=1, case="sub-01", subject="sub-01")])
    rows = [{"name": "CINP", "trainings": ["seen"]}]
    asked: dict[str, Any] = {"rows": rows, "image_only": [], "benchmarks": ["toy-diagnosis"], "shares": [1.0]}
    found = prompt.fn(params(workspace, **asked))
    tables = workspace / "prompts" / "tables"
    leaks = (tables / "toy-diagnosis.leaks.md").read_text()
    assert "| CINP: mean, 100 % | 32 |" in leaks
    assert "| 33 |" in leaks
    assert (tables / "toy-diagnosis.leaks.csv").read_text().splitlines()[1] == f"{DATASET},sub-01,the same id"
    confused = pd.read_csv(tables / "toy-diagnosis.confusion.csv")
    assert confused.query("row == 'CINP: mean, 100 %' and seed == 'all'")["cases"].sum() == 32
    assert prompt.fn(params(workspace, **asked, with_seen=False))["scored"] == 0
    assert "and are left out. They were not scored" in (tables / "toy-diagnosis.leaks.md").read_text()
    assert found["scored"] > 0


@pytest.mark.full
def test_seeds_controls_and_the_supervised_network_on_a_server(workspace: Path, prefect_server: ServerInfo) -> None:
    rows = [{"name": "CINP", "trainings": ["one", "two"]}, {"name": "no contrast", "trainings": ["matched"]}]
    names = ["toy-diagnosis", "toy-shuffled"]
    more: dict[str, Any] = {"rows": rows, "benchmarks": names, "network_epochs": 2, "folds": 4}
    found = prompt(params(workspace, **more))
    # 2 + 1 trainings by 1 + 2 draws, or by 2 + 2 shuffles; probes of them; one of images; six others.
    probed = (2 + 1) * 3 + 1
    assert found["scored"] == (3 * (1 + 2) + probed + 6) + (3 * (2 + 2) + probed + 6 * 2)
    table = pd.read_csv(workspace / "prompts" / "tables" / "toy-shuffled.csv")
    control = table.query("metric == 'auroc' and row == 'CINP: mean, 50 %'").iloc[0]
    assert control["seeds"] == 4
    assert control["low"] < 0.5 < control["high"]
    text = (workspace / "prompts" / "tables" / "toy-shuffled.md").read_text()
    assert "Negative control: labels shuffled anew" in text
    assert "matched was trained without contrast: its projections are as they were initialised" in text
    assert f"| {NETWORK} | 30 | 2 |" in text
    assert prompt(params(workspace, **more))["scored"] == 0


def test_what_cannot_be_prompted_is_refused_before_any_work(workspace: Path, unwatched: None, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="unknown prompting task 'nope'; known: phantom-connect-diagnosis"):
        prompt.fn(params(workspace, benchmarks=["nope"]))
    rows = [{"name": "a", "trainings": ["masked"]}]
    with pytest.raises(PromptError, match=r"training masked \(recipe 'cinp_tiny'\) has no encoder of connectomes"):
        prompt.fn(params(workspace, rows=rows, image_only=[]))
    with pytest.raises(NotFinishedError, match=r"absent has no done\.json: it is no finished training; run"):
        prompt.fn(params(workspace, rows=[{"name": "a", "trainings": ["absent"]}]))
    with pytest.raises(PairError, match=r"training other and the store .* differ in atlas \('other_six' and 'six'\)"):
        prompt.fn(params(workspace, rows=[{"name": "a", "trainings": ["other"]}]))
    spec = TOY.replace(name="toy-t2", modalities=("t2",))
    PROMPT_TASKS[spec.name] = spec
    try:
        with pytest.raises(PromptError, match="training one embeds t1, a task asks for t2; prompt with a training on"):
            prompt.fn(params(workspace, benchmarks=["toy-t2"]))
    finally:
        del PROMPT_TASKS[spec.name]
    write_workspace(tmp_path, [Made(f"sub-{k:02d}", image=False) for k in range(CASES)])
    only_networks = params(workspace, store=str(tmp_path / "store.zarr"), benchmarks=["toy-diagnosis"])
    with pytest.raises(PromptError, match="36 unseen subjects have a connectome and a known target, none has an image"):
        prompt.fn(only_networks)


def test_the_form_says_bounds_in_words_and_refuses_the_rest() -> None:
    for name, field in PromptParams.model_json_schema()["properties"].items():
        assert field["title"], name
        assert field["description"].endswith("."), name
    with pytest.raises(ValidationError, match="two rows are called like 'CINP'; names must differ in letters"):
        PromptParams(rows=ROWS, image_only=[{"name": "cinp", "trainings": ["b"]}])
    with pytest.raises(ValidationError, match="'Majority class' is the name of a row that every table has"):
        PromptParams(rows=[{"name": "Majority class", "trainings": ["a"]}])
    with pytest.raises(ValidationError, match="String should match pattern"):
        PromptParams(rows=[{"name": "a", "trainings": ["../../elsewhere"]}])
    with pytest.raises(ValidationError, match="shares has a value twice"):
        PromptParams(rows=ROWS, shares=[0.5, 0.5])
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        PromptParams(rows=ROWS, shares=[10])
    assert run_name(PromptParams(rows=ROWS, benchmarks=["cinp-abide"])) == "prompt CINP on cinp-abide"


def test_the_example_of_the_documentation_is_valid() -> None:
    text = (Path(__file__).parents[2] / "docs" / "prompting.md").read_text(encoding="utf-8")
    found = PromptParams.model_validate(yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]))
    assert set(found.benchmarks) <= set(PROMPT_TASKS)
