"""Which case gets which row: read the plans of a store, add rows for new and changed cases, project memory.

Rows are append-only. All plan files of a store together say which row belongs to which case and to which version of
its source files; a case whose files changed gets a new row, and its old one is retired at finalise. Only files that the
spec reads count, by modality, size and ETag (or modification time, or checksum): files that were moved with their times
keep their row, and a later plan says where they are now.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from infra import storage
from models.records import BOLD, FUNCTIONAL, GREY, SERIES, PlannedCase, Reason, Scan, SourceFile
from models.spec import PreprocessSpec
from models.store_layout import BUILD, StoreError, check_dataset_name, shard_shape
from tasks.headers import CHECKSUM_PREFIX, file_identity

UNPLANNED = -1
"""Row of a case that has none yet."""
BASE_BYTES = 450 << 20
"""What a worker takes before its first case: Python, torch, zarr."""
FLOAT = 4
"""Bytes of a float32 voxel."""
QUALITY_BYTES = 18
"""A voxel of the case: fingerprint and measures of one modality, several float32 images for a moment."""
N4_BYTES, REGISTRATION_BYTES, EXTRA_BYTES = 56, 40, 300 << 20
"""A voxel of the largest file inside N4 and inside registration; what antspyx and the template take in a worker, and as
much again nilearn's maps and the atlas for maps of grey matter."""

TISSUE_BYTES = 160
"""A voxel of the grid on which tissue is looked at, with priors and regions (measured: 150)."""

BOLD_BLOCKS, BOLD_FRAME, SERIES_COPIES = 2.25, 16, 10
"""A BOLD image at its peak: so many blocks of frames, bytes a voxel of one frame (the atlas on its grid), and float64
copies of the regions' signals while they are cleaned (measured: docs/connectomes.md)."""
SERIES_BYTES = 4
"""A byte of a text file with time series: the file, its lines, and the numbers (measured: 2.3)."""
BLOCK_BYTES = 64 << 20
"""Frames of a BOLD image that are held at once, as float64, but one at least."""

CaseKey = tuple[str, str]
"""Dataset and case."""


@dataclass(frozen=True)
class RowPlan:
    """The rows of the wanted cases, and which of them are new."""

    current: tuple[PlannedCase, ...]
    """One per wanted case, in the order of the catalog."""
    added: tuple[PlannedCase, ...]
    """Those that no earlier plan holds."""
    renewed: tuple[PlannedCase, ...] = ()
    """Those that keep their row although the plan says other paths, identities or unread files."""

    @property
    def news(self) -> tuple[PlannedCase, ...]:
        """What the next plan has to say."""
        return (*self.added, *self.renewed)


def key_of(case: PlannedCase | Scan) -> CaseKey:
    """Return dataset and case name."""
    return case.dataset, case.case


def scans_by_case(scans: Iterable[Scan]) -> dict[CaseKey, list[Scan]]:
    """Group scans by dataset and case, in their order."""
    groups: dict[CaseKey, list[Scan]] = defaultdict(list)
    for scan in scans:
        groups[key_of(scan)].append(scan)
    return groups


def cases_from_scans(scans: Iterable[Scan]) -> list[PlannedCase]:
    """Group the usable scans of a catalog into cases without rows; files in modality order of their names."""
    usable = [scan for scan in scans if scan.status == "ok"]
    for dataset in sorted({scan.dataset for scan in usable}):
        check_dataset_name(dataset)
    return [_case(group) for _, group in sorted(scans_by_case(usable).items())]


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


def plan_rows(wanted: Sequence[PlannedCase], known: Sequence[PlannedCase], spec: PreprocessSpec) -> RowPlan:
    """Give every wanted case a row: its latest one if what the spec reads is the same, else the next free one."""
    latest: dict[CaseKey, PlannedCase] = {}
    free: dict[str, int] = defaultdict(int)
    for case in sorted(known, key=lambda c: c.row):
        latest[key_of(case)] = case
        free[case.dataset] = max(free[case.dataset], case.row + 1)
    current, added, renewed = [], [], []
    for case in wanted:
        before = latest.get(key_of(case))
        if before is not None and _unchanged(before, case, spec):
            # Subject, split and label scheme may be corrected without touching a voxel.
            kept = case.replace(row=before.row)
            current.append(kept)
            if before.files != case.written().files:
                renewed.append(kept)
            continue
        planned = case.replace(row=free[case.dataset])
        free[case.dataset] += 1
        current.append(planned)
        added.append(planned)
    return RowPlan(tuple(current), tuple(added), tuple(renewed))


def _unchanged(before: PlannedCase, now: PlannedCase, spec: PreprocessSpec) -> bool:
    then, new = ([file for file in case.files if spec.reads(file.modality)] for case in (before, now))
    return len(then) == len(new) and all(_same_file(a, b) for a, b in zip(then, new, strict=True))


def _same_file(before: SourceFile, now: SourceFile) -> bool:
    """Compare identities; where checksums were switched on since, the file itself tells its size and time or ETag."""
    if before.identity == now.identity:
        return True
    kinds = [file.etag.startswith(CHECKSUM_PREFIX) for file in (before, now)]
    if kinds != [False, True] or (before.modality, before.size_bytes) != (now.modality, now.size_bytes):
        return False
    try:
        return file_identity(now.path) == (before.size_bytes, before.etag)
    except FileNotFoundError:
        return False


