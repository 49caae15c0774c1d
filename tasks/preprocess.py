"""One case into the store, one case batch, and the Prefect task that a Dask worker runs."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from prefect import task
from prefect.cache_policies import NO_CACHE

from models.records import PlannedCase, PreprocessSpec, Reason, Receipt
from models.store_layout import limit_threads
from models.store_writer import StoreWriter, case_digest, open_writer
from tasks import nifti, receipts
from tasks.affines import BadScanError
from tasks.prepare import prepare_case


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
    store_writer.write_case(planned.dataset, planned.row, prepared.image, prepared.label, prepared.present)
    affine = np.asarray(prepared.geometry.affine)
    return Receipt(
        **planned.model_dump(),
        spec_digest=digest,
        status="stored",
        digest=case_digest(
            prepared.image, prepared.label, np.array(prepared.present), affine, prepared.geometry.origin
        ),
        modalities=tuple(m for m, there in zip(spec.modalities, prepared.present, strict=True) if there),
        has_label=prepared.label is not None,
        extent=prepared.extent,
        qc=prepared.qc,
        fingerprint=prepared.fingerprint,
        geometry=prepared.geometry,
        seconds=round(time.monotonic() - began, 4),
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
    cluster. Cases with a matching receipt are skipped, so
    running a batch again costs little; a case that was begun twice without a receipt is quarantined.
    """
    _one_thread()
    writer = open_writer(store_url)
    digest = writer.spec.content_digest()
    lines = []
    for line in cases:
        planned = PlannedCase.model_validate(line)
        receipt = receipts.read_receipt(store_url, planned, digest)
        if receipt is None:
            receipt = _attempt(planned, writer, token, memory_bytes, device)
            receipts.write_receipt(store_url, receipt)
        lines.append(receipt.model_dump(mode="json", exclude={"fingerprint", "geometry", "files"}))
    return lines


def _attempt(planned: PlannedCase, writer: StoreWriter, token: str, memory_bytes: int, device: str) -> Receipt:
    if receipts.claim_attempt(writer.url, token, planned):
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
) -> dict[str, int]:
    """Run `preprocess_batch` on a Dask worker and return how many cases have which status.

    cases_json: one text, because Prefect and Dask look at every value inside lists and dictionaries when a task is
    submitted; the last three arguments only name the task run.
    """
    lines = preprocess_batch(store_url, json.loads(cases_json), token, memory_bytes, device)
    return dict(Counter(line["status"] for line in lines))


def _one_thread() -> None:
    """A worker computes one case at a time on one thread; more would only fight for the cores."""
    torch.set_num_threads(1)
    limit_threads(1)
