"""From the time series of an atlas's regions to the connectome that is stored, and the numbers that judge it.

nilearn makes the matrix (Varoquaux and Craddock 2013, NeuroImage 80:405-415); Fisher's z is atanh(r). Everything here
is a pure function of numbers: tasks.roi_series and tasks.bold read them from files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from models.anatomy import Floats
from models.connectomes import ConnectomeSpec
from models.reasons import Reason
from models.store_connectomes import FRAMES
from tasks.affines import BadScanError

R_MAX = 1 - 1e-6
"""Correlations are capped here before atanh, so that it stays finite: at 7.25."""
FLAT = 1e-6
"""A signal that varies by less than this share of its largest value is constant: rounding of float32 does as much."""
LEAST_FREEDOM = 10.0
"""Degrees of freedom that must be left of a time series."""
LARGEST = 1e100
"""No signal is larger; the squares of what is would be infinite."""

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """The signals of all regions of an atlas, as they enter the matrix."""

    values: Doubles
    """(kept frames, regions) in the order of the spec; NaN in the column of a region without signal."""
    name: str
    """File name, for messages."""
    frames_all: int
    """Of the file; the values hold those that were kept."""
    fd_mean_mm: float | None = None
    """Mean framewise displacement over all frames of the file; None where nobody measured it."""
    lost: float = 0.0
    """Degrees of freedom that cleaning took from the kept frames, beside the mean."""
    flags: dict[str, Any] = field(default_factory=dict)


def make_connectome(series: Series, spec: ConnectomeSpec) -> tuple[Floats, dict[str, Any]]:
    """Return the connectome (R, R) float32 of a case, and finite numbers for quality control.

    Raises BadScanError for too few frames or too many regions without signal, with the numbers.
    """
    kept = len(series.values)
    check_frames(series.name, kept, series.frames_all, spec)
    _check_size(series)
    absent = without_signal(series.values)
    if absent.sum() > spec.missing_regions:
        names = listed([name for name, gone in zip(spec.regions, absent, strict=True) if gone])
        raise BadScanError(
            Reason.NO_SIGNAL,
            f"{series.name}: {absent.sum()} of {len(absent)} regions have no signal (outside the field of view, or "
            f"constant), the spec allows {spec.missing_regions} (missing_regions): {names}",
        )
    _check_rank(series, spec, absent)
    matrix_RR = matrix_of(series.values, spec)
    strengths = matrix_RR[np.triu_indices(len(matrix_RR), 1)]
    qc: dict[str, Any] = {
        FRAMES: kept,
        f"{FRAMES}_all": series.frames_all,
        "connectome_missing_regions": int(absent.sum()),
        "connectome_mean_z": round(float(np.nanmean(strengths)), 5),
    }
    if series.fd_mean_mm is not None:
        qc["fd_mean_mm"] = round(series.fd_mean_mm, 4)
    return matrix_RR, qc | series.flags


def check_frames(name: str, kept: int, every: int, spec: ConnectomeSpec) -> None:
    """Raise BadScanError when too few frames of a file are left."""
    if kept < spec.min_frames:
        raise BadScanError(
            Reason.FEW_FRAMES,
            f"{name}: {kept} of {every} frames can be used, the spec asks for {spec.min_frames} (min_frames)",
        )
    if kept < spec.min_kept_share * every:
        raise BadScanError(
            Reason.FEW_FRAMES,
            f"{name}: {kept} of {every} frames can be used, {kept / every:.0%}; the spec asks for "
            f"{spec.min_kept_share:.0%} (min_kept_share)",
        )


def without_signal(values: Doubles) -> npt.NDArray[np.bool_]:
    """Say of each region (columns of values) whether it has no signal: not measured, or constant."""
    size = np.abs(values).max(axis=0)
    return ~(values.std(axis=0) > FLAT * size)


def matrix_of(values: Doubles, spec: ConnectomeSpec) -> Floats:
    """Return the matrix (R, R) float32 of signals (frames, regions): symmetric, diagonal 0, Fisher z if asked.

    Rows and columns of regions without signal are NaN. Signals are standardised first, so that Ledoit and Wolf's
    shrinkage (2004) does not depend on their units.
    """
    from nilearn.connectome import ConnectivityMeasure  # here: it takes 2 s, and few need it
    from sklearn.covariance import EmpiricalCovariance, LedoitWolf

    here = np.flatnonzero(~without_signal(values))
    used = values[:, here]
    used = (used - used.mean(axis=0)) / used.std(axis=0, ddof=1)
    estimators = {"empirical": EmpiricalCovariance, "ledoit_wolf": LedoitWolf}
    measure = ConnectivityMeasure(estimators[spec.covariance](store_precision=False), kind=spec.kind)
    with threadpool_limits(1):  # the same bits for any number of threads
        (found,) = measure.fit_transform([used])
    found = (found + found.T) / 2
    if spec.fisher_z:
        found = np.arctanh(np.clip(found, -R_MAX, R_MAX))
    np.fill_diagonal(found, 0)
    matrix_RR = np.full((values.shape[1], values.shape[1]), np.nan, np.float32)
    matrix_RR[np.ix_(here, here)] = found
    return matrix_RR


def matrix_text(matrix_RR: Floats, regions: Sequence[str]) -> str:
    """Return a connectome as tab-separated text: names of the regions in the first line and column; n/a: no signal."""
    lines = ["\t".join(["region", *regions])]
    for region, row in zip(regions, matrix_RR, strict=True):
        # The digits of float32, not those of its nearest double.
        lines.append("\t".join([region, *("n/a" if value != value else str(value) for value in row)]))
    return "\n".join(lines) + "\n"


def listed(names: Sequence[object], shown: int = 5) -> str:
    """Return the first few of some names in one text."""
    more = [f"and {len(names) - shown} more"] if len(names) > shown else []
    return ", ".join([*(str(name) for name in names[:shown]), *more])


def _check_size(series: Series) -> None:
    if (largest := float(np.nanmax(np.abs(series.values), initial=0.0))) > LARGEST:
        raise BadScanError(
            Reason.NOT_FINITE,
            f"{series.name}: holds a value of size {largest:g}, at most {LARGEST:g} can be computed with; write the "
            "file again",
        )


def _check_rank(series: Series, spec: ConnectomeSpec, absent: npt.NDArray[np.bool_]) -> None:
    """Refuse what has no degrees of freedom left, and inverting a covariance that has no inverse."""
    regions = int((~absent).sum())
    left = len(series.values) - 1 - series.lost
    if left < LEAST_FREEDOM:
        raise BadScanError(
            Reason.FEW_FRAMES,
            f"{series.name}: cleaning leaves {max(left, 0):.0f} degrees of freedom of {len(series.values)} frames, at "
            f"least {LEAST_FREEDOM:.0f} are needed; regress fewer confounds or filter less",
        )
    if (spec.kind, spec.covariance) != ("partial correlation", "empirical"):
        return
    if left < regions:
        raise BadScanError(
            Reason.FEW_FRAMES,
            f"{series.name}: partial correlation of {regions} regions needs more than as many degrees of freedom, "
            f"{len(series.values)} frames leave {left:.0f}; use covariance 'ledoit_wolf' or kind 'correlation'",
        )
    used = series.values[:, ~absent]
    if (rank := int(np.linalg.matrix_rank((used - used.mean(axis=0)) / used.std(axis=0)))) < regions:
        raise BadScanError(
            Reason.NO_SIGNAL,
            f"{series.name}: the signals of {regions} regions follow from {rank} of them, so partial correlation has "
            "no answer; use covariance 'ledoit_wolf' or kind 'correlation'",
        )
