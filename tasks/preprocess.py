"""One case from its files to its shard and receipt, one case batch, and the Prefect task that a Dask worker runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from prefect import task
from prefect.cache_policies import NO_CACHE

from infra import storage
from models.records import CaseGeometry, Matrix, PlannedCase, PreprocessSpec, Reason, Receipt, SourceFile
from models.store_layout import limit_threads
from models.store_writer import StoreWriter, case_digest, open_writer
from tasks import nifti, receipts, volumes
from tasks.fingerprint import fingerprint
from tasks.nifti import BadScanError, Volume
from tasks.volumes import Grid

LABEL = "label"


@dataclass(frozen=True)
class PreparedCase:
    """A case ready to be stored; pure values."""

    image: np.ndarray
    """(M, x, y, z) float16 in [0, 1]; absent modalities are zero."""
    label: np.ndarray | None
    """(x, y, z) uint8."""
    present: tuple[bool, ...]
    geometry: CaseGeometry
    qc: dict[str, Any]
    fingerprint: tuple[float, ...]

    @property
    def extent(self) -> tuple[int, int, int]:
        """Voxels by axis."""
        _, x, y, z = self.image.shape
        return x, y, z


def prepare_case(planned: PlannedCase, spec: PreprocessSpec, memory_bytes: int = nifti.DEFAULT_MEMORY) -> PreparedCase:
    """Read, check, place, crop and scale one case. Raises BadScanError with the reason for quarantine."""
    names = [file.modality for file in planned.files]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise BadScanError(Reason.DUPLICATE_SCAN, f"more than one file of {', '.join(doubled)}")
    files = {file.modality: file for file in planned.files}
    used = [modality for modality in spec.modalities if modality in files]
    if not used:
        raise BadScanError(Reason.NO_SCAN, f"files of {names or 'nothing'}; the spec knows {list(spec.modalities)}")
    scans = {modality: read_scan(files[modality], spec, memory_bytes) for modality in used}
    label = read_label(files[LABEL], memory_bytes) if LABEL in files else None
    reference = next((m for m in spec.reference_order if m in scans), used[0])
    return _assemble(scans, label, reference, spec, sorted(set(files) - {*used, LABEL}))


def read_scan(file: SourceFile, spec: PreprocessSpec, memory_bytes: int) -> Volume:
    """Read one image: intact, finite, not constant; raises BadScanError."""
    volume = nifti.parse_nifti(_bytes_of(file), _name_of(file), memory_bytes)
    return nifti.varied(nifti.finite(volume, spec.nan_share_max))


def read_label(file: SourceFile, memory_bytes: int) -> Volume:
    """Read one segmentation: intact, finite, integers of 0..255; an all-zero one is allowed. Raises BadScanError."""
    return nifti.as_label(nifti.finite(nifti.parse_nifti(_bytes_of(file), _name_of(file), memory_bytes), 0.0))


def _assemble(
    scans: dict[str, Volume], label: Volume | None, reference: str, spec: PreprocessSpec, ignored: list[str]
) -> PreparedCase:
    if label is not None:
        _check_label_grid(label, scans)
    target = _target_grid(scans[reference], spec)
    stack = np.stack([_placed(volume, target) for volume in scans.values()])
    box = volumes.foreground_box(stack)
    if spec.frame == "image":
        box = volumes.symmetric(box, target.shape)
    stack = stack[:, box[0], box[1], box[2]]
    ranges = {m: volumes.intensity_range(stack[i], spec, scans[m].name) for i, m in enumerate(scans)}
    scaled = np.stack([volumes.scale(stack[i], *ranges[m]) for i, m in enumerate(scans)])
    inner = tuple(slice(0, n) for n in scaled.shape[1:])
    if spec.frame == "image":
        inner = volumes.symmetric(volumes.foreground_box(scaled), (scaled.shape[1], scaled.shape[2], scaled.shape[3]))
        scaled = scaled[:, inner[0], inner[1], inner[2]]
    start = tuple(outer.start + second.start for outer, second in zip(box, inner, strict=True))
    final = tuple(slice(s, s + n) for s, n in zip(start, scaled.shape[1:], strict=True))
    geometry = _geometry(scans, target, final, ranges, spec)
    image = np.zeros((len(spec.modalities), *scaled.shape[1:]), dtype=np.float16)
    for index, modality in enumerate(scans):
        image[spec.modalities.index(modality)] = scaled[index]
    placed_label = _placed_label(label, target)
    stored_label = None if placed_label is None else np.ascontiguousarray(placed_label[final])
    channel = image[spec.modalities.index(reference)]
    return PreparedCase(
        image=image,
        label=stored_label,
        present=tuple(modality in scans for modality in spec.modalities),
        geometry=geometry,
        qc=_quality(scans, scaled, label, stored_label, ignored),
        fingerprint=fingerprint(channel, geometry.origin, spec.grid),
    )


def _target_grid(reference: Volume, spec: PreprocessSpec) -> Grid:
    if spec.frame == "template":
        return volumes.template_grid(spec)
    return volumes.isotropic_grid(volumes.grid_of(volumes.to_ras(reference)), spec.spacing_mm)


def _placed(volume: Volume, target: Grid) -> np.ndarray:
    placed = volumes.resample(volumes.to_ras(volume), target)
    if not placed.any():
        raise BadScanError(
            Reason.NO_OVERLAP, f"{volume.name}: nothing of it reaches the grid of the case {target.shape}"
        )
    return placed


def _placed_label(label: Volume | None, target: Grid) -> np.ndarray | None:
    if label is None:
        return None
    return volumes.resample(volumes.to_ras(label), target, nearest=True).astype(np.uint8)


def _check_label_grid(label: Volume, scans: dict[str, Volume]) -> None:
    """A label must lie on the grid of one of the scans, up to half a voxel."""
    same_shape = [scan for scan in scans.values() if scan.shape == label.shape]
    if not same_shape:
        shapes = ", ".join(f"{modality} {scan.shape}" for modality, scan in scans.items())
        raise BadScanError(Reason.LABEL_SHAPE, f"{label.name}: {label.shape} voxels, the scans have {shapes}")
    gaps = [volumes.largest_shift(volumes.grid_of(label), volumes.grid_of(scan)) for scan in same_shape]
    if min(gaps) > 0.5:
        raise BadScanError(
            Reason.LABEL_SHAPE,
            f"{label.name}: shaped as a scan, but its affine shifts a corner by {min(gaps):.1f} voxels (limit 0.5)",
        )


def _geometry(
    scans: dict[str, Volume],
    target: Grid,
    box: tuple[slice, ...],
    ranges: dict[str, tuple[float, float]],
    spec: PreprocessSpec,
) -> CaseGeometry:
    size = [s.stop - s.start for s in box]
    if any(n > g for n, g in zip(size, spec.grid, strict=True)):
        raise BadScanError(
            Reason.TOO_LARGE, f"{tuple(size)} voxels after the crop, the grid of spec {spec.name!r} is {spec.grid}"
        )
    centred = [(g - n) // 2 for n, g in zip(size, spec.grid, strict=True)]
    x, y, z = centred if spec.frame == "image" else [s.start for s in box]
    return CaseGeometry(
        affine=_matrix(volumes.shift_affine(target.affine, (box[0], box[1], box[2]))),
        origin=(x, y, z),
        source_shape={modality: scan.shape for modality, scan in scans.items()},
        source_affine={modality: _matrix(scan.affine) for modality, scan in scans.items()},
        intensity_range=ranges,
    )


def _quality(
    scans: dict[str, Volume], scaled: np.ndarray, label: Volume | None, stored: np.ndarray | None, ignored: list[str]
) -> dict[str, Any]:
    """Return finite numbers and flags for the QC page."""
    tissue = (scaled > 0).any(axis=0)
    qc: dict[str, Any] = {"foreground_share": round(float(tissue.mean()), 4)}
    for index, (modality, scan) in enumerate(scans.items()):
        qc[f"snr_{modality}"] = round(volumes.snr_estimate(scaled[index]), 3)
        qc[f"mean_{modality}"] = round(float(scaled[index][tissue].mean()), 4)
        qc.update({f"{flag}_{modality}": value for flag, value in scan.flags.items()})
    if ignored:
        qc["ignored_modalities"] = ignored
    if label is not None and stored is not None:
        qc["label_voxels"] = int((stored > 0).sum())
        qc["label_values"] = [int(v) for v in np.unique(stored)]
        qc.update({f"{flag}_label": value for flag, value in label.flags.items()})
    return qc


def preprocess_case(
    planned: PlannedCase,
    spec: PreprocessSpec,
    store_writer: StoreWriter,
    memory_bytes: int = nifti.DEFAULT_MEMORY,
) -> Receipt:
    """Prepare one case and write its shards; returns its receipt without writing it.

    A bad scan gives a quarantined receipt with its reason; anything else raises.
    """
    began = time.monotonic()
    digest = spec.content_digest()
    try:
        prepared = prepare_case(planned, spec, memory_bytes)
    except BadScanError as bad:
        return receipts.empty_receipt(planned, digest, bad.reason, bad.detail)
    store_writer.write_case(planned.dataset, planned.row, prepared.image, prepared.label)
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
    store_url: str, cases: Sequence[dict[str, Any]], token: str, memory_bytes: int = nifti.DEFAULT_MEMORY
) -> list[dict[str, Any]]:
    """Preprocess the planned cases of one case batch and write their receipts; returns a short line for each.

    cases: PlannedCase as JSON-able dicts; token: of the flow's lease. Cases with a matching receipt are skipped, so
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
            receipt = _attempt(planned, writer, token, memory_bytes)
            receipts.write_receipt(store_url, receipt)
        lines.append(receipt.model_dump(mode="json", exclude={"fingerprint", "geometry", "files"}))
    return lines


