"""One case from its files to the voxels that are stored: read, check, place, crop, scale."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from models.anatomy import Floats
from models.records import (
    BRAIN_MASK,
    DESCRIPTORS,
    GREY,
    LABEL,
    T1,
    CaseGeometry,
    DescriptorTable,
    Matrix,
    PlannedCase,
    Reason,
    SourceFile,
)
from models.spec import PreprocessSpec
from models.stopwatch import step
from models.store_descriptors import COUNT
from tasks import integrity, nifti, registration, volumes
from tasks.affines import BadScanError
from tasks.arrays import parse_image
from tasks.case_connectome import connectome_of
from tasks.case_quality import grey_quality, image_quality, label_quality
from tasks.descriptors import parse_table
from tasks.fingerprint import fingerprint
from tasks.intensity import intensity_range, scale
from tasks.label_schemes import scheme_conflict
from tasks.mni import require_mni
from tasks.nifti import Volume
from tasks.qc_voxels import end_measures, grid_measure
from tasks.registration import Move
from tasks.resampling import resample
from tasks.source_files import bytes_of, name_of
from tasks.volumes import Block, Box, Grid


@dataclass(frozen=True)
class PreparedCase:
    """A case ready to be stored; pure values."""

    image: np.ndarray
    """(M, x, y, z) float16, in [0, 1] unless the spec keeps intensities; absent modalities are zero. Without any voxel,
    (M, 0, 0, 0), in a case without images."""
    label: np.ndarray | None
    """(x, y, z) uint8."""
    present: tuple[bool, ...]
    geometry: CaseGeometry
    qc: dict[str, Any]
    fingerprint: tuple[float, ...]
    """Empty in a case without images."""
    descriptors: DescriptorTable | None = None
    connectome: Floats | None = None
    """(R, R), in the order of the spec's regions."""

    @property
    def extent(self) -> tuple[int, int, int]:
        """Voxels by axis."""
        _, x, y, z = self.image.shape
        return x, y, z


def prepare_case(
    planned: PlannedCase, spec: PreprocessSpec, memory_bytes: int = nifti.DEFAULT_MEMORY, device: str = "cpu"
) -> PreparedCase:
    """Read, check, place, crop and scale one case. Raises BadScanError with the reason for quarantine.

    A case has images, a connectome, or both. device: where the steps run after the files are decoded, `cpu` or `cuda`.
    """
    names = [file.modality for file in planned.files]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise BadScanError(Reason.DUPLICATE_SCAN, f"more than one file of {', '.join(doubled)}")
    files = {file.modality: file for file in planned.files}
    used = _images(files, spec)
    made = connectome_of(files, spec, memory_bytes)
    if not used and made is None:
        also = "" if spec.connectome is None else " and reads connectomes from bold or roi_series"
        raise BadScanError(
            Reason.NO_SCAN, f"files of {list(files) or 'nothing'}; the spec knows {list(spec.modalities)}{also}"
        )
    table = parse_table(bytes_of(files[DESCRIPTORS]), name_of(files[DESCRIPTORS])) if DESCRIPTORS in files else None
    prepared = _with_images(planned, files, used, table, spec, memory_bytes, device) if used else _bare(spec, table)
    qc = dict(prepared.qc)
    read = {*used, BRAIN_MASK, DESCRIPTORS, *([LABEL] if used else []), *(made.used if made else [])}
    if ignored := sorted(set(files) - read):
        qc["ignored_modalities"] = ignored
    if prepared.descriptors is not None:
        values = prepared.descriptors.array()
        qc |= {COUNT: int(np.isfinite(values).sum()), "descriptor_basis": prepared.descriptors.basis}
    if made is None:
        return replace(prepared, qc=qc)
    return replace(prepared, qc=qc | made.qc, connectome=made.matrix)


