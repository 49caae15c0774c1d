"""`--dry-run` says what a flow would cost, and starts nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from layouts import write_bids
from nifti_files import SMALL
from typer.testing import CliRunner

from brainloom import cli
from brainloom.cli import app
from flows import preprocess as module
from flows.catalog import CatalogParams
from flows.preprocess import PreprocessParams
from models import records
from models.store import StoreError, create_or_open
from tasks import plan as plans
from tasks import receipts, shards
from tasks.catalog import build_catalog, read_catalog, write_catalog
from tasks.preprocess import preprocess_batch


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Return YAML files of both flows for the phantom subjects; nothing is catalogued yet."""

    def started(*_: object, **__: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr("infra.server.connect", started)
    monkeypatch.setattr(module, "DaskTaskRunner", started)
    monkeypatch.setattr(cli, "prepare_prefect", lambda settings: None)
    monkeypatch.setitem(records.SPECS, "small", SMALL)
    ws = tmp_path / "ws"
    source = write_bids(tmp_path / "bids").model_dump(mode="json")
    contents = {
        "catalog": {"sources": [source], "workspace": str(ws)},
        "preprocess": {"catalog": str(ws), "store": str(ws / "s.zarr"), "spec": "small", "workers": 1},
    }
    for verb, content in contents.items():
        (tmp_path / f"{verb}.yaml").write_text(yaml.safe_dump(content))
    return {verb: tmp_path / f"{verb}.yaml" for verb in contents}


def say(configs: dict[str, Path], verb: str) -> str:
    done = CliRunner().invoke(app, [verb, "--config", str(configs[verb]), "--dry-run"], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def catalogued(configs: dict[str, Path]) -> PreprocessParams:
    params = CatalogParams.model_validate(yaml.safe_load(configs["catalog"].read_text()))
    write_catalog(build_catalog(params.sources), params.workspace)
    return PreprocessParams.model_validate(yaml.safe_load(configs["preprocess"].read_text()))


def test_the_catalog(configs: dict[str, Path], tmp_path: Path) -> None:
    text = say(configs, "catalog")
    assert "demo (bids): 7 files, " in text
    assert text.endswith("Nothing was started.\n")
    assert not (tmp_path / "ws").exists()


def test_a_source_without_a_scan_is_refused_as_the_run_would(configs: dict[str, Path]) -> None:
    content = yaml.safe_load(configs["catalog"].read_text())
    content["sources"][0]["entities"] = {"spaze": "MNI"}
    configs["catalog"].write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"dataset demo: no scan was found below .* as bids; check `root` and `kind`"):
        say(configs, "catalog")


def test_a_new_store(configs: dict[str, Path], tmp_path: Path) -> None:
    catalogued(configs)
    text = say(configs, "preprocess")
    assert "3 to preprocess of 3: 7 files" in text
    assert "with 1 workers (voxels in the headers at the rates of docs/speed.md" in text
    assert not (tmp_path / "ws/s.zarr").exists()


def test_a_store_that_has_some_cases(configs: dict[str, Path]) -> None:
    params = catalogued(configs)
    wanted = plans.plan_rows(plans.cases_from_scans(read_catalog(params.catalog)), ()).added
    writer = create_or_open(params.store, SMALL)
    plans.write_plan(writer.url, wanted, SMALL.content_digest())
    writer.grow("demo", len(wanted), with_label=True)
    preprocess_batch(writer.url, [case.model_dump(mode="json") for case in wanted[:1]], "token")
    receipts.write_receipt(writer.url, receipts.empty_receipt(wanted[1], SMALL.content_digest(), "unreadable", "why"))
    shards.finalise(writer.url, wanted)
    before = {path: path.stat().st_mtime_ns for path in Path(params.store).rglob("*")}
    text = say(configs, "preprocess")
    assert "1 to preprocess of 3: 1 files" in text
    assert "1 stored cases took" in text
    assert "1 stored cases take" in text
    assert {path: path.stat().st_mtime_ns for path in Path(params.store).rglob("*")} == before
    again = params.model_copy(update={"retry_quarantined": True})
    assert "2 to preprocess of 3: 3 files" in module.dry_run(again)
    with pytest.raises(StoreError, match="was built with another preprocessing spec"):
        module.dry_run(params.model_copy(update={"spec": "brainmvp"}))


def test_other_verbs_have_no_dry_run(configs: dict[str, Path]) -> None:
    done = CliRunner().invoke(app, ["pretrain", "--config", str(configs["catalog"]), "--dry-run"])
    assert done.exit_code == 2
    assert "No such option" in done.output
