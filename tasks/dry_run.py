"""What a store has cost so far, and what the rest of a catalog will cost."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence

from infra import storage
from models.records import PlannedCase, Scan
from models.spec import PreprocessSpec
from models.store_layout import SHARD_ARRAYS
from tasks import shards
from tasks.estimate import Estimate, Measured, estimate_preprocess, is_opened
from tasks.plan import CaseKey, key_of, scans_by_case


def estimate_store(
    url: str,
    spec: PreprocessSpec,
    scans: Sequence[Scan],
    todo: Sequence[PlannedCase],
    workers: int,
    memory_limit: int,
) -> Estimate:
    """Estimate the work on some planned cases of a catalog's usable scans; reads the store, writes nothing."""
    by_case = scans_by_case(scans)
    wanted = {key_of(case): by_case[key_of(case)] for case in todo}
    opened = {key: [scan for scan in group if is_opened(scan, spec)] for key, group in by_case.items()}
    measured = measure_store(url, opened)
    return estimate_preprocess(wanted, len(by_case), spec, workers, memory_limit, url, measured, free_bytes(url))


def free_bytes(url: str) -> int | None:
    """Return the bytes that are free where a store lies or will lie; None on S3, which does not say."""
    if not storage.is_local(url):
        return None
    place = storage.local_path(url)
    return shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.exists())).free


def measure_store(url: str, by_case: dict[CaseKey, list[Scan]]) -> Measured | None:
    """Return what the published cases cost whose headers the catalog holds, or None when there are none."""
    lines = shards.published(url, ("dataset", "row", "case", "status", "seconds"))
    stored = [line for line in lines.values() if line["status"] == "stored" and line["seconds"]]
    known = [line for line in stored if (line["dataset"], line["case"]) in by_case]
    if not known:
        return None
    return Measured(
        cases=len(known),
        seconds=sum(line["seconds"] for line in known),
        voxels=sum(math.prod(scan.shape) for line in known for scan in by_case[line["dataset"], line["case"]]),
        stored_bytes=int(_shard_bytes(url, {line["dataset"] for line in stored}) * len(known) / len(stored)),
    )


def _shard_bytes(url: str, datasets: set[str]) -> int:
    """Return the bytes of all images, labels and connectomes of some datasets, from listings alone."""
    total = 0
    for dataset in datasets:
        for name in SHARD_ARRAYS:
            try:
                listing = storage.find(storage.join(url, dataset, name))
            except FileNotFoundError:
                continue
            total += sum(int(info.get("size") or 0) for info in listing.values())
    return total
