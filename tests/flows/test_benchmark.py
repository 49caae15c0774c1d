"""The chain: its links, their order, what each is given; the chain itself runs in tests/test_end_to_end.py."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from brainloom.cli_benchmark import benchmark_options
from brainloom.cli_demo import Preset
from flows import benchmark as module
from flows import benchmark_runs
from flows.benchmark import PlaceError, benchmark
from flows.benchmark_params import PRESETS, BenchmarkParams, by_protocol, demo_params, tiny_params
from flows.evaluate_params import EvaluateParams
from models.spec import SPECS
from tasks.benchmark_summary import ALL
from tasks.benchmarks import BENCHMARKS
from tasks.prompt_tasks import PROMPT_TASKS
from tasks.rows import Run
from tasks.scores import ScoreError
from tasks.serving import RunError, Serving
from tasks.sources.bids import BidsSource


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Play the links, which leave what they made in the workspace; returns what was started with which parameters."""
    return played(monkeypatch)[0]


def played(monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[str, Any]], list[str | None]]:
    """Return what was started with which parameters, and by which deployments."""
    started: list[tuple[str, Any]] = []
    deployments: list[str | None] = []

    def start(flow: Any, deployment: str | None = None, *, params: Any) -> None:
        started.append((flow.name, params))
        deployments.append(deployment)
        if flow.name == "pretrain":
            leave(Path(params.workspace, "trainings", params.recipe, "done.json"), DONE)
        if flow.name == "evaluate":
            leave(Path(params.workspace, "report", "evaluation.json"), {"digests": {"phantom-tumour": "d3"}})

    monkeypatch.setattr(module, "start", start)
    monkeypatch.setattr(module, "store_digest", lambda url: "d1")
    monkeypatch.setattr(module, "_write_split", lambda *given: started.append(("split", given[2:])))
    return started, deployments


DONE = {"weights_digest": "d2", "metrics": {"psnr": 1.0}}


def leave(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_the_links_run_in_order_and_hand_on_the_workspace(links: list[tuple[str, Any]], tmp_path: Path) -> None:
    result = benchmark.fn(tiny_params(tmp_path))
    assert [name for name, _ in links] == ["phantom", "catalog", "preprocess", "split", "pretrain", "evaluate"]
    given = dict(links)
    assert given["phantom"].root == str(tmp_path / "sources")
    assert [source.dataset for source in given["catalog"].sources] == ["phantom-bids", "phantom-16k"]
    assert given["catalog"].workspace == str(tmp_path)
    assert given["preprocess"].catalog == str(tmp_path / "catalog.parquet")
    assert given["preprocess"].store == str(tmp_path / "store.zarr")
    assert (given["pretrain"].workspace, given["pretrain"].epochs) == (str(tmp_path), 4)
    assert given["split"] == ("default", (0.5, 0.15, 0.35))
    assert (given["evaluate"].pretrained, given["evaluate"].seeds, given["evaluate"].lanes) == ("brainmvp_tiny", 1, 2)
    assert not given["evaluate"].template_mix
    assert not given["evaluate"].missing_modalities
    assert result == {
        "store": str(tmp_path / "store.zarr"),
        "store_digest": "d1",
        "weights": str(tmp_path / "trainings/brainmvp_tiny/weights.safetensors"),
        "weights_digest": "d2",
        "reconstruction": {"psnr": 1.0},
        "tables": [str(tmp_path / "tables" / "phantom-tumour.md")],
        "report": str(tmp_path / "report/index.html"),
    }


def test_a_deployed_chain_starts_the_deployments_of_its_links_and_returns_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, deployments = played(monkeypatch)
    here = benchmark.fn(tiny_params(tmp_path))
    assert deployments == [None] * 5
    deployments.clear()
    assert benchmark.fn(tiny_params(tmp_path).model_copy(update={"deployed": True})) == here
    # Phantoms have no deployment: they are written where the chain runs.
    assert deployments == [None, *(f"{name}/{name}" for name in ("catalog", "preprocess", "pretrain", "evaluate"))]


@pytest.mark.parametrize(
    ("queue", "places", "words"),
    [
        ("trainings", "4", "holds the only place of the queue 'trainings'.*start the deployment benchmark/chain"),
        ("default", "1", r"one flow run at a time \(BRAINLOOM_FLOW_RUNS=1\).*start the worker with 2 or more"),
    ],
)
def test_a_chain_that_would_wait_for_itself_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, queue: str, places: str, words: str
) -> None:
    started, _ = played(monkeypatch)
    run = SimpleNamespace(deployment_id="some", work_queue_name=queue)
    monkeypatch.setattr(module, "FlowRunContext", SimpleNamespace(get=lambda: SimpleNamespace(flow_run=run)))
    monkeypatch.setenv("BRAINLOOM_FLOW_RUNS", places)
    with pytest.raises(PlaceError, match=words):
        benchmark.fn(tiny_params(tmp_path).model_copy(update={"deployed": True}))
    assert started == []


