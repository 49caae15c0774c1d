"""The chain: its links, their order, what each is given; the chain itself runs in tests/test_end_to_end.py."""

from __future__ import annotations

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
from flows.benchmark import benchmark
from flows.benchmark_params import PRESETS, BenchmarkParams, by_protocol, demo_params, tiny_params
from flows.evaluate_params import EvaluateParams
from models.spec import SPECS
from tasks.benchmark_summary import ALL
from tasks.benchmarks import BENCHMARKS
from tasks.prompt_tasks import PROMPT_TASKS
from tasks.sources.bids import BidsSource


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Play the links; returns what was started with which parameters."""
    started: list[tuple[str, Any]] = []
    answers: dict[str, Any] = {
        "preprocess": {"digest": "d1"},
        "pretrain": {"training": "mvp", "folder": "/w/trainings/mvp", "weights_digest": "d2", "metrics": {"psnr": 1.0}},
        "evaluate": {"tables": {"phantom-tumour": "d3"}, "report": "/w/report/index.html"},
    }

    def start(flow: Any, params: Any) -> Any:
        started.append((flow.name, params))
        return answers.get(flow.name)

    monkeypatch.setattr(module, "start", start)
    monkeypatch.setattr(module, "_write_split", lambda *given: started.append(("split", given[2:])))
    return started


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
    assert (given["evaluate"].pretrained, given["evaluate"].seeds, given["evaluate"].lanes) == ("mvp", 1, 2)
    assert not given["evaluate"].template_mix
    assert not given["evaluate"].missing_modalities
    assert result == {
        "store": str(tmp_path / "store.zarr"),
        "store_digest": "d1",
        "weights": "/w/trainings/mvp/weights.safetensors",
        "weights_digest": "d2",
        "reconstruction": {"psnr": 1.0},
        "tables": [str(tmp_path / "tables" / "phantom-tumour.md")],
        "report": "/w/report/index.html",
    }


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
    monkeypatch.setattr(benchmark_runs, "check_runs", lambda *given: checked.append(given))
    monkeypatch.setattr(benchmark_runs, "publish_markdown", lambda key, *_: published.append(key))
    monkeypatch.setattr("tasks.benchmark_summary._primary_lines", lambda *_: ())
    names = ["phantom-tumour", "openbhb-age", "adni", next(iter(PROMPT_TASKS))]
    runs = [{"training": "cinp", "name": "CINP"}, {"training": "other"}]
    given = {"workspace": str(tmp_path), "runs": runs, "benchmarks": names, "seeds": 2, "split": "paper"}
    more = {"replicates": 300, "folds": 7, "knn": True, "with_seen": False}
    params = BenchmarkParams.model_validate({**given, **more})
    found = benchmark.fn(params)
    assert list(asked) == ["probe", "prompt", "evaluate"]
    assert [run.name for run in checked[0][0]] == ["CINP", "other"]
    assert asked["evaluate"].benchmarks == ["phantom-tumour", "adni"]
    assert (asked["evaluate"].seeds, asked["evaluate"].first) == (2, "CINP")
    assert [(row.name, row.trainings) for row in asked["probe"].rows] == [("CINP", ["cinp"]), ("other", ["other"])]
    assert asked["prompt"].benchmarks == names[3:]
    assert (asked["evaluate"].split, asked["evaluate"].replicates, asked["probe"].knn) == ("paper", 300, True)
    assert [(asked[name].folds, asked[name].with_seen) for name in ("probe", "prompt")] == [(7, False)] * 2
    assert found["scored"] == 6
    assert found["reports"] == {"probe": "probe", "prompt": "prompt", "fine-tune": "evaluate"}
    assert str(tmp_path / "probes" / "tables" / "openbhb-age.md") in found["tables"]
    assert published == ["benchmark-summary"]
    page = Path(found["page"]).read_text()
    assert 'href="../probes/index.html#openbhb-age"' in page
    assert "No data in the store: OpenBHB age." in Path(found["summary"]).read_text()


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
    params: Any = BenchmarkParams(name="night")
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
        ({"recipe": "nnunet"}, "'brainmvp_unet_tiny' or 'brainmvp_unet'"),
        ({"max_quarantined_share": 2}, "less than or equal to 1"),
        ({"workspace": ""}, "at least 1 character"),
        ({"benchmarks": ["nope"]}, "unknown benchmark 'nope'; known: phantom-tumour"),
        ({"benchmarks": ["openbhb-age"]}, "'openbhb-age' is a probe of finished trainings; name them under `runs`"),
        ({"label_shares": [1.0]}, "label shares lie between 0 and 1, got 1"),
        ({"runs": [{"training": "../a"}]}, "String should match pattern"),
        ({"runs": [{"training": "a"}, {"training": "b", "name": "A"}]}, "two rows are called like 'a'"),
        ({"runs": [{"training": "a"}, {"training": "a", "name": "b"}]}, "training 'a' is named in two rows"),
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
    given = benchmark_options(Path("w"), ["BrainMVP, a=b=mvp", "other"], ["adni"], None, 2, None)
    assert given == {
        "workspace": "w",
        "runs": [{"training": "mvp", "name": "BrainMVP, a=b"}, {"training": "other"}],
        "benchmarks": ["adni"],
        "seeds": 2,
    }
    assert benchmark_options(None, None, None, None, None, None) == {}
