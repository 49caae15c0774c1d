"""A stored case back as NIfTI: on its stored grid, or resampled onto the grids and intensities of its source files.

Regional descriptors and connectomes come as tab-separated tables beside the images.

What cannot come back: intensities outside the percentiles (clipped), voxels outside the extent (cropped), more than
half precision, and whatever resampling to the stored grid has smoothed. On a source grid with the stored spacing the
error is at most 5e-4 of (high - low) for intensities between the percentiles.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import from_matvec
from nibabel.processing import resample_from_to

from infra import storage
from models.records import DESCRIPTORS, GREY, LABEL, Receipt
from models.spec import PreprocessSpec
from models.store import StoredCase, StoredDataset, StoreError, open_store
from models.store_connectomes import CONNECTOME
from tasks import receipts
from tasks.connectome import matrix_text
from tasks.descriptors import table_text
from tasks.stored_cases import stored_rows

TABLES = (DESCRIPTORS, CONNECTOME)
SCANNER, MNI = 1, 4
"""Codes of sform and qform."""


@dataclass(frozen=True)
class _Case:
    """Everything of one case that goes into files."""

    info: StoredCase
    image: np.ndarray
    """(M, x, y, z) float16."""
    label: np.ndarray | None
    spec: PreprocessSpec

    @property
    def present(self) -> list[str]:
        """Modalities that were scanned."""
        return [m for m, there in zip(self.spec.modalities, self.info.present, strict=True) if there]


def export_cases(
    url: str,
    names: Sequence[str],
    out: Path,
    *,
    native: bool = False,
    modalities: Collection[str] = (),
    overwrite: bool = False,
) -> list[Path]:
    """Write `<dataset>_<case>_<modality>.nii.gz` and `..._label.nii.gz` of some cases, and their tables.

    Those are `..._descriptors.tsv` and `..._connectome.tsv`. Returns the files. names: `dataset/case`. native: onto
    each source's own grid in the world of its file, with its intensities; the label goes onto the grid of the case's
    reference modality. modalities: only these, `label`, `descriptors` and `connectome` among them; default all. Raises
    StoreError for a case that is not stored (with its status and reason), for an unknown modality, and for a file that
    exists unless overwrite.
    """
    store = open_store(url)
    files = []
    for dataset, row in stored_rows(store, names).values():
        files += _export(store.dataset(dataset), row, out, native, modalities, overwrite)
    return files


def label_image(data: StoredDataset, row: int, label: np.ndarray, native: bool) -> nib.Nifti1Image:
    """Return a label (x, y, z) on the stored extent of a case as an image, such as a prediction.

    native: on the grid of the case's reference modality, nearest neighbour, as its own label is exported. Raises
    ValueError for another shape than the stored one.
    """
    info = data.case_info(row)
    if label.shape != info.extent:
        raise ValueError(f"{data.name}/{info.case}: the label has shape {label.shape}, the stored case {info.extent}")
    case = _Case(info, np.empty((0,)), label, data.spec)
    return _native(data, case, LABEL) if native else _as_stored(case, LABEL)


def onto_grid(
    data: StoredDataset, row: int, values: np.ndarray, shape: Sequence[int], affine: np.ndarray
) -> np.ndarray:
    """Return integers (x, y, z) on the stored extent of a case on a grid in the world of its files, nearest neighbour.

    affine: voxel of that grid -> RAS+ mm of the files, before any registration. Raises ValueError for another shape
    than the stored one.
    """
    info = data.case_info(row)
    if values.shape != info.extent:
        raise ValueError(f"{data.name}/{info.case}: the masks have shape {values.shape}, the stored case {info.extent}")
    return _resampled(values, info.affine, shape, np.linalg.inv(_to_file(data, info, LABEL)) @ affine, order=0)


def from_grid(data: StoredDataset, row: int, values: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return integers (X, Y, Z) on a grid in the world of a case's files on its stored extent, nearest neighbour.

    affine: voxel of that grid -> RAS+ mm of the files, before any registration. Voxels outside that grid are 0.
    """
    info = data.case_info(row)
    return nearest(values, affine, info.extent, _to_file(data, info, LABEL) @ info.affine)


def nearest(values: np.ndarray, source: np.ndarray, shape: Sequence[int], target: np.ndarray) -> np.ndarray:
    """Return integers (X, Y, Z) on another grid of the same world by nearest neighbour; 0 outside the first one.

    source, target: voxel -> RAS+ mm of the two grids.
    """
    return _resampled(values, source, shape, target, order=0)


def source_grids(data: StoredDataset, row: int) -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
    """Return shape and affine (voxel -> RAS+ mm of the file) of each scan that a stored case was made from.

    A map of grey matter is left out: its file lies in MNI space, not in that of the others.
    """
    info = data.case_info(row)
    shapes, affines = data.small("source_shape")[row], data.small("source_affine")[row]
    found = {}
    for name, there, sizes, affine in zip(data.spec.modalities, info.present, shapes, affines, strict=True):
        shape = tuple(int(n) for n in sizes)
        if there and name != GREY and min(shape) > 0:
            found[name] = (shape, _to_file(data, info, name) @ affine)
    return found


