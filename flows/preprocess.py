"""Preprocess: plan rows, let Dask workers write cases, publish what is done, show what is not."""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prefect import flow, runtime
from prefect_dask import DaskTaskRunner
from pydantic import BaseModel, ConfigDict, Field

from flows.artifacts import publish_markdown, publish_table
from flows.batches import BatchRunner, ReceiptWatch, split_batches
from flows.progress import Progress
from infra import storage
from infra.clusters import cluster_options, describe_cluster, worker_count, worker_memory
from infra.settings import Settings
from models.records import SPECS, PlannedCase, PreprocessSpec, Reason, Scan, find_spec
from models.store import StoreWriter, create_or_open
from models.store_writer import check_spec
from tasks import plan as plans
from tasks import receipts, shards
from tasks.catalog import read_catalog
from tasks.dry_run import estimate_store
from tasks.forget import without_forgotten
from tasks.lease import Lease
from tasks.qc import quarantine_table
from tasks.qc_content import gather
from tasks.qc_report import is_current, qc_page, qc_stamp, set_current, write_qc

_log = logging.getLogger(__name__)


class PreprocessError(RuntimeError):
    """The flow ran to its end, but too much is in quarantine or a case batch failed; finished work stays."""


class PreprocessParams(BaseModel):
    """Which catalog becomes which store."""

    model_config = ConfigDict(extra="forbid", title="Preprocess")

    catalog: str = Field(
        title="Catalog",
        description="Path or URL of catalog.parquet, as the flow 'catalog' writes it.",
        examples=["./state/demo/catalog.parquet"],
        min_length=1,
    )
    store: str = Field(
        title="Store",
        description="Path or URL of the Zarr store to create or to continue, on disk or s3://.",
        examples=["./state/demo/store.zarr"],
        min_length=1,
    )
    spec: str = Field(
        "brainmvp",
        title="Preprocessing spec",
        description=f"How scans become voxels; fixed for the life of a store. One of: {', '.join(SPECS)}.",
        json_schema_extra={"enum": list(SPECS)},
    )
    own_spec: PreprocessSpec | None = Field(
        None,
        title="Own preprocessing spec",
        description="Used instead of a named one, e.g. {name: mine, spacing_mm: 2, grid: [128, 128, 128]}.",
    )
    datasets: list[str] = Field(
        default_factory=list,
        title="Datasets",
        description="Only these datasets of the catalog; empty: all of them.",
    )
    case_batch: int = Field(
        32,
        title="Case batch",
        description="Cases that one task run preprocesses, from 1 to 1024. Enlarged when there would be more than "
        "32 task runs and 8 a worker, and cut so that no worker idles.",
        ge=1,
        le=1024,
    )
    workers: int | None = Field(
        None,
        title="Workers",
        description="Dask worker processes on this host, 1 or more; empty: BRAINLOOM_WORKERS.",
        ge=1,
    )
    max_quarantined_share: float = Field(
        0.05,
        title="Allowed share in quarantine",
        description="From 0 to 1. With more, the flow fails at its end with the table; finished work stays.",
        ge=0,
        le=1,
    )
    strict: bool = Field(
        False,
        title="Strict",
        description="Refuse to start when the catalog left out any scan.",
    )
    retry_quarantined: bool = Field(
        False,
        title="Try the quarantine again",
        description="Also run cases that are in quarantine although their files have not changed.",
    )


@dataclass(frozen=True)
class Work:
    """What one flow run has to do."""

    current: tuple[PlannedCase, ...]
    """The rows of all wanted cases."""
    todo: tuple[PlannedCase, ...]
    """Those that have to be preprocessed."""
    refused: dict[plans.CaseKey, str] = field(default_factory=dict)
    """Cases that would not fit a worker's memory, with the numbers."""


def _run_name() -> str:
    params = runtime.flow_run.parameters["params"]
    return run_name(params if isinstance(params, PreprocessParams) else PreprocessParams.model_validate(params))


def run_name(params: PreprocessParams) -> str:
    """Return `preprocess <datasets> into <store>`; the datasets of the catalog when none are chosen."""
    names = params.datasets
    if not names and storage.exists(params.catalog):
        names = sorted({scan.dataset for scan in read_catalog(params.catalog)})
    shown = " ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"preprocess {shown or 'catalog'} into {_store_name(params.store)}"