def test_with_runs_nothing_is_made_and_every_protocol_has_its_flow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked, checked = {}, []

    def start(flow: Any, params: Any) -> dict[str, Any]:
        asked[flow.name] = params
        return {"report": flow.name, "tables": dict.fromkeys(params.benchmarks, "d"), "scored": 2, "no_data": []}

    published: list[str] = []
    monkeypatch.setattr(benchmark_runs, "start", start)
    monkeypatch.setattr(benchmark_runs, "open_store", lambda url: url)

    def check(runs: list[Run], *more: Any) -> Serving:
        checked.append((runs, *more))
        return Serving(tuple(runs), {("other", next(iter(PROMPT_TASKS))): "it has no encoder of connectomes"})

    monkeypatch.setattr(benchmark_runs, "check_runs", check)
    monkeypatch.setattr(benchmark_runs, "publish_markdown", lambda key, *_: published.append(key))
    monkeypatch.setattr("tasks.benchmark_summary._primary_lines", lambda *_: ())
    names = ["phantom-tumour", "openbhb-age", "adni", next(iter(PROMPT_TASKS))]
    runs = [{"training": "cinp", "name": "CINP", "repeats": ["cinp-seed1"]}, {"training": "other"}]
    given = {"workspace": str(tmp_path), "runs": runs, "benchmarks": names, "seeds": 2, "split": "paper"}
    more = {"replicates": 300, "folds": 7, "knn": True, "combat": True, "with_seen": False, "probe_store": "gm.zarr"}
    params = BenchmarkParams.model_validate({**given, **more})
    found = benchmark.fn(params)
    assert list(asked) == ["probe", "prompt", "evaluate"]
    assert [run.name for run in checked[0][0]] == ["CINP", "other"]
    assert asked["evaluate"].benchmarks == ["phantom-tumour", "adni"]
    assert (asked["evaluate"].seeds, asked["evaluate"].first) == (2, "CINP")
    assert [(row.name, row.trainings) for row in asked["probe"].rows] == [
        ("CINP", ["cinp", "cinp-seed1"]),
        ("other", ["other"]),
    ]
    assert [run.repeats for run in checked[0][0]] == [(tmp_path / "trainings" / "cinp-seed1",), ()]
    assert [row.name for row in asked["prompt"].rows] == ["CINP"]
    assert (asked["probe"].store, asked["prompt"].store) == ("gm.zarr", "")
    assert checked[0][3]["probe"] == str(Path("gm.zarr").resolve())
    assert asked["prompt"].benchmarks == names[3:]
    assert (asked["evaluate"].split, asked["evaluate"].replicates, asked["probe"].knn) == ("paper", 300, True)
    assert asked["probe"].combat
    assert [(asked[name].folds, asked[name].with_seen) for name in ("probe", "prompt")] == [(7, False)] * 2
    assert found["scored"] == 6
    assert found["reports"] == {"probe": "probe", "prompt": "prompt", "fine-tune": "evaluate"}
    assert str(tmp_path / "probes" / "tables" / "openbhb-age.md") in found["tables"]
    assert published == ["benchmark-summary"]
    page = Path(found["page"]).read_text()
    assert 'href="../probes/index.html#openbhb-age"' in page
    text = Path(found["summary"]).read_text()
    assert "No data in the store: OpenBHB age." in text
    assert "- other is left out: it has no encoder of connectomes." in text
    assert text.count("is left out") == 1


