import json
import time
from types import SimpleNamespace

import pytest
from distributed.client import FutureCancelledError
from nifti_files import SMALL, write_dataset
from pydantic import ValidationError
from store_builds import catalog_of

from flows import artifacts, preprocess_params
from flows import preprocess as module
from flows.batches import BatchRunner, split_batches
from flows.dask_pages import report_url
from flows.preprocess import PreprocessError, PreprocessParams, preprocess, run_name
from flows.preprocess_params import usable_scans
from infra import storage
from infra.clusters import ClusterLostError, worker_seen
from models.spec import SPECS
from models.store import StoreError, create_or_open, open_store, store_digest
from tasks import dry_run, duplicates
from tasks.forget import forget
from tasks.lease import Lease
from tasks.plan import cases_from_scans
from tasks.preprocess import CasesFailedError, preprocess_batch_task
from tasks.qc_report import report_urls
from tasks.timings import timings_url
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
    monkeypatch.setitem(SPECS, "small", SMALL)
    return {
        "catalog": catalog_of(tmp_path / "ws", scans),
        "store": store_url,
        "spec": "small",
        "case_batch": 2,
        "workers": 1,
        "max_quarantined_share": 0.5,
    }


def test_store_qc_and_nothing_to_do(workspace, prefect_server, monkeypatch):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import ArtifactSort

    params = PreprocessParams(**workspace, performance_report=True)
    first = preprocess(params)
    timings = storage.read_json(timings_url(workspace["store"]))
    assert (timings["cases"], timings["workers"]) == (4, 1)
    assert {"read", "decode", "encode", "write"} <= set(timings["seconds"])
    page = storage.read_bytes(report_url(workspace["store"])).decode()
    assert [name for name in ("s0_t1", "s1_t1", "s2_t1", "s3_t1", "size_bytes") if name in page] == []
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
    with get_client(sync_client=True) as client:
        newest = client.read_artifacts(sort=ArtifactSort.CREATED_DESC, limit=5)
    assert [one.key for one in newest[:2]] == ["unchanged", "progress-preprocess"]
    assert {one.key for one in newest[2:]} == {"qc", "quarantine", "duplicates"}

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
    assert {"qc", "quarantine", "duplicates", "progress-preprocess"} <= artifacts


@pytest.mark.full
def test_a_failing_case_is_named_and_the_others_of_its_batch_are_stored(workspace, tmp_path, prefect_server):
    url = str(tmp_path / "f.zarr")
    create_or_open(url, SMALL).grow("toy", 4, with_label=True)
    wall = tmp_path / "f.zarr/toy/image/c/0"
    wall.parent.mkdir()
    wall.write_bytes(b"where the folder of a shard belongs")
    params = PreprocessParams(**{**workspace, "store": url, "case_batch": 4})
    text = r"1 case batches failed, 2 cases are stored .* 1 of 2 cases failed, the others are done: toy/s0 \(row 0\)"
    with pytest.raises(PreprocessError, match=text):
        preprocess(params)
    assert open_store(url).dataset("toy").rows == [1, 2]
    wall.unlink()
    assert preprocess(params)["preprocessed"] == 1
    assert open_store(url).dataset("toy").rows == [0, 1, 2]
    assert verify(url, deep=True) == []


def test_parameters_make_a_form():
    schema = PreprocessParams.model_json_schema()
    assert schema["additionalProperties"] is False
    assert schema["properties"]["spec"]["enum"] == list(SPECS)
    for name, field in schema["properties"].items():
        assert field["title"], name
        assert field["description"].endswith("."), name
    with pytest.raises(ValidationError, match="typo"):
        PreprocessParams(catalog="c", store="s", typo=1)


def test_a_spec_beside_an_own_spec_is_refused():
    own = {"name": "mine", "grid": [64, 64, 64]}
    with pytest.raises(ValidationError, match="spec 'demo' and own_spec 'mine' are both given and only one can count"):
        PreprocessParams(catalog="c", store="s", spec="demo", own_spec=own)
    assert (
        PreprocessParams(catalog="c", store="s", spec="brainmvp", own_spec=own).own_spec.name == "mine"
    )  # as forms do


