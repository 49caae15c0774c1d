"""Preprocess: plan rows, let Dask workers write cases, publish what is done, show what is not."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from prefect import flow, runtime
from prefect_dask import DaskTaskRunner

from flows.artifacts import counted, publish_table, shown_names
from flows.batches import BatchRunner, ReceiptWatch, none_left_running, split_batches
from flows.dask_pages import dask_pages
from flows.forms import few, params_of
from flows.pages import Pages
from flows.preprocess_params import (
    PreprocessParams,
    check_params,
    estimate_work,
    memory_limit,
    path_key,
    pending,
    rows_to_repair,
)
from flows.progress import Progress
from infra import gauges, storage
from infra.clusters import ClusterLostError, cluster_options, describe_cluster, worker_count
from infra.settings import Settings
from infra.shielding import shielded_settings
from models.records import PlannedCase, Reason, Scan
from models.store import StoreWriter, create_or_open
from models.store_layout import BUILD
from tasks import plan as plans
from tasks import receipts, shards
from tasks.catalog import cases_left_out, read_catalog, rows_digest
from tasks.duplicates import read_duplicates
from tasks.forget import without_forgotten
from tasks.hidden_paths import ATTRIBUTE, digest_under, hidden, key_name
from tasks.lease import Lease
from tasks.qc import quarantine_table
from tasks.qc_content import gather
from tasks.qc_report import keep_page, kept_page, qc_page, qc_stamp, write_qc
from tasks.timings import largest_steps, timings_of, timings_rows, write_timings

_log = logging.getLogger(__name__)
SHOWN_PAIRS = 500
"""Near-duplicates in the UI, the most alike first; duplicates.parquet has all."""


class PreprocessError(RuntimeError):
    """The flow ran to its end, but too much is in quarantine or a case batch failed; finished work stays."""


@dataclass(frozen=True)
class Work:
    """What one flow run has to do."""

    current: tuple[PlannedCase, ...]
    """The rows of all wanted cases."""
    todo: tuple[PlannedCase, ...]
    """Those that have to be preprocessed."""
    refused: dict[plans.CaseKey, str] = field(default_factory=dict)
    """Cases that would not fit a worker's memory, with the numbers."""
    repaired: frozenset[shards.Row] = frozenset()
    """Stored rows that are damaged and made again."""


def _run_name() -> str:
    return run_name(params_of(PreprocessParams))


def run_name(params: PreprocessParams) -> str:
    """Return `preprocess <datasets> into <store>`; the datasets of the catalog when none are chosen."""
    names = params.datasets
    if not names:
        with suppress(ValueError, FileNotFoundError):  # the flow itself says what is wrong with its catalog
            names = sorted({scan.dataset for scan in read_catalog(params.catalog)})
    return f"preprocess {few(names, ' ') or 'catalog'} into {_store_name(params.store)}"


@flow(name="preprocess", flow_run_name=_run_name)
def preprocess(params: PreprocessParams) -> dict[str, Any]:
    """Bring a store up to date with a catalog; what is done is skipped, with nothing to do it takes seconds.

    Returns counts and the store's digest. Raises PreprocessError or ClusterLostError after publishing everything that
    was finished, and StoreError before any work for another spec, another live writer, too little memory or disk.
    """
    wanted = check_params(params)
    key = path_key(params)
    writer = create_or_open(wanted.url, wanted.spec, {ATTRIBUTE: key_name(key)} if key else None)
    with Lease(writer.url, _owner()) as lease:
        scans, forgotten = without_forgotten(writer.url, wanted.scans)
        if forgotten:
            _log.warning("%d forgotten subjects of the catalog stay out (`store forget --lift`)", len(forgotten))
        if lease.took_over and (removed := shards.clean_partials(writer.url)):
            _log.info("the last writer was killed: %d half-written files removed", removed)
        work = plan_work(writer, scans, wanted.refused, params, wanted.catalog)
        try:
            failures = _run(writer, work, lease.token, params, wanted.settings)
        except ClusterLostError:
            _finalise(writer, work, lease)
            raise
        digest = _finalise(writer, work, lease)
    return {**report(writer.url, wanted.catalog, work, failures, digest, params), "forgotten": len(forgotten)}


