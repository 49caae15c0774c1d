"""Where the voxels of a NIfTI file lie in the world: sform or qform, and what makes them unusable.

Without torch, because the catalog reads 16k headers with it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from nibabel.spatialimages import HeaderDataError

from models.records import Reason

SHEAR_LIMIT = 0.02
"""Largest cosine between two voxel axes that still counts as rectangular."""
CONFLICT_MM = 0.5
"""sform and qform conflict when they place a corner of the volume further apart than this."""


class BadScanError(Exception):
    """A file that cannot be used: data, not a bug. Becomes a quarantined case with this reason and detail."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def choose_affine(header: Any, shape: tuple[int, ...], name: str) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the voxel -> RAS+ mm matrix and flags: the sform if it is set and usable, else the qform.

    Usable: finite, not singular, not sheared by more than SHEAR_LIMIT. nibabel prefers the sform, ITK the qform; a
    conflict is flagged, never resolved in silence. Raises BadScanError when neither is usable.
    """
    found: dict[str, np.ndarray] = {}
    defects: list[str] = []
    for kind, read in (("sform", header.get_sform), ("qform", header.get_qform)):
        try:
            matrix, code = read(coded=True)
        except (ValueError, HeaderDataError) as error:
            defects.append(f"{kind} {error}")
            continue
        if not code or matrix is None:
            defects.append(f"{kind} not set")
        elif defect := affine_defect(matrix):
            defects.append(f"{kind} {defect}")
        else:
            found[kind] = np.asarray(matrix, dtype=np.float64)
    if not found:
        raise BadScanError(Reason.BAD_AFFINE, f"{name}: {'; '.join(defects)}")
    kind, affine = next(iter(found.items()))
    flags: dict[str, Any] = {"affine_from": kind} if kind != "sform" else {}
    if any("not set" not in defect for defect in defects):
        flags["affine_defect"] = "; ".join(defects)
    if len(found) == 2 and (gap := corner_gap_mm(found["sform"], found["qform"], shape)) > CONFLICT_MM:
        flags["affine_conflict_mm"] = round(gap, 3)
    zooms = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.allclose(zooms, lengths, rtol=0.01):
        flags["zooms_disagree"] = [round(float(v), 4) if math.isfinite(v) else None for v in (*zooms, *lengths)]
    return affine, flags


def affine_defect(matrix: np.ndarray) -> str:
    """Say what is wrong with a voxel -> mm matrix (not finite, singular, sheared); empty when it is usable."""
    axes = np.asarray(matrix, dtype=np.float64)[:3, :3]
    if not np.isfinite(matrix).all():
        return "not finite"
    lengths = np.linalg.norm(axes, axis=0)
    if lengths.min() < 1e-3 or lengths.max() > 1e3:
        return f"singular: voxel edges of {', '.join(f'{v:.4g}' for v in lengths)} mm"
    unit = axes / lengths
    if abs(np.linalg.det(unit)) < 1e-2:
        return f"singular: determinant {np.linalg.det(axes):.3g}"
    cosine = np.abs(unit.T @ unit - np.eye(3)).max()
    return f"sheared: cosine {cosine:.3f} between axes, at most {SHEAR_LIMIT}" if cosine > SHEAR_LIMIT else ""


def corner_gap_mm(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> float:
    """Return how far apart two affines place the same corner of a volume."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape[:3]], (1,), indexing="ij")).reshape(4, -1)
    return float(np.linalg.norm(((a - b) @ corners)[:3], axis=0).max())