def test_a_refusal_leaves_no_store_behind(workspace, monkeypatch, prefect_server):
    """Else the next try with a smaller grid would be refused: the store was begun with the large one."""
    huge = {"name": "huge", "grid": [4000, 4000, 4000]}
    params = PreprocessParams(**{**workspace, "spec": "brainmvp", "own_spec": huge})
    with pytest.raises(StoreError, match=r"memory refused: spec 'huge' with grid .* a coarser or smaller grid"):
        preprocess(params)
    assert not storage.exists(workspace["store"])
    monkeypatch.setattr(preprocess_params, "free_bytes", lambda url: 100)
    monkeypatch.setattr(dry_run, "free_bytes", lambda url: 100)
    with pytest.raises(
        StoreError, match=r"s\.zarr needs at least .* for 4 cases \(estimated .* 100 B are free; make room"
    ):
        preprocess(PreprocessParams(**workspace))
    assert not storage.exists(workspace["store"])


def test_duplicates_are_a_table_in_the_ui(workspace, prefect_server, monkeypatch):
    from prefect.client.orchestration import get_client

    pair = {
        "dataset_a": "toy",
        "subject_a": "s0",
        "case_a": "s0",
        "dataset_b": "toy",
        "subject_b": "s1",
        "case_b": "s1",
    }
    monkeypatch.setattr(duplicates, "find_duplicates", lambda cases, order: [{**pair, "similarity": 0.9}])
    preprocess(PreprocessParams(**workspace))
    with get_client(sync_client=True) as client:
        tables = [json.loads(found.data) for found in client.read_artifacts(limit=200) if found.key == "duplicates"]
    assert [{**pair, "similarity": 0.9}] in tables


def test_cases_whose_images_were_all_left_out_count_as_quarantined(workspace, tmp_path, prefect_server):
    """Nine of ten files with a wrong magic leave no row; nevertheless they are missing in the store."""
    scans = write_dataset(tmp_path / "src", 1)[:1]
    for number in range(9):
        path = tmp_path / f"src/toy/x{number}_t1.nii.gz"
        path.write_bytes(b"not an image")
        scans += [
            scans[0].replace(
                subject=path.stem, case=f"x{number}", path=str(path), status="left out", reason="unreadable"
            )
        ]
    other = scans[-1].replace(dataset="other", status="left out")
    params = PreprocessParams(**{**workspace, "catalog": catalog_of(tmp_path / "ws", [*scans, other])})
    params = params.model_copy(update={"datasets": ["toy"]})
    text = r"9 of 10 cases \(90\.0%\) are in quarantine, 50\.0% are allowed; .*\n  toy/x0: unreadable, left out by"
    with pytest.raises(PreprocessError, match=text):
        preprocess(params)
    with pytest.raises(PreprocessError, match=r"9 of 10 cases \(90\.0%\) have no usable image \(9\) or would be"):
        module.dry_run(params)
    done = preprocess(params.model_copy(update={"max_quarantined_share": 0.9}))
    assert (done["cases"], done["stored"], done["without_usable_image"]) == (1, 1, 9)


def test_a_public_api_gets_no_case_in_names_and_states(workspace, prefect_server, monkeypatch):
    from prefect.client.orchestration import get_client

    monkeypatch.setattr(artifacts, "is_private", lambda url: False)
    params = PreprocessParams(**{**workspace, "max_quarantined_share": 0.1})
    with get_client(sync_client=True) as client:
        before = {run.id for run in client.read_task_runs()}
        with pytest.raises(PreprocessError, match=r"1 of 4 cases [^\n]*\n  toy row 3: unreadable$"):
            preprocess(params)
        names = {run.name for run in client.read_task_runs() if run.id not in before}
    assert names == {"toy: row 0 and 1 more", "toy: row 2 and 1 more"}


def test_many_names_are_cut(workspace):
    lines = [{"dataset": "toy", "row": n, "case": f"s{n}", "reason": "r", "detail": "d"} for n in range(30)]
    with pytest.raises(PreprocessError, match=r"30 of 60 .*\n  toy/s0: r \(d\)\n[\s\S]*s19: .*\n  \.\.\. and 10 more$"):
        module.refuse_share(lines, {}, 60, PreprocessParams(catalog="c", store="s"))