def dry_run(params: PreprocessParams) -> str:
    """Return what the flow would cost, in lines; starts and writes nothing.

    Raises what the flow refuses to begin, and PreprocessError when it would fail at its end whatever the files hold.
    """
    wanted = check_params(params)
    estimate = wanted.estimate or estimate_work(wanted, params)
    lost = len(lost_cases(wanted.url, wanted.catalog, params))
    share = (estimate.refused + lost) / max(1, estimate.cases + lost)
    if share > params.max_quarantined_share:
        what = f"{estimate.refused + lost} of {estimate.cases + lost} cases ({share:.1%})"
        what += f" have no usable image ({lost}) or" if lost else ""
        raise PreprocessError(
            f"{what} would be refused for their memory, {params.max_quarantined_share:.1%} may be in quarantine: the "
            "flow would fail at its end. Repair or remove such files, raise BRAINLOOM_WORKER_MEMORY, use fewer workers "
            f"or a coarser spec\n{estimate.text()}"
        )
    return estimate.text()


def plan_work(
    writer: StoreWriter,
    scans: Sequence[Scan],
    refused: dict[plans.CaseKey, str],
    params: PreprocessParams,
    catalog: Sequence[Scan] = (),
) -> Work:
    """Give every case its row, write the plan, grow the arrays, and say what has to be preprocessed.

    scans: what is wanted of the catalog, the whole of which the plan names by its digest, under the key where
    paths are hidden.
    """
    known = plans.read_plans(writer.url)
    key = path_key(params)
    cases = [hidden(case, key) for case in plans.cases_from_scans(scans)]
    rows = plans.plan_rows(cases, known, writer.spec)
    if rows.news:
        digest = digest_under(key, rows_digest(catalog or scans))
        plans.write_plan(writer.url, rows.news, writer.spec.content_digest(), digest)
    everything = [*known, *rows.added]
    labelled = plans.datasets_with_labels(everything)
    for dataset, length in plans.rows_by_dataset(everything).items():
        writer.grow(dataset, length, dataset in labelled)
    repaired = rows_to_repair(writer.url, params.repair)
    if repaired:
        gone = len(repaired - {(case.dataset, case.row) for case in rows.current})
        stay = f"; {gone} others are damaged too and not in the catalog any more: they stay" if gone else ""
        _log.warning("%d stored rows are damaged and are made again%s", len(repaired) - gone, stay)
    todo = pending(writer.url, rows.current, params.retry_quarantined, repaired)
    there = receipts.receipt_rows(writer.url, (case.dataset for case in todo))
    for case in todo:
        if (case.dataset, case.row) in there:  # of the quarantine, or one that does not count
            receipts.delete_receipt(writer.url, case)
    return Work(rows.current, todo, refused, frozenset(repaired))


def _run(writer: StoreWriter, work: Work, token: str, params: PreprocessParams, settings: Settings) -> list[str]:
    """Preprocess what is to do on Dask workers; returns a sentence per failed case batch."""
    cases = _refuse(writer, work)
    with Progress("preprocess", len(work.current), "cases") as progress:
        finished = len(work.current) - len(cases)
        progress.update(finished, note="" if cases else "nothing to do")
        if not cases:
            return []
        _log.info("%d of %d cases to preprocess on %s", len(cases), len(work.current), describe_cluster(settings))
        workers = worker_count(settings)
        batches = split_batches(cases, params.case_batch, workers)

        watch = ReceiptWatch(writer.url, cases)
        with none_left_running(), shielded_settings(), DaskTaskRunner(**cluster_options(settings)) as runner:
            memory = memory_limit(settings) - plans.BASE_BYTES
            device = "cuda" if settings.cluster == "cuda" else "cpu"
            running = BatchRunner(runner, writer.url, token, memory, device)

            def show(now: bool = False) -> None:
                note = largest_steps(running.seconds)
                for name, value in running.seconds.items():
                    gauges.tell("brainloom_step_seconds", name, value)
                progress.update(finished + watch.done(now), running.status["quarantined"], note)

            began = time.monotonic()
            with dask_pages(runner.client, writer.url, cases, params.performance_report):
                failures = running.run(batches, watch.missing, show)
            show(now=True)
            _tell_timings(writer.url, running, time.monotonic() - began, workers)
            return failures


def _tell_timings(url: str, running: BatchRunner, wall_seconds: float, workers: int) -> None:
    timings = timings_of(running.seconds, running.status.total(), wall_seconds, workers)
    write_timings(url, timings)
    publish_table("timings-preprocess", timings_rows(timings), "Seconds of the Dask workers by step")