def test_templates_that_no_run_has_are_refused_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(benchmark_runs, "start", lambda *_, **__: pytest.fail("something was started"))
    monkeypatch.setattr(benchmark_runs, "open_store", lambda url: url)
    monkeypatch.setattr(benchmark_runs, "check_runs", lambda runs, *_: Serving(tuple(runs), {}))
    (tmp_path / "trainings" / "mae").mkdir(parents=True)
    (tmp_path / "trainings" / "mae" / "run.json").write_text('{"objective": {"kind": "mae"}}')
    asked = {"workspace": str(tmp_path), "runs": [{"training": "mae"}], "benchmarks": ["openbhb-age", "phantom-tumour"]}
    with pytest.raises(RunError, match="template_mix needs the template bank of the first run, and 'mae' was not pre"):
        benchmark.fn(BenchmarkParams.model_validate({**asked, "template_mix": True}))
    with pytest.raises(
        RunError, match="missing_modalities compares zeros with learned templates, and none of the runs"
    ):
        benchmark.fn(BenchmarkParams.model_validate({**asked, "missing_modalities": True}))


@pytest.mark.parametrize("runs", [[], [{"training": "mae"}]], ids=["chain", "runs"])
def test_folders_of_predictions_are_looked_for_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: list[dict[str, str]]
) -> None:
    started, _ = played(monkeypatch)
    monkeypatch.setattr(benchmark_runs, "open_store", lambda *_: pytest.fail("the store was opened"))
    row = {"name": "nnU-Net", "benchmark": "phantom-tumour", "folder": str(tmp_path / "mistyped")}
    asked = {"workspace": str(tmp_path), "runs": runs, "benchmarks": ["phantom-tumour"], "predictions": [row]}
    asked |= {} if runs else {"phantom": {}}
    with pytest.raises(ScoreError, match=r"'nnU-Net' for phantom-tumour: .*mistyped is no folder on this host"):
        benchmark.fn(BenchmarkParams.model_validate(asked))
    assert started == []


def test_predictions_are_looked_at_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started, _ = played(monkeypatch)

    def refuse(params: EvaluateParams) -> None:
        raise ScoreError(f"{params.predictions[0].name} lies on another grid")

    monkeypatch.setattr(benchmark_runs, "check_given", refuse)
    monkeypatch.setattr(benchmark_runs, "_serving", lambda _, runs: Serving(tuple(runs), {}))
    row = {"name": "nnU-Net", "benchmark": "phantom-tumour", "folder": str(tmp_path)}
    asked = {"workspace": str(tmp_path), "runs": [{"training": "mae"}], "predictions": [row]}
    with pytest.raises(ScoreError, match="nnU-Net lies on another grid"):
        benchmark.fn(BenchmarkParams.model_validate({**asked, "benchmarks": ["openbhb-age", "phantom-tumour"]}))
    assert started == []


def test_a_deployed_chain_looks_into_its_workspace_and_hands_on_absolute_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started, _ = played(monkeypatch)
    monkeypatch.chdir(tmp_path)
    row = {"name": "nnU-Net", "benchmark": "phantom-tumour", "folder": "../on-another-host"}
    asked = {**tiny_params(Path()).model_dump(), "deployed": True}
    benchmark.fn(BenchmarkParams.model_validate({**asked, "predictions": [row]}))
    assert [one.folder for one in dict(started)["evaluate"].predictions] == [str(tmp_path.parent / "on-another-host")]
    started.clear()
    with pytest.raises(ScoreError, match="mistyped is no folder on this host"):
        benchmark.fn(BenchmarkParams.model_validate({**asked, "predictions": [{**row, "folder": "mistyped"}]}))
    assert started == []