def _with_images(
    planned: PlannedCase,
    files: dict[str, SourceFile],
    used: list[str],
    table: DescriptorTable | None,
    spec: PreprocessSpec,
    memory_bytes: int,
    device: str,
) -> PreparedCase:
    """Return a case with its images, their label and its descriptors; used: the modalities that are read."""
    reference = _reference(used, spec)
    move = _registered(files[reference], spec, memory_bytes)
    # A map of grey matter is in MNI space by definition.
    scans = {m: _source(read_scan(files[m], spec, memory_bytes), None if m == GREY else move, device) for m in used}
    if spec.space == "mni":
        require_mni(scans[reference].block)
    if spec.brain_mask == "file":
        mask = _read_mask(files, move, memory_bytes, device)
        scans = {modality: _masked(scan, mask) for modality, scan in scans.items()}
    label = _source(read_label(files[LABEL], memory_bytes), move, device) if LABEL in files else None
    if label is not None:
        _check_label_grid(label, scans)
    if GREY in spec.modalities and GREY not in scans and spec.tissue == "approximate":
        scans, table = _with_grey(scans, table, move, spec)
    prepared = _assemble(scans, label, _reference(list(scans), spec), spec)
    if label is not None and (conflict := scheme_conflict(prepared.qc["label_values"], planned.label_scheme)):
        raise BadScanError(Reason.LABEL_VALUES, f"{label.block.name}: {conflict}")
    if move is None:
        return replace(prepared, descriptors=table)
    geometry = prepared.geometry.replace(registration=_matrix(move.matrix))
    qc = {**prepared.qc, "registration_correlation": move.correlation}
    return replace(prepared, geometry=geometry, qc=qc, descriptors=table)


def _bare(spec: PreprocessSpec, table: DescriptorTable | None) -> PreparedCase:
    """Return a case without images."""
    count = len(spec.modalities)
    return PreparedCase(
        image=np.zeros((count, 0, 0, 0), np.float16),
        label=None,
        present=(False,) * count,
        geometry=CaseGeometry(affine=_matrix(np.eye(4)), origin=(0, 0, 0)),
        qc={},
        fingerprint=(),
        descriptors=table,
    )


def _images(files: dict[str, SourceFile], spec: PreprocessSpec) -> list[str]:
    """Return the modalities whose files are read as images, in the order of the spec; empty when there are none."""
    used = [modality for modality in spec.modalities if modality in files]
    if GREY not in used:
        used += [modality for modality in files if spec.shows(modality) and modality not in used]
    return used


def _reference(used: list[str], spec: PreprocessSpec) -> str:
    return next((modality for modality in spec.reference_order if modality in used), used[0])


def _with_grey(
    scans: dict[str, Source], table: DescriptorTable | None, move: Move | None, spec: PreprocessSpec
) -> tuple[dict[str, Source], DescriptorTable | None]:
    """Return the scans with an approximate map of grey matter, and a table of its regions unless there is one."""
    from tasks.anatomy import approximate_grey, expansion_of

    if T1 not in scans:
        return scans, table
    t1 = scans[T1]
    found = approximate_grey(t1.block, volumes.template_grid(spec), None if move is None else expansion_of(move.matrix))
    kept = {modality: scan for modality, scan in scans.items() if modality in spec.modalities}
    return {**kept, GREY: Source(found.block, t1.grid, t1.flags | found.flags)}, table or found.table


@step("decode")
def read_scan(file: SourceFile, spec: PreprocessSpec, memory_bytes: int) -> Volume:
    """Read one image: intact, finite, not constant, its bias field corrected if asked; raises BadScanError."""
    volume = parse_image(bytes_of(file), name_of(file), memory_bytes)
    volume = integrity.varied(integrity.finite(volume, spec.nan_share_max))
    if spec.intensity == "keep" and file.modality in spec.modalities:
        volume = integrity.storable(volume)
    # A map of grey matter has no bias field.
    if spec.bias_correction != "n4" or file.modality == GREY:
        return volume
    with step("correct"):
        return registration.without_bias(volume)


@step("decode")
def read_label(file: SourceFile, memory_bytes: int) -> Volume:
    """Read one segmentation: intact, finite, integers of 0..255; an all-zero one is allowed. Raises BadScanError."""
    volume = parse_image(bytes_of(file), name_of(file), memory_bytes)
    return integrity.as_label(integrity.finite(volume, 0.0))