def _finalise(writer: StoreWriter, work: Work, lease: Lease) -> str:
    """Publish what is finished and return the store's digest; raises LeaseError when another flow writes by now."""
    lease.check()
    digest = shards.finalise(writer.url, work.current, work.repaired)
    # Whatever failed, this flow run lived to see it: only attempts of a flow that died say something later.
    receipts.clear_attempts(writer.url)
    return digest


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


def report(
    url: str, scans: Sequence[Scan], work: Work, failures: list[str], digest: str, params: PreprocessParams
) -> dict[str, Any]:
    """Write and publish quality and quarantine; raises PreprocessError for failures or too much quarantine.

    Cases of whose images the catalog could use none count as quarantined: they are as lost as the others.
    """
    lines = shards.published(url, ("dataset", "row", "case", "status", "reason", "detail"))
    mine = [line for case in work.current if (line := lines.get((case.dataset, case.row)))]
    status = Counter(line["status"] for line in mine)
    table = quarantine_table(url, scans)
    with Pages(storage.join(url, BUILD)) as pages:
        publish_quality(pages, url, table)
        pages.table("quarantine", table, "Cases that could not be preprocessed, with the reason")
        pairs = read_duplicates(url)[:SHOWN_PAIRS]
        pages.table("duplicates", pairs, "Subjects that look like one person; splits keep them together")
    if failures:
        shown = shown_names(failures, ["the logs of the flow's process and of its workers name them"])
        raise PreprocessError(
            f"{len(failures)} case batches failed, {status['stored']} cases are stored and stay; "
            f"start the flow again to continue: {'; '.join(shown)}"
        )
    lost = lost_cases(url, scans, params)
    refuse_share([line for line in mine if line["status"] == "quarantined"], lost, len(work.current), params)
    return {
        "store": url,
        "digest": digest,
        "cases": len(work.current),
        "stored": status["stored"],
        "quarantined": status["quarantined"],
        "without_usable_image": len(lost),
        "preprocessed": len(work.todo),
    }


def lost_cases(url: str, scans: Sequence[Scan], params: PreprocessParams) -> dict[plans.CaseKey, str]:
    """Return the cases of the chosen datasets that never got a row, for the catalog could use none of their images."""
    chosen = [scan for scan in scans if not params.datasets or scan.dataset in params.datasets]
    return cases_left_out(without_forgotten(url, chosen)[0])


def refuse_share(
    quarantined: Sequence[dict[str, Any]], lost: dict[plans.CaseKey, str], planned: int, params: PreprocessParams
) -> None:
    """Raise PreprocessError when more cases than allowed are in quarantine or lost.

    quarantined: their lines of cases.parquet; lost: see `lost_cases`; planned: how many cases have a row.
    """
    bad, total = len(quarantined) + len(lost), planned + len(lost)
    if bad / max(1, total) <= params.max_quarantined_share:
        return
    named = [f"{line['dataset']}/{line['case']}: {line['reason']} ({line['detail']})" for line in quarantined]
    named += [f"{dataset}/{case}: {reason}, left out by the catalog" for (dataset, case), reason in lost.items()]
    hidden = [f"{line['dataset']} row {line['row']}: {line['reason']}" for line in quarantined]
    hidden += counted(f"{reason} in {dataset}, left out by the catalog" for (dataset, _), reason in lost.items())
    raise PreprocessError(
        "\n  ".join(
            [
                f"{bad} of {total} cases ({bad / total:.1%}) are in quarantine, {params.max_quarantined_share:.1%} are "
                "allowed; finished work stays:",
                *shown_names(named, hidden),
            ]
        )
    )


def publish_quality(pages: Pages, url: str, quarantine: list[dict[str, str]]) -> None:
    """Write the quality report, unless the one there was made from the same cases, and publish its first page."""
    stamp = qc_stamp(url, quarantine)
    page = kept_page(url, stamp)
    if page is None:
        quality = gather(url, quarantine)
        written, _ = write_qc(url, quality)
        page = qc_page(quality, written)
        keep_page(url, stamp, page)
    pages.markdown("qc", page, f"Quality of {_store_name(url)}", names_subjects=True)


def _store_name(url: str) -> str:
    return url.rstrip("/").rsplit("/", 1)[-1]


def _owner() -> str:
    name = runtime.flow_run.name or "preprocess"
    return f"{name} ({socket.gethostname()}, pid {os.getpid()})"