def test_benchmarks_by_protocol() -> None:
    assert by_protocol(["adni", "openbhb-age", "adni"]) == {"fine-tune": ["adni"], "probe": ["openbhb-age"]}


def test_templates_downstream_can_be_asked_for(links: list[tuple[str, Any]], tmp_path: Path) -> None:
    asked = {"template_mix": True, "missing_modalities": True, "native_scores": True, "label_shares": [0.5]}
    benchmark.fn(tiny_params(tmp_path).model_copy(update=asked))
    assert asked.items() <= dict(links)["evaluate"].model_dump().items()


def test_another_split_is_that_of_the_whole_chain(links: list[tuple[str, Any]], tmp_path: Path) -> None:
    benchmark.fn(tiny_params(tmp_path).model_copy(update={"split": "paper"}))
    given = dict(links)
    assert (given["split"][0], given["pretrain"].split, given["evaluate"].split) == ("paper", "paper", "paper")


def test_without_phantoms_only_the_sources_are_read(links: list[tuple[str, Any]], tmp_path: Path) -> None:
    source = BidsSource(dataset="ixi", root="/data/ixi")
    benchmark.fn(BenchmarkParams(workspace=str(tmp_path), sources=[source]))
    assert [name for name, _ in links][:2] == ["catalog", "preprocess"]
    assert dict(links)["catalog"].sources == [source]


def test_phantoms_and_sources_go_together(links: list[tuple[str, Any]], tmp_path: Path) -> None:
    source = BidsSource(dataset="ixi", root="/data/ixi")
    benchmark.fn(tiny_params(tmp_path).model_copy(update={"sources": [source]}))
    assert [one.dataset for one in dict(links)["catalog"].sources] == ["phantom-bids", "phantom-16k", "ixi"]


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_name_what_is_registered(name: str, tmp_path: Path) -> None:
    params = PRESETS[name](tmp_path)
    assert params.name == name
    assert params.workspace == str(tmp_path)
    assert params.spec in SPECS
    assert set(params.benchmarks) <= set(BENCHMARKS)
    assert params.phantom is not None
    assert params.phantom.broken
    assert sum(params.split_shares) == pytest.approx(1)
    assert BenchmarkParams.model_validate(params.model_dump(mode="json")) == params


def test_the_command_line_offers_every_preset() -> None:
    assert {preset.value for preset in Preset} == set(PRESETS)


def test_the_demo_has_three_seeds_and_both_controls(tmp_path: Path) -> None:
    params = demo_params(tmp_path)
    assert params.seeds >= 3
    kinds = {BENCHMARKS[name].kind for name in params.benchmarks}
    assert {"segmentation", "classification"} <= kinds
    assert any("control" in name for name in params.benchmarks)


@pytest.mark.parametrize("as_form", [False, True])
def test_the_flow_run_is_named_after_the_parameters(monkeypatch: pytest.MonkeyPatch, as_form: bool) -> None:
    params: Any = tiny_params(Path()).model_copy(update={"name": "night"})
    given = {"params": params.model_dump(mode="json") if as_form else params}
    monkeypatch.setattr("flows.forms.runtime.flow_run", SimpleNamespace(parameters=given), raising=False)
    assert module._run_name() == "benchmark night"
    params = BenchmarkParams.model_validate({"runs": [{"training": "a"}, {"training": "b", "name": "B"}]})
    monkeypatch.setattr("flows.forms.runtime.flow_run", SimpleNamespace(parameters={"params": params}), raising=False)
    assert module._run_name() == "benchmark a, B"


