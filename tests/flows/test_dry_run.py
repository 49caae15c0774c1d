"""`--dry-run` says what a flow would cost, and starts nothing."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml
from layouts import write_bids
from nifti_files import SMALL
from pydantic import ValidationError
from typer.testing import CliRunner

from brainloom import cli
from brainloom.cli import app, main
from flows import preprocess as module
from flows import preprocess_params
from flows.catalog import CatalogParams
from flows.ingest import IngestParams
from flows.preprocess import PreprocessParams
from infra import storage
from models.spec import SPECS
from models.store import StoreError, create_or_open
from tasks import dry_run, estimate, receipts, shards
from tasks import plan as plans
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
    monkeypatch.setitem(SPECS, "small", SMALL)
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
    wanted = plans.plan_rows(plans.cases_from_scans(read_catalog(params.catalog)), (), SMALL).added
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


def test_a_store_that_is_to_be_repaired_is_read_once(configs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    params = catalogued(configs).model_copy(update={"repair": True})
    read: list[str] = []
    damaged = {("demo", 1), ("gone", 0)}
    monkeypatch.setattr(preprocess_params, "rows_to_repair", lambda url, repair: read.append(url) or damaged)
    # Even where the disk seems too small for all, so that what is left to do must be known before.
    monkeypatch.setattr(preprocess_params, "bare_bytes", lambda cases, spec: 1 << 62)
    assert "3 to preprocess of 3, 1 of them damaged rows: 7 files" in module.dry_run(params)
    assert read == [str(storage.local_path(params.store))]


def refused(configs: dict[str, Path], verb: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command as the shell does; return what it says on its way out with 2."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["brainloom", verb, "--config", str(configs[verb]), "--dry-run"])
        patch.setenv("COLUMNS", "1000")
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", "").split())


def change(configs: dict[str, Path], verb: str, **params: object) -> None:
    content = yaml.safe_load(configs[verb].read_text()) | params
    configs[verb].write_text(yaml.safe_dump({name: value for name, value in content.items() if value is not None}))


def test_a_place_that_is_no_store_is_refused_as_the_run_would(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogued(configs)
    change(configs, "preprocess", store=str(tmp_path / "bids"))
    text = refused(configs, "preprocess", capsys)
    assert "bids is not empty and is no store: it holds [" in text
    assert text.endswith("choose another place")
    change(configs, "preprocess", store=str(tmp_path / "preprocess.yaml"))
    assert "preprocess.yaml is a file and no store; choose another place" in refused(configs, "preprocess", capsys)


def test_absurd_sizes_are_refused_as_the_run_would(
    configs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogued(configs)
    huge = {"name": "huge", "grid": [9000, 9000, 9000]}
    change(configs, "preprocess", spec=None, own_spec=huge)
    assert "error: memory refused: spec 'huge' with grid" in refused(configs, "preprocess", capsys)
    # More for a worker than the machine has is no more than the machine has.
    monkeypatch.setenv("BRAINLOOM_WORKER_MEMORY", "100TiB")
    assert "memory refused: spec 'huge'" in refused(configs, "preprocess", capsys)
    for place in (preprocess_params, dry_run):
        monkeypatch.setattr(place, "free_bytes", lambda url: 100)
    change(configs, "preprocess", spec="small", own_spec=None)
    text = refused(configs, "preprocess", capsys)
    assert re.search(r"s\.zarr needs at least .* for 3 cases .*, 100 B are free; make room, choose another", text)


def test_cases_that_would_all_be_refused_end_the_dry_run(
    configs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogued(configs)
    monkeypatch.setattr(plans, "projected_bytes", lambda scans, spec: 2**50 if scans else 0)
    monkeypatch.setattr(estimate, "projected_bytes", lambda scans, spec: 2**50)
    text = refused(configs, "preprocess", capsys)
    assert "3 of 3 cases (100.0%) would be refused for their memory, 5.0% may be in quarantine" in text
    assert text.endswith("Nothing was started.")


def test_a_file_that_is_no_catalog_is_refused(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogued(configs)
    change(configs, "preprocess", catalog=str(tmp_path / "ws/phenotypes.parquet"))
    text = refused(configs, "preprocess", capsys)
    assert "phenotypes.parquet is not a catalog: it has no column 'case'; its columns: dataset, subject" in text


def test_ingest_before_and_after_there_is_a_catalog(
    configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = {verb: yaml.safe_load(configs[verb].read_text()) for verb in ("catalog", "preprocess")}
    configs["ingest"] = tmp_path / "ingest.yaml"
    configs["ingest"].write_text(yaml.safe_dump(parts))
    text = say(configs, "ingest")
    assert text.startswith("catalog\ndemo (bids): 7 files, ")
    assert "preprocess cannot be estimated before there is a catalog at" in text
    assert text.count("Nothing was started.") == 1
    assert not (tmp_path / "ws").exists()
    catalogued(configs)
    text = say(configs, "ingest")
    assert "preprocess, by the catalog that is at" in text
    assert "3 to preprocess of 3: 7 files" in text
    assert text.count("Nothing was started.") == 1
    parts["preprocess"]["store"] = str(tmp_path / "bids")
    configs["ingest"].write_text(yaml.safe_dump(parts))
    assert "bids is not empty and is no store" in refused(configs, "ingest", capsys)
    (tmp_path / "ws/catalog.parquet").unlink()
    assert "bids is not empty and is no store" in refused(configs, "ingest", capsys)


def test_ingest_into_another_catalog_than_is_read_is_refused(configs: dict[str, Path], tmp_path: Path) -> None:
    parts = {verb: yaml.safe_load(configs[verb].read_text()) for verb in ("catalog", "preprocess")}
    same = {**parts["preprocess"], "catalog": f"{tmp_path}/x/../ws/catalog.parquet"}
    assert IngestParams.model_validate({**parts, "preprocess": same})
    parts["preprocess"]["catalog"] = "./elsewhere/catalog.parquet"
    text = (
        r"preprocess\.catalog is '\./elsewhere/catalog\.parquet', but .* catalog\.workspace '.*/ws': what .* same place"
    )
    with pytest.raises(ValidationError, match=text):
        IngestParams.model_validate(parts)


def test_other_verbs_have_no_dry_run(configs: dict[str, Path]) -> None:
    done = CliRunner().invoke(app, ["evaluate", "--config", str(configs["catalog"]), "--dry-run"])
    assert done.exit_code == 2
    assert "No such option" in done.output