def test_a_failed_batch_tells_a_public_api_its_kind_alone(tmp_path):
    (case, *_) = cases_from_scans(write_dataset(tmp_path, 1))
    fields = dict.fromkeys(("dataset", "first"), "x") | {"others": 0, "token": "t", "memory_bytes": 1, "device": "cpu"}
    line = case.replace(row=0).model_dump(mode="json")
    arguments = {**fields, "store_url": str(tmp_path / "none.zarr"), "cases_json": json.dumps([line])}
    with pytest.raises(StoreError, match=r"none\.zarr"):
        preprocess_batch_task.fn(**arguments, named=True)
    with pytest.raises(
        CasesFailedError, match=r"^StoreError in this case batch; subject ids are left out here, the wo"
    ):
        preprocess_batch_task.fn(**arguments, named=False)


def test_run_names(workspace):
    params = PreprocessParams(**workspace)
    assert run_name(params) == "preprocess toy into s.zarr"
    assert run_name(params.model_copy(update={"datasets": list("abcde")})) == "preprocess a b c and 2 more into s.zarr"


def test_what_cannot_start_is_refused(tmp_path, monkeypatch):
    scans = write_dataset(tmp_path, 1)
    params = PreprocessParams(catalog="c", store="s", datasets=["ixi"])
    with pytest.raises(ValueError, match="the catalog has no dataset ixi; it has: toy"):
        usable_scans(scans, params)
    left_out = scans[0].replace(status="left out", reason="missing file")
    strict = PreprocessParams(catalog="c", store="s", strict=True)
    with pytest.raises(ValueError, match=r"strict: the catalog left out 1 scans, 0 are allowed .*missing file"):
        usable_scans([*scans, left_out], strict)
    monkeypatch.setattr(artifacts, "is_private", lambda url: False)
    with pytest.raises(ValueError, match=r"left out 1 scans, 0 are allowed \(1 missing file in toy\); repair or"):
        usable_scans([*scans, left_out], strict)
    with pytest.raises(ValueError, match="c holds no usable scan of any dataset"):
        usable_scans([left_out], PreprocessParams(catalog="c", store="s"))


def test_a_cluster_without_workers_fails_instead_of_waiting():
    client = SimpleNamespace(ncores=dict)
    now = time.monotonic()
    assert worker_seen(client, now, "finished cases stay") == now
    with pytest.raises(ClusterLostError, match=r"no Dask worker for \d+ s; finished cases stay"):
        worker_seen(client, now - 301, "finished cases stay")
    client.ncores = lambda: {"tcp://127.0.0.1:1": 1}
    assert worker_seen(client, now - 301, "finished cases stay") >= now


def test_a_scheduler_that_is_not_back_ends_the_flow():
    client = SimpleNamespace(status="running")
    batches = BatchRunner(SimpleNamespace(client=client), "s", "token", 0)
    lost = FutureCancelledError("key", "scheduler-connection-lost")
    batches._await_scheduler(lost)
    client.status = "closed"
    with pytest.raises(ClusterLostError, match=r"the Dask scheduler was lost; finished cases stay\. See why"):
        batches._await_scheduler(lost)


def test_batches_keep_workers_busy_and_task_runs_few(tmp_path):
    (scan,) = write_dataset(tmp_path, 1)[:1]
    cases = cases_from_scans([scan.replace(case=f"c{n}", subject=f"c{n}") for n in range(1000)])
    cases = [case.replace(row=row) for row, case in enumerate(cases)]
    assert {len(batch) for batch in split_batches(cases, 32, workers=2)} == {32, 8}
    assert [len(batch) for batch in split_batches(cases[:8], 32, workers=2)] == [2, 2, 2, 2]
    assert len(split_batches(cases, 1)) <= 400
    mixed = [case.replace(dataset="ab"[case.row % 2]) for case in cases[:6]]
    assert [[c.dataset for c in batch] for batch in split_batches(mixed, 10)] == [["a"] * 3, ["b"] * 3]