def _resampled(
    volume: np.ndarray, source: np.ndarray, shape: Sequence[int], target: np.ndarray, order: int
) -> np.ndarray:
    # A plane of zeros around: rounding must not push the outermost voxels out of the volume.
    padded = nib.Nifti1Image(np.pad(volume, 1), source @ from_matvec(np.eye(3), [-1, -1, -1]))
    resampled = resample_from_to(padded, (tuple(shape), target), order=order)
    return np.asarray(resampled.dataobj, dtype=volume.dtype)


def _export(
    data: StoredDataset, row: int, out: Path, native: bool, modalities: Collection[str], overwrite: bool
) -> list[Path]:
    case = _Case(data.case_info(row), *data.read_case(row), data.spec)
    there = [*case.present, *([LABEL] if case.label is not None else [])]
    there += [DESCRIPTORS] if data.descriptor_bytes(row) else []
    there += [CONNECTOME] if data.has_connectome(row) else []
    if unknown := sorted(set(modalities) - set(there)):
        raise StoreError(f"{data.name}/{case.info.case} has no {unknown[0]}; it has: {', '.join(there)}")
    wanted = {
        name: out / f"{data.name}_{case.info.case}_{name}.{'tsv' if name in TABLES else 'nii.gz'}"
        for name in there
        if not modalities or name in modalities
    }
    if not overwrite and (old := [path for path in wanted.values() if path.exists()]):
        raise StoreError(f"{old[0]} exists; choose another folder or pass --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    for name, path in wanted.items():
        if name == DESCRIPTORS and data.descriptors is not None:
            path.write_text(table_text(data.descriptors, row), encoding="utf-8")
        elif name == CONNECTOME and data.spec.connectome is not None:
            path.write_text(matrix_text(data.read_connectome(row), data.spec.connectome.regions), encoding="utf-8")
        else:
            nib.save(_native(data, case, name) if native else _as_stored(case, name), path)
    return list(wanted.values())


def _as_stored(case: _Case, name: str) -> nib.Nifti1Image:
    if name == LABEL:
        return _image(case, case.label, case.info.affine, case.spec.frame == "template")
    values = case.image[case.spec.modalities.index(name)].astype(np.float32)
    return _image(case, values, case.info.affine, case.spec.frame == "template")


def _native(data: StoredDataset, case: _Case, name: str) -> nib.Nifti1Image:
    reference = next((m for m in case.spec.reference_order if m in case.present), case.present[0])
    index = case.spec.modalities.index(reference if name == LABEL else name)
    shape = tuple(int(n) for n in data.small("source_shape")[case.info.row, index])
    affine = data.small("source_affine")[case.info.row, index]
    if min(shape) < 1:
        raise StoreError(
            f"{data.name}/{case.info.case}: the store does not know the source grid of {name}; preprocess the case "
            "again, or export it on the stored grid"
        )
    volume = case.label if name == LABEL else _intensities(data, case, index)
    assert volume is not None
    values = _resampled(volume, case.info.affine, shape, affine, order=0 if name == LABEL else 1)
    return _image(case, values, _to_file(data, case.info, name) @ affine, False)


def _to_file(data: StoredDataset, info: StoredCase, name: str) -> np.ndarray:
    """Return what leads from the world of the store to that of a modality's (or label's) file, (4, 4) mm.

    That is the registration, undone. A file of grey matter lies in MNI space and is never moved, nor is a case whose
    reference it is.
    """
    if data.spec.registration == "none":
        return np.eye(4)
    url = receipts.receipt_url(data.url, data.name, info.row)
    try:
        receipt = Receipt.model_validate_json(storage.read_bytes(url))
    except FileNotFoundError:
        receipt = None
    if receipt is None or receipt.geometry is None:
        raise StoreError(
            f"{data.name}/{info.case}: {url}, which holds its registration, is missing; preprocess "
            "with repair: true, or export it on the stored grid"
        )
    registration = receipt.geometry.registration
    own_file = name in {file.modality for file in receipt.files}  # a map that was made from the t1 moved with it
    if registration is None or (name == GREY and own_file):
        return np.eye(4)
    return np.linalg.inv(np.asarray(registration))


def _intensities(data: StoredDataset, case: _Case, index: int) -> np.ndarray:
    """Return a modality in the units of its source, (x, y, z) float32; voxels without tissue in any modality are 0."""
    low, high = (float(v) for v in data.small("intensity_range")[case.info.row, index])
    values = case.image[index].astype(np.float32) * np.float32(high - low) + np.float32(low)
    return np.where((case.image > 0).any(axis=0), values, np.float32(0))


def _image(case: _Case, values: np.ndarray | None, affine: np.ndarray, in_mni: bool) -> nib.Nifti1Image:
    image = nib.Nifti1Image(values, affine)
    code = MNI if in_mni else SCANNER
    image.set_sform(affine, code=code)
    image.set_qform(affine, code=code)
    image.header["descrip"] = f"brainloom {case.info.digest}"[:79].encode()
    return image
