"""One case into the store, one case batch, and the Prefect task that a Dask worker runs."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE

from infra.log_lines import doing
from infra.storage import StorageError
from models.records import PlannedCase, Reason, Receipt
from models.spec import PreprocessSpec
from models.stopwatch import measuring, step
from models.store_connectomes import digest_bytes as connectome_bytes
from models.store_descriptors import table_bytes
from models.store_layout import limit_threads
from models.store_writer import StoreWriter, case_digest, open_writer
from tasks import nifti, receipts
from tasks.affines import BadScanError
from tasks.prepare import PreparedCase, prepare_case

FAILED_SHOWN = 20
"""Failed cases that one error names; the log has all."""
_log = logging.getLogger(__name__)


class CasesFailedError(RuntimeError):
    """Cases of a batch failed for another reason than bad scans; they have no receipt, the others have."""


def preprocess_case(
    planned: PlannedCase,
    spec: PreprocessSpec,
    store_writer: StoreWriter,
    memory_bytes: int = nifti.DEFAULT_MEMORY,
    device: str = "cpu",
) -> Receipt:
    """Prepare one case and write its shards; returns its receipt without writing it.

    A bad scan gives a quarantined receipt with its reason; anything else raises.
    """
    began = time.monotonic()
    digest = spec.content_digest()
    try:
        prepared = prepare_case(planned, spec, memory_bytes, device)
    except BadScanError as bad:
        return receipts.empty_receipt(planned, digest, bad.reason, bad.detail)
    store_writer.write_case(
        planned.dataset, planned.row, prepared.image, prepared.label, prepared.present, prepared.connectome
    )
    with step("digest"):
        made = _digest(prepared, spec)
    table = prepared.descriptors
    return Receipt(
        **planned.written().model_dump(),
        spec_digest=digest,
        status="stored",
        digest=made,
        modalities=tuple(m for m, there in zip(spec.modalities, prepared.present, strict=True) if there),
        has_label=prepared.label is not None,
        extent=prepared.extent,
        qc=prepared.qc,
        fingerprint=prepared.fingerprint,
        geometry=prepared.geometry,
        descriptors=table.replace(sources=()) if table is not None and planned.hides_paths else table,
        seconds=round(time.monotonic() - began, 4),
    )


def _digest(prepared: PreparedCase, spec: PreprocessSpec) -> str:
    return case_digest(
        prepared.image,
        prepared.label,
        np.array(prepared.present),
        np.asarray(prepared.geometry.affine),
        prepared.geometry.origin,
        table_bytes(prepared.descriptors) + connectome_bytes(prepared.connectome, spec.connectome),
    )


def preprocess_batch(
    store_url: str,
    cases: Sequence[dict[str, Any]],
    token: str,
    memory_bytes: int = nifti.DEFAULT_MEMORY,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """Preprocess the planned cases of one case batch and write their receipts; returns a short line for each.

    cases: PlannedCase as JSON-able dicts; token: of the flow's lease; device: `cpu`, or `cuda` on the workers of a CUDA
    cluster. Cases with a matching receipt are skipped, so running a batch again costs little; a case that was begun
    twice without a receipt is quarantined, and one that was forgotten since it was planned has no line.

    A case that fails does not stop the others: CasesFailedError names all of them at the end. When storage was away,
    StorageError is raised instead, at once for two cases on end.
    """
    _one_thread()
    writer = open_writer(store_url)
    lines: list[dict[str, Any]] = []
    failed: dict[str, Exception] = {}
    last: Exception | None = None
    for line in cases:
        planned = PlannedCase.model_validate(line)
        with doing(stage="preprocess", dataset=planned.dataset, case=planned.case):
            try:
                receipt = _finished(planned, writer, token, memory_bytes, device)
            except Exception as error:  # the others must not pay for a bug or a bad disk
                if isinstance(error, StorageError) and isinstance(last, StorageError):
                    raise
                _log.exception("%s/%s (row %d) failed", planned.dataset, planned.case, planned.row)
                failed[f"{planned.dataset}/{planned.case} (row {planned.row})"] = last = error
                continue
        last = None
        if receipt is not None:
            lines.append(receipt.model_dump(mode="json", exclude={"fingerprint", "geometry", "files", "descriptors"}))
    _raise_failure(failed, len(cases))
    return lines


def _raise_failure(failed: dict[str, Exception], count: int) -> None:
    """Raise for the failed cases of a batch; StorageError as it is, for then the batch is run again."""
    if away := next((error for error in failed.values() if isinstance(error, StorageError)), None):
        raise away
    if failed:
        named = [f"{name}: {type(error).__name__}: {error}" for name, error in failed.items()]
        more = [f"... and {len(named) - FAILED_SHOWN} more"] if len(named) > FAILED_SHOWN else []
        told = "; ".join([*named[:FAILED_SHOWN], *more])
        raise CasesFailedError(f"{len(failed)} of {count} cases failed, the others are done: {told}")


def _finished(planned: PlannedCase, writer: StoreWriter, token: str, memory_bytes: int, device: str) -> Receipt | None:
    """Return the receipt of a case, which is made unless it is there; None for a forgotten case."""
    url, row = writer.url, (planned.dataset, planned.row)
    receipt = receipts.read_receipt(url, planned, writer.spec.content_digest())
    if receipt is not None:
        return receipt
    # A worker may outlive its flow, and its plan be older than a tombstone.
    if row in receipts.forgotten_rows(url):
        return None
    receipt = _attempt(planned, writer, token, memory_bytes, device)
    with step("receipt"):
        receipts.write_receipt(url, receipt)
    if row in receipts.forgotten_rows(url):
        # It was erased meanwhile, maybe before this was written. A tombstone of later erases after it.
        writer.erase_case(*row)
        receipts.delete_receipt(url, planned)
        receipts.clear_attempts_of(url, planned.dataset, [planned.row])
        return None
    return receipt


def _attempt(planned: PlannedCase, writer: StoreWriter, token: str, memory_bytes: int, device: str) -> Receipt:
    with step("receipt"):
        claimed = receipts.claim_attempt(writer.url, token, planned)
    if claimed:
        return preprocess_case(planned, writer.spec, writer, memory_bytes, device)
    return receipts.empty_receipt(
        planned,
        writer.spec.content_digest(),
        Reason.KILLED_WORKER,
        f"its worker process died {receipts.MAX_ATTEMPTS} times while it was being preprocessed",
    )


@task(
    name="preprocess case batch",
    task_run_name="{dataset}: {first} and {others} more",
    retries=0,
    persist_result=False,
    cache_policy=NO_CACHE,
    log_prints=False,
)
def preprocess_batch_task(
    store_url: str,
    cases_json: str,
    token: str,
    memory_bytes: int,
    device: str,
    dataset: str,
    first: str,
    others: int,
    named: bool,
) -> dict[str, dict[str, float]]:
    """Run `preprocess_batch` on a Dask worker; return `cases` by status and the `seconds` of each step (stopwatch).

    cases_json: one text, because Prefect and Dask look at every value inside lists and dictionaries when a task is
    submitted. named: whether the state of this task run may name cases and files; without it an error says its kind
    alone, and the worker's log the rest. dataset, first and others name the task run.
    """
    try:
        with measuring() as seconds:
            lines = preprocess_batch(store_url, json.loads(cases_json), token, memory_bytes, device)
    except Exception as error:
        if named:
            raise
        _log.exception("a case batch failed")
        raise _unnamed(error) from None
    return {"cases": dict(Counter(line["status"] for line in lines)), "seconds": dict(seconds)}


def _unnamed(error: Exception) -> Exception:
    """Return an error of the same meaning to the flow that names no case and no file."""
    text = f"{type(error).__name__} in this case batch; subject ids are left out here, the worker's log has them"
    return StorageError(text) if isinstance(error, StorageError) else CasesFailedError(text)


def _one_thread() -> None:
    """A worker computes one case at a time on one thread; more would only fight for the cores."""
    torch.set_num_threads(1)
    limit_threads(1)