def _attempt(planned: PlannedCase, writer: StoreWriter, token: str, memory_bytes: int) -> Receipt:
    if receipts.claim_attempt(writer.url, token, planned):
        return preprocess_case(planned, writer.spec, writer, memory_bytes)
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
    cases: list[dict[str, Any]],
    token: str,
    memory_bytes: int,
    dataset: str,
    first: str,
    others: int,
) -> list[dict[str, Any]]:
    """Run `preprocess_batch` on a Dask worker; the last three arguments only name the task run."""
    return preprocess_batch(store_url, cases, token, memory_bytes)


def _one_thread() -> None:
    """A worker computes one case at a time on one thread; more would only fight for the cores."""
    import torch

    torch.set_num_threads(1)
    limit_threads(1)


def _bytes_of(file: SourceFile) -> bytes:
    try:
        raw = storage.read_bytes(file.path)
    except FileNotFoundError:
        raise BadScanError(Reason.MISSING_FILE, f"{file.path} is not there any more") from None
    if file.size_bytes and len(raw) != file.size_bytes:
        raise BadScanError(
            Reason.UNREADABLE,
            f"{file.path} has {len(raw)} bytes, the catalog says {file.size_bytes}; build the catalog again",
        )
    return raw


def _name_of(file: SourceFile) -> str:
    return file.path.rsplit("/", 1)[-1]


def _matrix(affine: np.ndarray) -> Matrix:
    rows = [[float(v) for v in row] for row in np.asarray(affine)]
    return tuple((a, b, c, d) for a, b, c, d in rows)
