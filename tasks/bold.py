"""The signals of an atlas's regions from a BOLD image in MNI space: averaged, scrubbed, cleaned of confounds, filtered.

The steps are nilearn's: means over labels (as NiftiLabelsMasker takes them), the confounds of fMRIPrep by strategy
(`load_confounds`; Wang et al. 2024, PLOS Comput Biol 20:e1011942), `signal.clean` with the order of Lindquist et al.
2019 (HBM 40:2358). Frames with a framewise displacement above the spec's limit are left out (Power et al. 2012,
NeuroImage 59:2142), and those that fMRIPrep calls non-steady.
"""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from models.connectomes import ConnectomeSpec
from models.reasons import Reason
from tasks.affines import BadScanError
from tasks.atlas_image import Labels, labels_on
from tasks.connectome import FLAT, Doubles, Series, check_frames, listed, without_signal
from tasks.headers import MAX_TEXT_BYTES
from tasks.mni import TURN_MAX, turn_of
from tasks.nifti import DEFAULT_MEMORY
from tasks.nifti_frames import Run, blocks_of, open_run

DISPLACEMENT = "framewise_displacement"
SEEN_MIN = 0.5
"""Share of the regions that must lie in the image; with less it is not in MNI space."""


@dataclass(frozen=True)
class ConfoundsFile:
    """What fMRIPrep wrote beside a BOLD image."""

    raw: bytes
    name: str
    meta: bytes | None = None
    """Its `.json`, which compcor needs."""


@dataclass(frozen=True)
class _Plan:
    """Which frames are kept, and what is regressed out of them."""

    keep: np.ndarray
    """Indices of the kept frames."""
    regressors: pd.DataFrame | None
    fd_mean_mm: float | None
    flags: dict[str, Any]


def series_from_bold(
    raw: bytes,
    name: str,
    confounds: ConfoundsFile | None,
    spec: ConnectomeSpec,
    nan_share_max: float = 0.01,
    memory_bytes: int = DEFAULT_MEMORY,
) -> Series:
    """Return the cleaned signals of the kept frames; raises BadScanError with the rule that is broken.

    raw: bytes of a 4D NIfTI file in MNI space. nan_share_max: of the voxels in regions that may be NaN in any one
    frame; they become 0.
    memory_bytes: what a few frames may take.
    """
    run = open_run(raw, name, memory_bytes)
    _check_filter(run, spec)
    labels = _labels(run, spec)
    plan = _plan(run, confounds, spec)
    check_frames(name, len(plan.keep), run.frames, spec)
    return _cleaned(_signals(raw, run, labels, len(spec.regions), nan_share_max), run, plan, spec)


def _labels(run: Run, spec: ConnectomeSpec) -> Labels:
    """Return the atlas on the grid of the run; raises BadScanError when it does not lie in MNI space."""
    if not spec.atlas_image:
        raise BadScanError(
            Reason.NO_ATLAS_IMAGE,
            f"{run.name}: a BOLD image needs the label image of atlas {spec.atlas!r}; set atlas_image and "
            "atlas_sha256 of the spec's connectome (`brainloom atlas show` prints them)",
        )
    if (turned := turn_of(run.affine)) > TURN_MAX:
        raise BadScanError(
            Reason.NOT_MNI,
            f"{run.name}: axes are turned by {turned:.1f} degrees, at most {TURN_MAX:g}; give the BOLD image that is "
            "resampled into MNI space",
        )
    labels = labels_on(spec, run.shape, run.affine)
    seen = int(np.count_nonzero(np.bincount(labels.ravel(), minlength=len(spec.regions) + 1)[1:]))
    if seen < SEEN_MIN * len(spec.regions):
        raise BadScanError(
            Reason.NOT_MNI,
            f"{run.name}: {seen} of {len(spec.regions)} regions of atlas {spec.atlas!r} lie in the image, at least "
            f"{SEEN_MIN:.0%} are expected of one in MNI space",
        )
    return labels


