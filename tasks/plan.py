"""Which case gets which row: read the plans of a store, add rows for new and changed cases, project memory.

Rows are append-only. All plan files of a store together say which row belongs to which case and to which version of
its source files; a case whose files changed gets a new row, and its old one is retired at finalise.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from infra import storage
from models.records import PlannedCase, PreprocessSpec, Reason, Scan, SourceFile
from models.store_layout import BUILD, StoreError, check_dataset_name, shard_shape

UNPLANNED = -1
"""Row of a case that has none yet."""
BASE_BYTES = 400 << 20
"""What a worker takes before its first case: Python, torch, zarr."""

CaseKey = tuple[str, str]
"""Dataset and case."""


@dataclass(frozen=True)
class RowPlan:
    """The rows of the wanted cases, and which of them are new."""

    current: tuple[PlannedCase, ...]
    """One per wanted case, in the order of the catalog."""
    added: tuple[PlannedCase, ...]
    """Those that no earlier plan holds."""


def key_of(case: PlannedCase | Scan) -> CaseKey:
    """Return dataset and case name."""
    return case.dataset, case.case


def cases_from_scans(scans: Iterable[Scan]) -> list[PlannedCase]:
    """Group the usable scans of a catalog into cases without rows; files in modality order of their names."""
    groups: dict[CaseKey, list[Scan]] = defaultdict(list)
    for scan in scans:
        if scan.status == "ok":
            check_dataset_name(scan.dataset)
            groups[key_of(scan)].append(scan)
    return [_case(group) for _, group in sorted(groups.items())]


def _case(scans: list[Scan]) -> PlannedCase:
    first = scans[0]
    files = sorted(scans, key=lambda scan: (scan.modality, scan.path))
    return PlannedCase(
        dataset=first.dataset,
        row=UNPLANNED,
        case=first.case,
        subject=first.subject,
        session=first.session,
        label_scheme=next((scan.label_scheme for scan in files if scan.label_scheme), ""),
        split=next((scan.split for scan in files if scan.split), ""),
        files=tuple(SourceFile(modality=s.modality, path=s.path, size_bytes=s.size_bytes, etag=s.etag) for s in files),
    )


def plan_rows(wanted: Sequence[PlannedCase], known: Sequence[PlannedCase]) -> RowPlan:
    """Give every wanted case a row: its latest one if the source files are the same, else the next free one."""
    latest: dict[CaseKey, PlannedCase] = {}
    free: dict[str, int] = defaultdict(int)
    for case in sorted(known, key=lambda c: c.row):
        latest[key_of(case)] = case
        free[case.dataset] = max(free[case.dataset], case.row + 1)
    current, added = [], []
    for case in wanted:
        before = latest.get(key_of(case))
        if before is not None and before.files == case.files:
            # Subject, split and label scheme may be corrected without touching a voxel.
            current.append(case.replace(row=before.row))
            continue
        planned = case.replace(row=free[case.dataset])
        free[case.dataset] += 1
        current.append(planned)
        added.append(planned)
    return RowPlan(tuple(current), tuple(added))


def read_plans(url: str) -> list[PlannedCase]:
    """Return every planned row of a store, in the order of planning."""
    return [
        PlannedCase.model_validate(line)
        for number in plan_numbers(url)
        for line in storage.read_json(_plan_url(url, number))["cases"]
    ]


def plan_numbers(url: str) -> list[int]:
    """Return the numbers of the plans in a store, ascending."""
    names = storage.listdir(storage.join(url, BUILD))
    stems = [name.removeprefix("plan-").removesuffix(".json") for name in names if name.startswith("plan-")]
    return sorted(int(stem) for stem in stems if stem.isdigit())


def write_plan(url: str, added: Sequence[PlannedCase], spec_digest: str) -> int:
    """Append a plan and return its number; raises StoreError when another flow wrote that number first."""
    number = max(plan_numbers(url), default=0) + 1
    body = {"number": number, "spec_digest": spec_digest, "cases": [case.model_dump(mode="json") for case in added]}
    target = _plan_url(url, number)
    if storage.exists(target):
        raise StoreError(f"{target} exists already: another flow writes this store; start again when it has finished")
    storage.write_json(target, body)
    return number


def rewrite_plan(url: str, number: int, change: Callable[[PlannedCase], PlannedCase]) -> None:
    """Replace lines of a plan by others of the same rows; writes nothing when none differs."""
    target = _plan_url(url, number)
    body = storage.read_json(target)
    changed = [change(PlannedCase.model_validate(line)).model_dump(mode="json") for line in body["cases"]]
    if changed != body["cases"]:
        storage.write_json(target, {**body, "cases": changed})


def rows_by_dataset(planned: Iterable[PlannedCase]) -> dict[str, int]:
    """Return how many rows each dataset must have for these plans."""
    rows: dict[str, int] = {}
    for case in planned:
        rows[case.dataset] = max(rows.get(case.dataset, 0), case.row + 1)
    return rows


def datasets_with_labels(planned: Iterable[PlannedCase]) -> set[str]:
    """Return the datasets of which a case has a segmentation."""
    return {case.dataset for case in planned if any(file.modality == "label" for file in case.files)}


def projected_bytes(scans: Sequence[Scan], spec: PreprocessSpec) -> int:
    """Return the memory that one case needs at its peak, from headers alone, beside what the worker takes anyway.

    One file at a time is held as compressed bytes, decoded bytes and float32, together with all modalities on the
    grid of the case as float32 twice (before and after a step) and once as float16 shard.
    """
    voxels = [math.prod(scan.shape) for scan in scans] or [0]
    reading = max((scan.size_bytes + math.prod(scan.shape) * 12 for scan in scans), default=0)
    grid = math.prod(spec.grid) if spec.frame == "template" else max(isotropic_voxels(scans, spec), *voxels)
    images = sum(scan.modality != "label" for scan in scans)
    shard = len(spec.modalities) * math.prod(shard_shape(spec)) * 2
    return reading + grid * 4 * (2 * images + 3) + 2 * shard


def isotropic_voxels(scans: Sequence[Scan], spec: PreprocessSpec) -> int:
    """Return the voxels of the spec's size in the largest field of view among some scans; 0 without headers."""
    fields = [
        math.prod(n * mm / spec.spacing_mm for n, mm in zip(scan.shape[:3], scan.spacing_mm[:3], strict=False))
        for scan in scans
        if len(scan.shape) >= 3 and len(scan.spacing_mm) >= 3
    ]
    return int(max(fields, default=0))