@flow(name="preprocess", flow_run_name=_run_name)
def preprocess(params: PreprocessParams) -> dict[str, Any]:
    """Bring a store up to date with a catalog; what is done is skipped, with nothing to do it takes seconds.

    Returns counts and the store's digest. Raises PreprocessError after publishing everything that was finished, and
    StoreError before any work for another spec, another live writer or too little memory.
    """
    spec = chosen_spec(params)
    scans = usable_scans(read_catalog(params.catalog), params)
    settings = Settings() if params.workers is None else Settings(workers=params.workers)
    storage_url = params.store if not storage.is_local(params.store) else str(storage.local_path(params.store))
    writer = create_or_open(storage_url, spec)
    with Lease(writer.url, _owner()) as lease:
        scans, forgotten = without_forgotten(writer.url, scans)
        if forgotten:
            _log.warning("%d forgotten subjects of the catalog stay out (`store forget --lift`)", len(forgotten))
        if lease.took_over and (removed := shards.clean_partials(writer.url)):
            _log.info("the last writer was killed: %d half-written files removed", removed)
        work = plan_work(writer, scans, params, worker_memory(settings))
        failures = _run(writer, work, lease.token, params, settings)
        lease.check()
        digest = shards.finalise(writer.url, work.current)
        # Whatever failed, this flow run lived to see it: only attempts of a flow that died say something later.
        receipts.clear_attempts(writer.url)
    return {**report(writer.url, work, failures, digest, params), "forgotten": len(forgotten)}


def dry_run(params: PreprocessParams) -> str:
    """Return what the flow would cost, in lines; starts and writes nothing. Raises what the flow refuses to begin."""
    spec = chosen_spec(params)
    scans = usable_scans(read_catalog(params.catalog), params)
    settings = Settings() if params.workers is None else Settings(workers=params.workers)
    url = params.store if not storage.is_local(params.store) else str(storage.local_path(params.store))
    if storage.exists(storage.join(url, "zarr.json")):
        check_spec(url, spec)
        scans, _ = without_forgotten(url, scans)
    current = plans.plan_rows(plans.cases_from_scans(scans), plans.read_plans(url)).current
    todo = list(pending(url, current, retry_quarantined=False))
    if params.retry_quarantined:
        lines = shards.published(url)
        todo += [c for c in current if lines.get((c.dataset, c.row), {}).get("status") == "quarantined"]
    return estimate_store(url, spec, scans, todo, worker_count(settings), worker_memory(settings)).text()


def chosen_spec(params: PreprocessParams) -> PreprocessSpec:
    """Return the spec in the parameters, or the named one; raises MissingExtraError when a step cannot run here."""
    spec = params.own_spec or find_spec(params.spec)
    if {spec.bias_correction, spec.registration} != {"none"}:
        from tasks.registration import require_extra  # loads torch: a flow run with nothing to do goes without

        require_extra(spec)
    return spec


def usable_scans(scans: Sequence[Scan], params: PreprocessParams) -> list[Scan]:
    """Return the scans of the chosen datasets; raises ValueError for unknown datasets, no scans, or when strict."""
    known = sorted({scan.dataset for scan in scans})
    if unknown := sorted(set(params.datasets) - set(known)):
        raise ValueError(f"the catalog has no dataset {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")
    chosen = [scan for scan in scans if not params.datasets or scan.dataset in params.datasets]
    left_out = [scan for scan in chosen if scan.status != "ok"]
    if params.strict and left_out:
        named = "; ".join(f"{scan.path}: {scan.reason}" for scan in left_out[:10])
        raise ValueError(
            f"strict: the catalog left out {len(left_out)} scans, 0 are allowed ({named}); "
            "repair or remove them, or run without strict"
        )
    usable = [scan for scan in chosen if scan.status == "ok"]
    if not usable:
        raise ValueError(f"{params.catalog} holds no usable scan of {', '.join(params.datasets) or 'any dataset'}")
    return usable


def plan_work(writer: StoreWriter, scans: Sequence[Scan], params: PreprocessParams, memory_limit: int) -> Work:
    """Give every case its row, write the plan, grow the arrays, and say what has to be preprocessed."""
    by_case: dict[plans.CaseKey, list[Scan]] = defaultdict(list)
    for scan in scans:
        by_case[plans.key_of(scan)].append(scan)
    sentence, refused = plans.memory_verdicts(by_case, writer.spec, memory_limit)
    _log.info(sentence)
    known = plans.read_plans(writer.url)
    rows = plans.plan_rows(plans.cases_from_scans(scans), known)
    if rows.added:
        plans.write_plan(writer.url, rows.added, writer.spec.content_digest())
    everything = [*known, *rows.added]
    labelled = plans.datasets_with_labels(everything)
    for dataset, length in plans.rows_by_dataset(everything).items():
        writer.grow(dataset, length, dataset in labelled)
    return Work(rows.current, pending(writer.url, rows.current, params.retry_quarantined), refused)