@dataclass(frozen=True)
class Source:
    """What is kept of a file once it was read: the voxels that are not air, and where they lay."""

    block: Block
    """RAS-nearest axes."""
    grid: Grid
    """As in the file."""
    flags: dict[str, Any]


def _source(volume: Volume, move: Move | None, device: str) -> Source:
    if move is not None:
        volume = volume.replace(affine=move.matrix @ volume.affine)
    return Source(volumes.to_ras(volumes.tight(volume, device)), volumes.grid_of(volume), volume.flags)


def _registered(reference: SourceFile, spec: PreprocessSpec, memory_bytes: int) -> Move | None:
    if spec.registration == "none" or reference.modality == GREY:
        return None
    with step("correct"):
        return registration.register(read_scan(reference, spec, memory_bytes), spec)


def _read_mask(files: dict[str, SourceFile], move: Move | None, memory_bytes: int, device: str) -> Source:
    if BRAIN_MASK not in files:
        raise BadScanError(Reason.NO_MASK, "the spec says brain_mask 'file', the case has no file of brain_mask")
    volume = read_label(files[BRAIN_MASK], memory_bytes)
    if not volume.data.any():
        raise BadScanError(Reason.NO_MASK, f"{volume.name}: the brain mask is empty")
    return _source(volume, move, device)


def _masked(scan: Source, mask: Source) -> Source:
    """Return a scan with zeros outside the mask, which may lie on another grid of the same world."""
    inside = resample(mask.block, scan.block.grid, nearest=True)
    part = volumes.cut(scan.block, inside.box())
    cover = volumes.cut(inside, part.box()).data > 0
    kept = torch.where(cover, part.data, 0)
    if not bool((kept != 0).any()):
        raise BadScanError(Reason.EMPTY, f"{scan.block.name}: nothing but zeros inside {mask.block.name}")
    # Interpolation wants air around the tissue; the mask's own block has a margin of it.
    return replace(scan, block=replace(part, data=kept))


@step("scale")
def _assemble(scans: dict[str, Source], label: Source | None, reference: str, spec: PreprocessSpec) -> PreparedCase:
    target = _target_grid(scans[reference], spec)
    placed = {modality: resample(scan.block, target) for modality, scan in scans.items()}
    box = volumes.foreground_box(list(placed.values()), [0.0] * len(placed), target.box())
    box = volumes.symmetric(box, target.shape) if spec.frame == "image" else box
    placed = {modality: volumes.cut(block, box) for modality, block in placed.items()}
    room = math.prod(volumes.size_of(box))
    ranges = {m: intensity_range(b.data, room - b.data.numel(), spec, b.name) for m, b in placed.items()}
    if spec.frame == "image":
        # What the percentiles turned into air is cropped as well.
        lows = [low for low, _ in ranges.values()]
        box = volumes.symmetric(volumes.foreground_box(list(placed.values()), lows, box), target.shape)
    # On the scans' own grids; filling the image scales voxels in place.
    ends = {k: v for m, scan in scans.items() for k, v in end_measures(scan.block.data, ranges[m], m).items()}
    if spec.frame == "template":
        ends |= {k: v for m, scan in scans.items() for k, v in grid_measure(scan.block, target, ranges[m], m).items()}
    geometry = _geometry(scans, target, box, ranges, spec)
    image = np.zeros((len(spec.modalities), *volumes.size_of(box)), dtype=np.float16)
    for modality, block in placed.items():
        bounds = None if spec.intensity == "keep" else ranges[modality]
        _fill(image[spec.modalities.index(modality)], volumes.cut(block, box), box, bounds)
    stored = None if label is None else _placed_label(label.block, target, box)
    with step("quality"):
        qc = image_quality(image, spec, {m: scan.flags for m, scan in scans.items()}, ranges) | ends
        if GREY in scans and spec.frame == "template":
            qc |= grey_quality(image[spec.modalities.index(GREY)], target, box)
        if label is not None and stored is not None:
            qc |= label_quality(stored, label.flags)
        found = fingerprint(image[spec.modalities.index(reference)], np.asarray(geometry.affine))
    present = tuple(modality in scans for modality in spec.modalities)
    return PreparedCase(
        image=image,
        label=stored,
        present=present,
        geometry=geometry,
        qc=qc,
        fingerprint=found,
    )