def test_parameters_make_a_form() -> None:
    schema = BenchmarkParams.model_json_schema()
    assert schema["additionalProperties"] is False
    for params, offered in ((BenchmarkParams, ALL), (EvaluateParams, BENCHMARKS)):
        assert params.model_json_schema()["properties"]["benchmarks"]["items"]["enum"] == list(offered)
    for name, field in schema["properties"].items():
        assert field["title"], name
        assert field["description"].endswith("."), name


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"seed": 3}, "Extra inputs are not permitted"),
        ({"seeds": 0}, "greater than or equal to 1"),
        ({"benchmarks": []}, "at least 1 item"),
        ({"recipe": "nnunet"}, "'simclr_crops_unet_tiny' or 'simclr_crops_unet'"),
        ({"max_quarantined_share": 2}, "less than or equal to 1"),
        ({"workspace": ""}, "at least 1 character"),
        ({"benchmarks": ["nope"]}, "unknown benchmark 'nope'; known: phantom-tumour"),
        ({"benchmarks": ["openbhb-age"]}, "'openbhb-age' is a probe of finished trainings; name them under `runs`"),
        ({"label_shares": [1.0]}, "label shares lie between 0 and 1, got 1"),
        ({"runs": [{"training": "../a"}]}, "String should match pattern"),
        ({"runs": [{"training": "a"}, {"training": "b", "name": "A"}]}, "two rows are called like 'a'"),
        ({"runs": [{"training": "a"}, {"training": "a", "name": "b"}]}, "training 'a' is named in two rows"),
        ({"runs": [{"training": "a", "repeats": ["a"]}]}, "'a' is named in two rows, or twice in one; every training"),
        ({"runs": [{"training": "a", "name": "Majority"}]}, "is the name of a row that every table has"),
        ({"runs": [{"training": "a", "name": "pre-trained"}]}, "is the name of a row that every table has"),
        ({"runs": [{"training": "a", "name": "scratch (x)"}]}, "starts as the names of rows from scratch do"),
        ({"runs": [{"training": "a", "name": "αβγ"}]}, "'αβγ' has no letter a-z or digit"),
        ({"runs": [{"training": "a", "name": "a\nb"}]}, "has a line break or a character that cannot be printed"),
        ({"runs": [{"training": "a", "name": " =1+1"}]}, "begins as a formula of a spreadsheet does; begin with a"),
        ({"runs": [{"training": "-a"}]}, "'-a' begins as a formula"),
        (
            {"runs": [{"training": "a", "name": "labels50 X"}]},
            "starts as what is kept of label_shares or native_scores",
        ),
        ({"runs": [{"training": "a", "name": "Native X"}]}, "starts as what is kept of label_shares or native_scores"),
        ({"split": "../evil"}, "String should match pattern"),
        (
            {"runs": [{"training": "a", "name": "random encoder"}], "benchmarks": ["openbhb-age"]},
            "is the name of a row that every table has",
        ),
        ({"runs": [{"training": "a"}], "phantom": {}}, "with `runs` nothing is ingested or pre-trained; leave `phan"),
        ({"networks": ["unet"]}, "'swin_unetr' or 'dynunet'"),
        ({"networks": ["dynunet", "dynunet"]}, "network 'dynunet' is named twice"),
        ({}, "there is nothing to work on: name `sources`, a `phantom` cohort, or trainings in `runs`"),
        (
            {"recipe": "mae_tiny", "template_mix": True},
            "template_mix and missing_modalities need learned templates, and mae_tiny learns none; choose a BrainMVP",
        ),
    ],
)
def test_wrong_parameters_are_refused(bad: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        BenchmarkParams.model_validate(bad)


def test_the_example_of_the_documentation_is_valid() -> None:
    text = (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text(encoding="utf-8")
    found = BenchmarkParams.model_validate(yaml.safe_load(text.split("```yaml\n")[2].split("```")[0]))
    assert [run.name for run in found.runs] == ["BrainMVP", "MAE", "released"]
    assert set(by_protocol(found.benchmarks)) == {"fine-tune", "probe"}


def test_options_of_the_command_line() -> None:
    given = benchmark_options(Path("w"), ["BrainMVP, a=b=mvp+mvp-1+mvp-2", "other"], ["adni"], None, 2, None)
    assert given == {
        "workspace": "w",
        "runs": [{"training": "mvp", "name": "BrainMVP, a=b", "repeats": ["mvp-1", "mvp-2"]}, {"training": "other"}],
        "benchmarks": ["adni"],
        "seeds": 2,
    }
    assert benchmark_options(None, None, None, None, None, None) == {}