def pending(url: str, current: Sequence[PlannedCase], retry_quarantined: bool) -> tuple[PlannedCase, ...]:
    """Return the cases that are neither published nor have a receipt; quarantined ones too when asked."""
    lines = shards.published(url)
    there = receipts.receipt_rows(url, (case.dataset for case in current))
    todo = []
    for case in current:
        row = (case.dataset, case.row)
        if retry_quarantined and lines.get(row, {}).get("status") == "quarantined":
            receipts.delete_receipt(url, case)
            todo.append(case)
        elif row not in lines and row not in there:
            todo.append(case)
    return tuple(todo)


def _run(writer: StoreWriter, work: Work, token: str, params: PreprocessParams, settings: Settings) -> list[str]:
    """Preprocess what is to do on Dask workers; returns a sentence per failed case batch."""
    cases = _refuse(writer, work)
    with Progress("preprocess", len(work.current), "cases") as progress:
        finished = len(work.current) - len(cases)
        progress.update(finished, note="" if cases else "nothing to do")
        if not cases:
            return []
        _log.info("%d of %d cases to preprocess on %s", len(cases), len(work.current), describe_cluster(settings))
        batches = split_batches(cases, params.case_batch, worker_count(settings))

        watch = ReceiptWatch(writer.url, cases)
        with DaskTaskRunner(**cluster_options(settings)) as runner:
            memory = worker_memory(settings) - plans.BASE_BYTES
            device = "cuda" if settings.cluster == "cuda" else "cpu"
            running = BatchRunner(runner, writer.url, token, memory, device)

            def show(now: bool = False) -> None:
                progress.update(finished + watch.done(now), quarantined=running.status["quarantined"])

            failures = running.run(batches, watch.missing, show)
            show(now=True)
            return failures


def _refuse(writer: StoreWriter, work: Work) -> list[PlannedCase]:
    """Put cases into quarantine that must not be begun, and return the others."""
    interrupted = receipts.interrupted(writer.url)
    digest = writer.spec.content_digest()
    cases = []
    for case in work.todo:
        begun = interrupted[case.dataset, case.row]
        if detail := work.refused.get(plans.key_of(case)):
            receipts.write_receipt(writer.url, receipts.empty_receipt(case, digest, Reason.MEMORY, detail))
        elif begun >= receipts.MAX_INTERRUPTED:
            detail = f"{begun} flow runs died while it was being preprocessed"
            receipts.write_receipt(writer.url, receipts.empty_receipt(case, digest, Reason.KILLED_WORKER, detail))
        else:
            cases.append(case)
    return cases


def report(url: str, work: Work, failures: list[str], digest: str, params: PreprocessParams) -> dict[str, Any]:
    """Write and publish quality and quarantine; raises PreprocessError for failures or too much quarantine."""
    lines = shards.published(url, ("dataset", "row", "case", "status", "reason", "detail"))
    mine = [line for case in work.current if (line := lines.get((case.dataset, case.row)))]
    status = Counter(line["status"] for line in mine)
    table = quarantine_table(url, params.catalog)
    publish_quality(url, table)
    publish_table("quarantine", table, "Cases that could not be preprocessed, with the reason")
    share = status["quarantined"] / max(1, len(work.current))
    if failures:
        raise PreprocessError(
            f"{len(failures)} case batches failed, {status['stored']} cases are stored and stay; "
            f"start the flow again to continue: {'; '.join(failures[:5])}"
        )
    if share > params.max_quarantined_share:
        named = "\n".join(
            f"  {line['dataset']}/{line['case']}: {line['reason']} ({line['detail']})"
            for line in mine
            if line["status"] == "quarantined"
        )
        raise PreprocessError(
            f"{status['quarantined']} of {len(work.current)} cases ({share:.1%}) are in quarantine, "
            f"{params.max_quarantined_share:.1%} are allowed; finished work stays:\n{named}"
        )
    return {
        "store": url,
        "digest": digest,
        "cases": len(work.current),
        "stored": status["stored"],
        "quarantined": status["quarantined"],
        "preprocessed": len(work.todo),
    }


def publish_quality(url: str, quarantine: list[dict[str, str]]) -> None:
    """Write and publish the quality report; what was made from the same cases stays."""
    if is_current(url, stamp := qc_stamp(url, quarantine)):
        return
    quality = gather(url, quarantine)
    page, _ = write_qc(url, quality)
    publish_markdown("qc", qc_page(quality, page), f"Quality of {_store_name(url)}", names_subjects=True)
    set_current(url, stamp)


def _store_name(url: str) -> str:
    return url.rstrip("/").rsplit("/", 1)[-1]


def _owner() -> str:
    name = runtime.flow_run.name or "preprocess"
    return f"{name} ({socket.gethostname()}, pid {os.getpid()})"