def memory_verdicts(
    cases: Mapping[CaseKey, Sequence[Scan]], spec: PreprocessSpec, limit_bytes: int
) -> tuple[str, dict[CaseKey, str]]:
    """Compare every case's projection with a worker's limit: one sentence for the log, and the refusals by case.

    Raises StoreError before any work when the spec's own grid does not fit the limit.
    """
    bare = projected_bytes((), spec) + BASE_BYTES
    if bare > limit_bytes:
        raise StoreError(
            f"{Reason.MEMORY}: spec {spec.name!r} with grid {spec.grid} needs {bare >> 20} MiB per worker, limit "
            f"{limit_bytes >> 20} MiB; raise BRAINLOOM_WORKER_MEMORY or use fewer workers"
        )
    needs = {key: projected_bytes(scans, spec) + BASE_BYTES for key, scans in cases.items()}
    refused = {
        key: f"projected {need >> 20} MiB per worker, the limit is {limit_bytes >> 20} MiB; use fewer workers"
        for key, need in needs.items()
        if need > limit_bytes
    }
    worst = max(needs, key=needs.__getitem__, default=None)
    largest = f", most for {worst[0]}/{worst[1]}" if worst else ""
    sentence = (
        f"projected memory: at most {max(needs.values(), default=bare) >> 20} MiB per worker{largest}; "
        f"limit {limit_bytes >> 20} MiB; {len(refused)} of {len(needs)} cases refused"
    )
    return sentence, refused


def _plan_url(url: str, number: int) -> str:
    return storage.join(url, BUILD, f"plan-{number}.json")
