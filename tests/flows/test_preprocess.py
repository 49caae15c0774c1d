import time
from types import SimpleNamespace

import pytest
from nifti_files import SMALL, write_dataset
from pydantic import ValidationError

from flows import preprocess as module
from flows.batches import BatchRunner, split_batches
from flows.preprocess import PreprocessError, PreprocessParams, preprocess, run_name, usable_scans
from infra import storage
from models import records
from models.store import StoreError, open_store, store_digest
from tasks.forget import forget
from tasks.lease import Lease
from tasks.plan import cases_from_scans
from tasks.qc_report import report_urls
from tasks.verify import verify


@pytest.fixture
def workspace(tmp_path, monkeypatch, store_url):
    """Return parameters of the flow for four small subjects, one of them broken."""
    scans = write_dataset(tmp_path / "src", 4, labels=True)
    broken = tmp_path / "src" / "toy" / "s3_t1.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-20])
    scans = [
        scan.replace(size_bytes=broken.stat().st_size, etag="cut") if scan.path == str(broken) else scan
        for scan in scans
    ]
    catalog = tmp_path / "catalog.parquet"
    catalog.touch()
    monkeypatch.setattr(module, "read_catalog", lambda path: scans)
    monkeypatch.setattr(module, "quarantine_table", lambda url, catalog: [])
    monkeypatch.setitem(records.SPECS, "small", SMALL)
    return {
        "catalog": str(catalog),
        "store": store_url,
        "spec": "small",
        "case_batch": 2,
        "workers": 1,
        "max_quarantined_share": 0.5,
    }


def test_store_qc_and_nothing_to_do(workspace, prefect_server, monkeypatch):
    from prefect.client.orchestration import get_client

    params = PreprocessParams(**workspace)
    first = preprocess(params)
    assert {key: first[key] for key in ("cases", "stored", "quarantined", "preprocessed")} == {
        "cases": 4,
        "stored": 3,
        "quarantined": 1,
        "preprocessed": 4,
    }
    assert first["digest"] == store_digest(workspace["store"])
    assert verify(workspace["store"], deep=True) == []
    assert b"<h1>Quality of s.zarr</h1>" in storage.read_bytes(report_urls(workspace["store"])[0])
    (bad,) = (line for line in open_store(workspace["store"]).cases().to_pylist() if line["status"] != "stored")
    assert (bad["case"], bad["reason"]) == ("s3", "unreadable")

    # With nothing to do no cluster is started.
    monkeypatch.setattr(module, "DaskTaskRunner", None)
    second = preprocess(params)
    assert (second["preprocessed"], second["digest"]) == (0, first["digest"])

    with Lease(workspace["store"], "nightly ingest"), pytest.raises(StoreError, match="written by 'nightly ingest'"):
        preprocess(params)
    with pytest.raises(
        PreprocessError, match=r"1 of 4 cases \(25\.0%\) are in quarantine, 5\.0% are allowed.*\n  toy/s3: unreadable"
    ):
        preprocess(PreprocessParams(**{**workspace, "max_quarantined_share": 0.05}))

    # A forgotten subject stays out although the catalog still lists it, and the result says so.
    forget(workspace["store"], "toy", "s1")
    third = preprocess(params)
    assert (third["preprocessed"], third["stored"], third["forgotten"]) == (0, 2, 1)
    assert verify(workspace["store"], deep=True) == []

    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs()
        artifacts = {artifact.key for artifact in client.read_artifacts()}
    assert "preprocess toy into s.zarr" in {run.name for run in runs}
    assert {"qc", "progress-preprocess"} <= artifacts


def test_parameters_make_a_form():
    schema = PreprocessParams.model_json_schema()
    assert schema["additionalProperties"] is False
    assert schema["properties"]["spec"]["enum"] == list(records.SPECS)
    for name, field in schema["properties"].items():
        assert field["title"], name
        assert field["description"].endswith("."), name
    with pytest.raises(ValidationError, match="typo"):
        PreprocessParams(catalog="c", store="s", typo=1)


def test_run_names(workspace):
    params = PreprocessParams(**workspace)
    assert run_name(params) == "preprocess toy into s.zarr"
    assert run_name(params.model_copy(update={"datasets": list("abcde")})) == "preprocess a b c and 2 more into s.zarr"


def test_what_cannot_start_is_refused(tmp_path):
    scans = write_dataset(tmp_path, 1)
    params = PreprocessParams(catalog="c", store="s", datasets=["ixi"])
    with pytest.raises(ValueError, match="the catalog has no dataset ixi; it has: toy"):
        usable_scans(scans, params)
    left_out = scans[0].replace(status="left out", reason="missing file")
    strict = PreprocessParams(catalog="c", store="s", strict=True)
    with pytest.raises(ValueError, match=r"strict: the catalog left out 1 scans, 0 are allowed .*missing file"):
        usable_scans([*scans, left_out], strict)
    with pytest.raises(ValueError, match="c holds no usable scan of any dataset"):
        usable_scans([left_out], PreprocessParams(catalog="c", store="s"))


def test_a_cluster_without_workers_fails_instead_of_waiting():
    client = SimpleNamespace(ncores=dict)
    batches = BatchRunner(SimpleNamespace(client=client), "s", "token", 0)
    now = time.monotonic()
    assert batches._worker_seen(now) == now
    with pytest.raises(RuntimeError, match=r"no Dask worker for \d+ s; finished cases stay"):
        batches._worker_seen(now - 301)
    client.ncores = lambda: {"tcp://127.0.0.1:1": 1}
    assert batches._worker_seen(now - 301) >= now


def test_batches_keep_workers_busy_and_task_runs_few(tmp_path):
    (scan,) = write_dataset(tmp_path, 1)[:1]
    cases = cases_from_scans([scan.replace(case=f"c{n}", subject=f"c{n}") for n in range(1000)])
    cases = [case.replace(row=row) for row, case in enumerate(cases)]
    assert {len(batch) for batch in split_batches(cases, 32, workers=2)} == {32, 8}
    assert [len(batch) for batch in split_batches(cases[:8], 32, workers=2)] == [2, 2, 2, 2]
    assert len(split_batches(cases, 1)) <= 400
    mixed = [case.replace(dataset="ab"[case.row % 2]) for case in cases[:6]]
    assert [[c.dataset for c in batch] for batch in split_batches(mixed, 10)] == [["a"] * 3, ["b"] * 3]