def _target_grid(reference: Source, spec: PreprocessSpec) -> Grid:
    if spec.frame == "template":
        return volumes.template_grid(spec)
    return volumes.isotropic_grid(reference.block.grid, spec.spacing_mm)


def _fill(channel: np.ndarray, block: Block, box: Box, bounds: tuple[float, float] | None) -> None:
    """Put a block where it belongs in a channel (x, y, z) of the case, scaled; bounds None: as it is.

    Air becomes what 0 scales to.
    """
    if bounds is not None and bounds[0] < 0:
        channel[...] = float(scale(torch.zeros(1, 1, 1), *bounds))
    inside = tuple(slice(b.start - s.start, b.stop - s.start) for b, s in zip(block.box(), box, strict=True))
    # Never minus zero: it would not survive the store.
    values = block.data.float().add(0.0) if bounds is None else scale(block.data, *bounds)
    source, target = values.cpu(), torch.from_numpy(channel[inside])
    # The axis that is fast in a file is slow in the store: plane by plane, both stay in the cache.
    for plane in range(target.shape[1]):
        target[:, plane].copy_(source[:, plane])


def _placed_label(block: Block, target: Grid, box: Box) -> np.ndarray:
    """Return the label on the voxels of the case, (x, y, z) uint8."""
    stored = np.zeros(volumes.size_of(box), dtype=np.uint8)
    part = volumes.cut(resample(block, target, nearest=True), box)
    inside = tuple(slice(b.start - s.start, b.stop - s.start) for b, s in zip(part.box(), box, strict=True))
    stored[inside] = part.data.to("cpu", torch.uint8).numpy()
    return stored


def _check_label_grid(label: Source, scans: dict[str, Source]) -> None:
    """A label must lie on the grid of one of the scans, up to half a voxel."""
    name, shape = label.block.name, label.grid.shape
    same_shape = [scan.grid for scan in scans.values() if scan.grid.shape == shape]
    if not same_shape:
        shapes = ", ".join(f"{modality} {scan.grid.shape}" for modality, scan in scans.items())
        raise BadScanError(Reason.LABEL_SHAPE, f"{name}: {shape} voxels, the scans have {shapes}")
    gap = min(volumes.largest_shift(label.grid, grid) for grid in same_shape)
    if gap > 0.5:
        raise BadScanError(
            Reason.LABEL_SHAPE,
            f"{name}: shaped as a scan, but its affine shifts a corner by {gap:.1f} voxels (limit 0.5)",
        )


def _geometry(
    scans: dict[str, Source], target: Grid, box: Box, ranges: dict[str, tuple[float, float]], spec: PreprocessSpec
) -> CaseGeometry:
    size = volumes.size_of(box)
    if any(n > g for n, g in zip(size, spec.grid, strict=True)):
        raise BadScanError(
            Reason.TOO_LARGE, f"{size} voxels after the crop, the grid of spec {spec.name!r} is {spec.grid}"
        )
    centred = [(g - n) // 2 for n, g in zip(size, spec.grid, strict=True)]
    x, y, z = centred if spec.frame == "image" else [s.start for s in box]
    return CaseGeometry(
        affine=_matrix(volumes.shift_affine(target.affine, box)),
        origin=(x, y, z),
        source_shape={modality: scan.grid.shape for modality, scan in scans.items()},
        source_affine={modality: _matrix(scan.grid.affine) for modality, scan in scans.items()},
        intensity_range=ranges,
    )


def _matrix(affine: np.ndarray) -> Matrix:
    rows = [[float(v) for v in row] for row in np.asarray(affine)]
    return tuple((a, b, c, d) for a, b, c, d in rows)
