"""What a run will cost, said before it starts: time, disk, memory per worker and S3 requests. Pure arithmetic.

Everything follows from the headers in the catalog and, where a store has cases already, from what those cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from infra import storage
from models.records import BOLD, FUNCTIONAL, LABEL, SERIES, Scan
from models.spec import PreprocessSpec
from models.store_layout import StoreError
from tasks.plan import BASE_BYTES, CaseKey, isotropic_voxels, projected_bytes

SECONDS_PER_MVOXEL = 0.01
RESAMPLED_SECONDS_PER_MVOXEL = 0.02
"""Seconds of one worker per million voxels in the files, without and with resampling (docs/speed.md, measured
on two cores): a guess for a machine that has not preprocessed anything yet."""
BOLD_SECONDS_PER_MVOXEL = 0.03
"""The same for the frames of a BOLD image (docs/connectomes.md)."""
SECONDS_PER_CASE = 0.1
"""Beside its voxels: receipt, marker, shard index, quality measures."""
LEAST_SHARE, LEAST_MEASURED = 0.05, 0.5
"""Of the bytes without crop and compression, and of what stored cases took: no store of heads stays below."""
NOTHING_STARTED = "Nothing was started."
"""Last line of every estimate."""
SAME_MM = 1e-3
"""Spacings that differ by less are not resampled."""
STORE_REQUESTS = 6
"""Per case on S3: look for the receipt, attempt marker, image shard, receipt, and a look for tombstones before and
after; a label shard is one more."""


@dataclass(frozen=True)
class Measured:
    """What the stored cases of a store cost."""

    cases: int
    seconds: float
    """Of workers, summed over the cases."""
    voxels: int
    """In the files of these cases."""
    stored_bytes: int
    """Of their shards."""


@dataclass(frozen=True)
class Estimate:
    """The cost of preprocessing some cases."""

    cases: int
    todo: int
    refused: int
    """Cases whose projected memory is above the limit of a worker."""
    scans: int
    read_bytes: int
    workers: int
    seconds: float
    """By the clock, with all workers busy."""
    time_basis: str
    store: str
    """URL."""
    disk_bytes: int
    disk_basis: str
    disk_least: int
    """Bytes below which it will not stay."""
    disk_free: int | None
    """None where that cannot be known, as on S3."""
    memory_bytes: int
    memory_limit: int
    requests: int
    damaged: int = 0
    """Of those to preprocess: stored rows that are made again."""

    def text(self) -> str:
        """Return the estimate in lines, each with how it was made."""
        if not self.todo:
            return f"nothing to do: all {self.cases:,} cases are in the store or in quarantine"
        again = f", {self.damaged:,} of them damaged rows" if self.damaged else ""
        limit = f"{self.refused:,} cases above it are refused" if self.refused else "no case is above it"
        return "\n".join(
            [
                f"cases        {self.todo:,} to preprocess of {self.cases:,}{again}: {self.scans:,} files, "
                f"{human_bytes(self.read_bytes)} to read",
                f"time         about {human_seconds(self.seconds)} with {self.workers} workers ({self.time_basis})",
                f"disk         {human_bytes(self.disk_bytes)} ({self.disk_basis}){self._room()}",
                f"memory       {human_bytes(self.memory_bytes)} per worker at most, projected from the headers; the "
                f"limit is {human_bytes(self.memory_limit)}, {limit}",
                f"S3 requests  {self.requests:,}" + (" (nothing lies on S3)" if not self.requests else ""),
                NOTHING_STARTED,
            ]
        )

    def _room(self) -> str:
        if self.disk_free is None:
            return ""
        less = "" if self.disk_bytes <= self.disk_free else ", less than that: it may not suffice"
        return f"; {human_bytes(self.disk_free)} are free{less}"

    def check_disk(self) -> None:
        """Raise StoreError when the store cannot fit where it is to lie."""
        if self.disk_free is not None and self.disk_least > self.disk_free:
            raise StoreError(
                f"{self.store} needs at least {human_bytes(self.disk_least)} for {self.todo:,} cases (estimated "
                f"{human_bytes(self.disk_bytes)}, {self.disk_basis}), {human_bytes(self.disk_free)} are free; make "
                "room, choose another place, a coarser spec or fewer datasets"
            )


def estimate_preprocess(
    todo: Mapping[CaseKey, Sequence[Scan]],
    cases: int,
    spec: PreprocessSpec,
    workers: int,
    memory_limit: int,
    store_url: str,
    measured: Measured | None = None,
    disk_free: int | None = None,
) -> Estimate:
    """Estimate the work on `todo` (usable scans by case) of `cases` wanted cases.

    measured: what the cases in the store cost; None or no case: rates of another machine, and disk without compression.
    disk_free: bytes that are free at the store.
    """
    needs = {key: projected_bytes(scans, spec) + BASE_BYTES for key, scans in todo.items()}
    accepted = [scans for key, scans in todo.items() if needs[key] <= memory_limit]
    files = [scan for scans in accepted for scan in scans if is_opened(scan, spec)]
    seconds, time_basis = _worker_seconds(files, len(accepted), spec, measured)
    disk, disk_basis = _disk(accepted, spec, measured)
    # A case is one worker's: the last one alone may be running.
    busy = max(1, min(workers, len(accepted)))
    return Estimate(
        cases=cases,
        todo=len(todo),
        refused=len(todo) - len(accepted),
        scans=len(files),
        read_bytes=sum(scan.size_bytes for scan in files),
        workers=workers,
        seconds=seconds / busy,
        time_basis=time_basis,
        store=store_url,
        disk_bytes=disk,
        disk_basis=disk_basis,
        disk_least=int(disk * (LEAST_MEASURED if measured else LEAST_SHARE)),
        disk_free=disk_free,
        memory_bytes=max((need for need in needs.values() if need <= memory_limit), default=0),
        memory_limit=memory_limit,
        requests=_requests(accepted, spec, store_url),
    )


def is_opened(scan: Scan, spec: PreprocessSpec) -> bool:
    """Say whether a file costs anything: functional ones, which are large, only where connectomes are made of them."""
    return scan.modality not in FUNCTIONAL or spec.reads(scan.modality)


def _worker_seconds(
    files: Sequence[Scan], cases: int, spec: PreprocessSpec, measured: Measured | None
) -> tuple[float, str]:
    if measured and measured.cases and measured.voxels:
        rate = measured.seconds / measured.voxels
        basis = f"{measured.cases:,} stored cases took {rate * 1e6:.3f} s per million voxels"
        return sum(math.prod(scan.shape) for scan in files) * rate, basis
    seconds = SECONDS_PER_CASE * cases + sum(math.prod(scan.shape) * _rate(scan, spec) / 1e6 for scan in files)
    return seconds, "voxels in the headers at the rates of docs/speed.md; exact only after some cases are stored here"


def _rate(scan: Scan, spec: PreprocessSpec) -> float:
    if scan.modality == BOLD:
        return BOLD_SECONDS_PER_MVOXEL
    same = all(abs(edge - spec.spacing_mm) < SAME_MM for edge in scan.spacing_mm)
    return SECONDS_PER_MVOXEL if same and spec.frame == "image" else RESAMPLED_SECONDS_PER_MVOXEL


def _disk(cases: Sequence[Sequence[Scan]], spec: PreprocessSpec, measured: Measured | None) -> tuple[int, str]:
    if measured and measured.cases and measured.stored_bytes:
        per_case = measured.stored_bytes / measured.cases
        return int(per_case * len(cases)), f"{measured.cases:,} stored cases take {human_bytes(int(per_case))} each"
    return bare_bytes(cases, spec), "at most: the grids without crop and compression"


def bare_bytes(cases: Iterable[Sequence[Scan]], spec: PreprocessSpec) -> int:
    """Return the bytes of some cases as they would be stored without compression.

    float16 images, uint8 labels, float32 connectomes.
    """
    return sum(_case_bytes(scans, spec) for scans in cases)


def _case_bytes(scans: Sequence[Scan], spec: PreprocessSpec) -> int:
    grid = math.prod(spec.grid)
    images = [scan for scan in scans if spec.shows(scan.modality)]
    labels = [scan for scan in scans if scan.modality == LABEL]
    voxels = grid if spec.frame == "template" else min(grid, isotropic_voxels([*images, *labels], spec))
    regions = len(spec.connectome.regions) if spec.connectome and _is_functional(scans) else 0
    return voxels * (2 * len(images) + len(labels)) + 4 * regions**2


def _is_functional(scans: Sequence[Scan]) -> bool:
    """Say whether a connectome can be made of a case's files."""
    return any(scan.modality in (BOLD, SERIES) for scan in scans)


def _requests(cases: Sequence[Sequence[Scan]], spec: PreprocessSpec, store_url: str) -> int:
    reads = sum(not storage.is_local(scan.path) for scans in cases for scan in scans if is_opened(scan, spec))
    if storage.is_local(store_url):
        return reads
    labels = sum(any(scan.modality == LABEL for scan in scans) for scans in cases)
    connectomes = len(cases) if spec.connectome else 0  # written, or deleted in case there was one
    return reads + STORE_REQUESTS * len(cases) + labels + connectomes


def human_bytes(count: int) -> str:
    """Return a number of bytes in words, e.g. `1.5 GB`."""
    value, units = float(count), ("B", "kB", "MB", "GB", "TB")
    for unit in units:
        if value < 1000 or unit == units[-1]:
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def human_seconds(seconds: float) -> str:
    """Return a duration in words, e.g. `3 h 20 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
