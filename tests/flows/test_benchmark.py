"""The chain: its links, their order, what each is given; the chain itself runs in tests/test_end_to_end.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from brainloom.cli_demo import Preset
from flows import benchmark as module
from flows.benchmark import PRESETS, BenchmarkParams, benchmark, demo_params, tiny_params
from flows.evaluate_params import EvaluateParams
from models.spec import SPECS
from tasks.benchmarks import BENCHMARKS
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
    monkeypatch.setattr(module, "_write_split", lambda workspace, store, shares: started.append(("split", shares)))
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


def test_templates_downstream_can_be_asked_for(links: list[tuple[str, Any]], tmp_path: Path) -> None:
    asked = {"template_mix": True, "missing_modalities": True}
    benchmark.fn(tiny_params(tmp_path).model_copy(update=asked))
    assert asked.items() <= dict(links)["evaluate"].model_dump().items()


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
    monkeypatch.setattr(module.runtime, "flow_run", SimpleNamespace(parameters=given), raising=False)
    assert module._run_name() == "benchmark night"


def test_parameters_make_a_form() -> None:
    schema = BenchmarkParams.model_json_schema()
    assert schema["additionalProperties"] is False
    for params in (BenchmarkParams, EvaluateParams):
        assert params.model_json_schema()["properties"]["benchmarks"]["items"]["enum"] == list(BENCHMARKS)
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
    ],
)
def test_wrong_parameters_are_refused(bad: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        BenchmarkParams.model_validate(bad)