def _signals(raw: bytes, run: Run, labels: Labels, count: int, nan_share_max: float) -> Doubles:
    """Return the mean over each region (frames, regions); NaN for a region without a voxel in the image."""
    from nilearn.regions import img_to_signals_labels  # here: it takes 2 s, and few need it

    # z, y, x as in the file: frames whose voxels lie in a row are averaged several times faster.
    image, inside = nib.Nifti1Image(np.ascontiguousarray(labels.T), np.eye(4)), labels > 0
    signals = np.full((run.frames, count), np.nan)
    first, worst = 0, 0.0
    for block in blocks_of(raw, run):
        if not np.isfinite(block.sum()):
            bad = ~np.isfinite(block)
            worst = max(worst, float(bad[inside].mean(axis=0).max()))
            block[bad] = 0
        found, present, _ = img_to_signals_labels(nib.Nifti1Image(block.transpose(2, 1, 0, 3), np.eye(4)), image)
        signals[first : first + len(found), np.asarray(present, int) - 1] = found
        first += len(found)
    # In each frame by itself: one that is lost whole would be a spike in all regions, and so their correlation.
    if worst > nan_share_max:
        raise BadScanError(
            Reason.NOT_FINITE,
            f"{run.name}: in a frame {worst:.1%} of the voxels in regions are not finite, at most {nan_share_max:.1%} "
            "are allowed",
        )
    flat = np.nanmax(signals, axis=1) - np.nanmin(signals, axis=1) <= FLAT * np.nanmax(np.abs(signals), axis=1)
    if flat.any() and not flat.all():
        raise BadScanError(
            Reason.NOT_FINITE,
            f"{run.name}: {int(flat.sum())} frames, first {int(np.flatnonzero(flat)[0])}, are empty: all regions have "
            "the same value; leave them out of the image and of its confounds",
        )
    return signals


def _plan(run: Run, confounds: ConfoundsFile | None, spec: ConnectomeSpec) -> _Plan:
    """Return what is kept and regressed out, from the confounds."""
    asked = _strategies(spec)
    if confounds is None and asked:
        raise BadScanError(
            Reason.CONFOUNDS,
            f"{run.name}: the case has no confounds file, and the spec regresses out {', '.join(asked)}; give the file "
            "(modality bold_confounds), or set confounds: [] for images that are cleaned already",
        )
    if confounds is None:
        return _Plan(np.arange(run.frames), None, None, {})
    table = _table(confounds, run)
    regressors, steady = _loaded(confounds, spec)
    keep = np.arange(run.frames) if steady is None else np.asarray(steady)
    moved = table[DISPLACEMENT].to_numpy(float) if DISPLACEMENT in table else np.full(run.frames, np.nan)
    known = np.isfinite(moved)  # the first frame has none
    if spec.fd_threshold_mm and not known.any():
        raise BadScanError(
            Reason.CONFOUNDS,
            f"{confounds.name}: has no number in a column {DISPLACEMENT}, and the spec leaves out frames above "
            f"{spec.fd_threshold_mm:g} mm; set fd_threshold_mm to 0 to keep all",
        )
    flags: dict[str, Any] = {}
    if "high_pass" in spec.confounds and not any("cosine" in str(column) for column in table):
        flags["high_pass_absent_bold"] = True
    if spec.fd_threshold_mm:
        keep = keep[~(moved[keep] > spec.fd_threshold_mm)]
    mean = float(moved[known].mean()) if known.any() else None
    return _Plan(keep, regressors if asked else None, mean, flags)


def _table(confounds: ConfoundsFile, run: Run) -> pd.DataFrame:
    """Return the confounds, one line per frame of the run."""
    if len(confounds.raw) > MAX_TEXT_BYTES:
        raise BadScanError(
            Reason.CONFOUNDS, f"{confounds.name}: {len(confounds.raw):,} bytes, at most {MAX_TEXT_BYTES:,} are read"
        )
    try:
        table = pd.read_csv(BytesIO(confounds.raw), sep="\t", na_values="n/a")
    except (ValueError, UnicodeDecodeError) as error:
        raise BadScanError(Reason.CONFOUNDS, f"{confounds.name}: no table ({str(error).strip()})") from None
    if len(table) != run.frames:
        raise BadScanError(
            Reason.CONFOUNDS, f"{confounds.name}: {len(table)} lines, {run.name} has {run.frames} frames"
        )
    if words := [column for column in table if not pd.api.types.is_numeric_dtype(table[column])]:
        raise BadScanError(Reason.CONFOUNDS, f"{confounds.name}: column {words[0]} holds other things than numbers")
    return table


def _strategies(spec: ConnectomeSpec) -> list[str]:
    """Return what is regressed out, in the words of nilearn."""
    return [*spec.confounds, *(["global_signal"] if spec.global_signal else [])]