def read_plans(url: str) -> list[PlannedCase]:
    """Return every planned row of a store once, in the order of planning; of several lines of a row the last counts."""
    lines = (
        PlannedCase.model_validate(line)
        for number in plan_numbers(url)
        for line in storage.read_json(_plan_url(url, number))["cases"]
    )
    return list({(case.dataset, case.row): case for case in lines}.values())


def plan_numbers(url: str) -> list[int]:
    """Return the numbers of the plans in a store, ascending."""
    names = storage.listdir(storage.join(url, BUILD))
    stems = [name.removeprefix("plan-").removesuffix(".json") for name in names if name.startswith("plan-")]
    return sorted(int(stem) for stem in stems if stem.isdigit())


def write_plan(url: str, news: Sequence[PlannedCase], spec_digest: str, catalog_digest: str = "") -> int:
    """Append a plan of new rows, and of known ones with other files, and return its number.

    catalog_digest: `rows_digest` of the catalog that the rows came from, or its HMAC where paths are hidden; empty
    where there was none. Raises StoreError when another flow wrote that number first.
    """
    number = max(plan_numbers(url), default=0) + 1
    origin = {"number": number, "spec_digest": spec_digest, "catalog_digest": catalog_digest}
    body = {**origin, "cases": [case.written().model_dump(mode="json") for case in news]}
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
    """Return an upper bound of what one case needs at its peak, from headers, beside what the worker takes anyway.

    Two moments can be the peak. While a file is read: its bytes, the decoded voxels and up to three float32 images of
    them, beside the files before it; and what N4 and registration hold. While the case is put together: every file as
    float32, every modality on the grid of the case as float32 and float16, and the measures of quality. Files that the
    spec does not read cost nothing; a brain mask is no image of the case, but masking holds every image twice.
    Measured against it: docs/preprocessing.md. The connectome of a case is made before its images are read.
    """
    return max(_image_bytes(scans, spec), _connectome_bytes(scans, spec))


def _image_bytes(scans: Sequence[Scan], spec: PreprocessSpec) -> int:
    images = [scan for scan in scans if spec.shows(scan.modality)]
    others = [scan for scan in scans if spec.reads(scan.modality) and not spec.shows(scan.modality)]
    masks = [scan for scan in others if scan.modality not in FUNCTIONAL]
    if not images:
        return 0
    kept = FLOAT * sum(map(_voxels, images)) + sum(map(_voxels, masks))
    largest = max(map(_voxels, images))
    grid = math.prod(spec.grid) if spec.frame == "template" else isotropic_voxels(images, spec) or largest
    reading = max(scan.size_bytes + _voxels(scan) * (_itemsize(scan) + 3 * FLOAT) for scan in (*images, *masks))
    n4 = N4_BYTES if spec.bias_correction == "n4" else 0
    steps = largest * max(n4, REGISTRATION_BYTES if spec.registration != "none" else 0)
    masking = FLOAT * sum(map(_voxels, images)) if spec.brain_mask == "file" else 0
    placed = FLOAT * grid * len(images)
    making = max(2 * FLOAT * max(grid, largest), 2 * grid * len(images) + QUALITY_BYTES * grid)
    tissue = _tissue_bytes(spec) if spec.tissue == "approximate" else 0
    extras = EXTRA_BYTES * (bool(steps) + (GREY in spec.modalities))
    return kept + extras + max(reading + steps, masking, placed + making, tissue)


def _connectome_bytes(scans: Sequence[Scan], spec: PreprocessSpec) -> int:
    """Return what the connectome takes while it is made: a BOLD image is read in blocks of frames."""
    if spec.connectome is None:
        return 0
    needs = [EXTRA_BYTES + SERIES_BYTES * scan.size_bytes for scan in scans if scan.modality == SERIES]
    for scan in scans:
        if scan.modality == BOLD:
            frame, frames = math.prod(scan.shape[:3]), math.prod(scan.shape[3:])
            signals = SERIES_COPIES * 2 * FLOAT * frames * len(spec.connectome.regions)
            needs.append(EXTRA_BYTES + scan.size_bytes + bold_bytes(frame) + signals)
    return max(needs, default=0)


def bold_bytes(frame: int) -> int:
    """Return what frames of so many voxels take while they are averaged, beside their file."""
    return int(BOLD_BLOCKS * max(BLOCK_BYTES, 2 * FLOAT * frame)) + BOLD_FRAME * frame


def _tissue_bytes(spec: PreprocessSpec) -> int:
    """Return what an approximate map of grey matter takes while it is made."""
    from tasks.atlas import fine_factor  # here: others plan without torch
    from tasks.volumes import template_grid

    return TISSUE_BYTES * math.prod(spec.grid) * fine_factor(template_grid(spec)) ** 3


def grid_bytes(spec: PreprocessSpec) -> int:
    """Return the bytes of a case that fills the spec's grid in all modalities, float16, as a reader holds it."""
    return 2 * len(spec.modalities) * math.prod(shard_shape(spec))


def _voxels(scan: Scan) -> int:
    return math.prod(scan.shape)


def _itemsize(scan: Scan) -> int:
    return np.dtype(scan.dtype).itemsize if scan.dtype else 2 * FLOAT


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
    bare = grid_bytes(spec) + BASE_BYTES
    if bare > limit_bytes:
        raise StoreError(
            f"{Reason.MEMORY}: spec {spec.name!r} with grid {spec.grid} needs {bare >> 20} MiB per worker, limit "
            f"{limit_bytes >> 20} MiB; raise BRAINLOOM_WORKER_MEMORY up to what the machine has, use fewer workers, or "
            "a coarser or smaller grid"
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