def _loaded(confounds: ConfoundsFile, spec: ConnectomeSpec) -> tuple[pd.DataFrame, Any]:
    """Return the regressors (frames, columns) and the indices of steady frames, None for all."""
    from nilearn.interfaces.fmriprep import load_confounds

    # nilearn finds the table by fMRIPrep's names; the catalog knows already which one it is.
    with tempfile.TemporaryDirectory(prefix="brainloom-confounds-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty strategy is what the spec asks for
        Path(folder, "sub-x_desc-confounds_timeseries.tsv").write_bytes(confounds.raw)
        if confounds.meta is not None:
            Path(folder, "sub-x_desc-confounds_timeseries.json").write_bytes(confounds.meta)
        try:
            found, steady = load_confounds(str(Path(folder, "sub-x_desc-preproc_bold.nii.gz")), _strategies(spec))
        except (ValueError, KeyError, IndexError) as error:
            raise BadScanError(
                Reason.CONFOUNDS, f"{confounds.name}: {' '.join(str(error).replace(folder, '').split())}"
            ) from None
    regressors = pd.DataFrame() if found is None else found
    if bad := [column for column in regressors if not np.isfinite(regressors[column]).all()]:
        raise BadScanError(Reason.CONFOUNDS, f"{confounds.name}: values that are not finite in {listed(bad)}")
    return regressors, steady


def _check_filter(run: Run, spec: ConnectomeSpec) -> None:
    if not spec.low_pass_hz and not spec.high_pass_hz:
        return
    if run.tr_s is None:
        raise BadScanError(
            Reason.NO_TR,
            f"{run.name}: the header gives {run.tr_words} between frames, and the spec filters from "
            f"{spec.high_pass_hz:g} to {spec.low_pass_hz or np.inf:g} Hz; correct pixdim[4] and xyzt_units, or set "
            "low_pass_hz and high_pass_hz to 0",
        )
    if max(spec.low_pass_hz, spec.high_pass_hz) >= (half := 0.5 / run.tr_s):
        raise BadScanError(
            Reason.NO_TR,
            f"{run.name}: a frame every {run.tr_s:g} s shows at most {half:g} Hz, the spec filters from "
            f"{spec.high_pass_hz:g} to {spec.low_pass_hz:g} Hz",
        )


def _cleaned(signals: Doubles, run: Run, plan: _Plan, spec: ConnectomeSpec) -> Series:
    """Return the kept frames without trend, confounds and what the filter stops."""
    from nilearn.signal import clean

    here = np.flatnonzero(~without_signal(signals))
    values = np.full((len(plan.keep), signals.shape[1]), np.nan)
    columns = 0 if plan.regressors is None else plan.regressors.shape[1]
    lost = 1 + columns + _stopped(len(plan.keep), run, spec)
    if len(here) and len(plan.keep) > lost:
        try:
            with threadpool_limits(1):  # the same bits for any number of threads
                found = clean(
                    signals[:, here],
                    detrend=True,
                    standardize=None,
                    sample_mask=plan.keep,
                    confounds=plan.regressors if columns else None,
                    filter="butterworth" if spec.low_pass_hz or spec.high_pass_hz else False,
                    low_pass=spec.low_pass_hz or None,
                    high_pass=spec.high_pass_hz or None,
                    t_r=run.tr_s,
                )
        except ValueError as error:  # a filter is longer than the run
            raise BadScanError(
                Reason.FEW_FRAMES, f"{run.name}: {len(plan.keep)} frames cannot be cleaned ({error})"
            ) from None
        # What confounds explain wholly is no signal any more, but the rounding that is left of it.
        left = found.std(axis=0) > FLAT * signals[:, here].std(axis=0)
        values[:, here[left]] = found[:, left]
    flags = {f"{flag}_bold": value for flag, value in run.flags.items()} | plan.flags
    return Series(values, run.name, run.frames, plan.fd_mean_mm, lost, flags)


def _stopped(frames: int, run: Run, spec: ConnectomeSpec) -> float:
    """Return the degrees of freedom that the filter takes: the share of frequencies that do not pass."""
    if run.tr_s is None or not (spec.low_pass_hz or spec.high_pass_hz):
        return 0.0
    half = 0.5 / run.tr_s
    return frames * (1 - ((spec.low_pass_hz or half) - spec.high_pass_hz) / half)
