"""The approximate path: a grey-matter map and regional volumes from a T1 alone. What it is not: docs/anatomy.md.

Five Gaussians of one width (CSF, grey, white, and the voxels between two of them) are fitted to the intensities of the
brain, started at what the MNI152 maps call pure; each voxel's share of grey matter is then its posterior with those
maps, smoothed and mixed with a constant, as priors. Voxels between two tissues count half.
The idea is that of Ashburner and Friston 2005, NeuroImage 26:839-851, without its bias field and its deformation: the
T1 must already lie in MNI space, and only an affine is undone when the map is modulated.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any, Literal

import numpy as np
import torch
from scipy import ndimage
from scipy.special import softmax

from models.anatomy import PLAUSIBLE, DescriptorError, check_values
from models.records import DescriptorTable, Reason
from tasks.affines import BadScanError
from tasks.atlas import Priors, fine_factor, pool, priors_on, regional_sums, subdivide, voxel_mm3
from tasks.resampling import resample
from tasks.volumes import Block, Grid, dense

BASIS: Literal["approximate"] = "approximate"
"""What everything made here is called: descriptors, flags, tables."""
VOLUME = "grey_matter_volume_mm3"
TISSUES = ("csf", "csf and grey", "grey", "grey and white", "white")
"""By rising intensity in a T1."""
GREY_CONTENT = np.array([0.0, 0.5, 1.0, 0.5, 0.0])
SAMPLE = 30_000
"""Voxels to which the mixture is fitted."""
PRIOR_SIGMA_MM = 2.0
"""Smoothing of the priors: after an affine registration a person's cortex lies some millimetres beside the average."""
PRIOR_FLOOR = 0.15
"""Share of the prior that is the same for all tissues, so that enlarged ventricles are not called white matter."""
COVERED_MIN = 0.8
"""Smallest share of the MNI152 brain in which the T1 must have a signal."""
CONTRAST_MIN = 0.08
"""Smallest step from one tissue's mean to the next, as a share of white matter's."""
BIAS_DEGREE, BIAS_ROUNDS = 3, 2
"""Of the polynomial that stands for the bias field, and how often it is fitted."""
START_SD = 0.05
"""Of the mixture, as a share of white matter's intensity."""
NEGLIGIBLE = 0.01
"""Shares of grey matter below count as none."""
GREY_LEVEL = 0.2
"""Voxels above this share of grey matter are counted by `grey_share`; usual in VBM as an absolute threshold."""


@dataclass(frozen=True)
class ApproximateGrey:
    """A grey-matter map that a mixture made, and what is told about it."""

    block: Block
    """(x, y, z) float32: mm^3 of grey matter per mm^3 of MNI space; the person's mm^3 when modulated, else the
    template's."""
    table: DescriptorTable
    """Grey matter of each Desikan-Killiany region, in the same mm^3; no other measure."""
    flags: dict[str, Any]
    """For the receipt: the basis, and whether the map is modulated."""


def approximate_grey(t1: Block, target: Grid, expansion: float | None = None) -> ApproximateGrey:
    """Return the grey matter of a T1 in MNI space on a grid in MNI space.

    t1: RAS-nearest axes, 0 outside the head or brain. expansion: mm^3 of the person per mm^3 of MNI space (the
    determinant of the affine from MNI space to the file), or None when it is not known; the map is then not modulated.

    Raises BadScanError when the T1 leaves out a part of the brain, or when its tissues cannot be told apart.
    """
    factor = fine_factor(target)
    fine = subdivide(target, factor)
    image = dense(resample(t1, fine)).astype(np.float32, copy=False)
    priors = priors_on(fine)
    brain = priors.brain > 0.5
    inside = brain & (image > 0)
    if (covered := inside.sum() / brain.sum()) < COVERED_MIN:
        raise BadScanError(
            Reason.NOT_MNI,
            f"{t1.name}: has a signal in {covered:.0%} of the MNI152 brain, the approximate tissue map needs "
            f"{COVERED_MIN:.0%}; register it first, or use a spec with registration 'affine'",
        )
    shares = _smoothed(priors, inside, fine)
    grey = np.zeros(fine.shape, np.float32)
    places = np.argwhere(inside) / np.array(fine.shape) * 2 - 1
    grey[inside] = GREY_CONTENT @ _posterior(image[inside], shares, places, t1.name)
    found = pool(np.where(grey < NEGLIGIBLE, 0, grey), factor) * np.float32(1.0 if expansion is None else expansion)
    return ApproximateGrey(
        block=Block(torch.from_numpy(found), (0, 0, 0), target, t1.name),
        table=_table(regional_sums(found, target), t1.name),
        flags={"tissue": BASIS, "modulation": "none" if expansion is None else "affine"},
    )


def expansion_of(to_template: np.ndarray) -> float:
    """Return mm^3 of the file per mm^3 of the template, from the (4, 4) affine that leads from the file's mm to MNI."""
    return 1 / abs(float(np.linalg.det(to_template[:3, :3])))


def grey_measures(grey: np.ndarray, grid: Grid) -> dict[str, float]:
    """Return the entries of a receipt's `qc` about a grey-matter map (x, y, z) on a grid in MNI space.

    grey_ml: its integral. grey_share: voxels above GREY_LEVEL as a share of the MNI152 brain there. grey_prior: its
    correlation with the MNI152 average over the brain and wherever the map is not 0; a map that is turned, shifted or
    of another tissue has a low one. A swap of left and right is not seen: the average is symmetric.
    """
    priors = priors_on(grid)
    brain = priors.brain > 0.5
    values = grey.astype(np.float32)
    where = brain | (values > 0)
    pair = values[where], priors.grey[where]
    varied = all(float(part.std()) > 0 for part in pair)
    return {
        "grey_ml": round(float(values.sum(dtype=np.float64)) * voxel_mm3(grid) / 1000, 2),
        "grey_share": round(float((values > GREY_LEVEL).sum() / max(int(brain.sum()), 1)), 4),
        "grey_prior": round(float(np.corrcoef(*pair)[0, 1]), 4) if varied else 0.0,
    }


def _table(volumes_mm3: np.ndarray, name: str) -> DescriptorTable:
    """Return the table of regional volumes; raises BadScanError for volumes that no cortex has."""
    measured = tuple(round(float(v), 2) if v >= PLAUSIBLE[VOLUME].region[0] else None for v in volumes_mm3)
    absent = measured.count(None)
    try:
        check_values({VOLUME: measured}, "desikan_killiany", absent)
    except DescriptorError as error:
        raise BadScanError(error.reason, f"{name}: {error}") from None
    return DescriptorTable(
        atlas="desikan_killiany", basis=BASIS, values={VOLUME: measured}, missing_regions=absent, sources=(name,)
    )


def _smoothed(priors: Priors, inside: np.ndarray, grid: Grid) -> np.ndarray:
    """Return the priors of the tissues in the voxels of a mask, (5, n) float32; they sum to 1."""
    sigma = PRIOR_SIGMA_MM / np.linalg.norm(grid.affine[:3, :3], axis=0)
    parts = [ndimage.gaussian_filter(part, sigma)[inside] for part in (priors.csf, priors.grey, priors.white)]
    csf, grey_matter, white = (part + np.float32(1e-6) for part in parts)
    # Between two tissues where both are likely.
    shares = np.stack([csf, np.sqrt(csf * grey_matter), grey_matter, np.sqrt(grey_matter * white), white])
    return np.asarray((1 - PRIOR_FLOOR) * shares / shares.sum(axis=0) + PRIOR_FLOOR / len(TISSUES))


def _posterior(values: np.ndarray, priors: np.ndarray, places: np.ndarray, name: str) -> np.ndarray:
    """Return the share of each tissue, (5, n) float32; raises BadScanError.

    values: (n,) intensities. priors: (5, n). places: (n, 3) in -1..1, for the bias field: the polynomial that best
    explains how the logarithms differ from those of the tissues' means, as in Wells et al. 1996, IEEE TMI 15:429-442.
    """
    step = max(1, len(values) // SAMPLE)
    scaled = values / np.percentile(values[::step], 95)
    terms = _monomials(places[::step])
    weights = np.zeros(terms.shape[1])
    for _ in range(BIAS_ROUNDS):
        flat = scaled[::step] * np.exp(-terms @ weights)
        means, sd = _fit(flat, priors[:, ::step])
        shares = _shares(flat, priors[:, ::step], means, sd)
        expected = np.exp(np.log(means) @ shares)
        certain = shares[2:].sum(axis=0) > 0.9  # grey and white matter
        weights += np.linalg.lstsq(terms[certain], np.log(flat / expected)[certain], rcond=None)[0]
    scaled = scaled * np.exp(-_monomials(places) @ weights)
    means, sd = _fit(scaled[::step], priors[:, ::step])
    steps = np.diff(means[::2]) / means[-1]
    if not (steps > CONTRAST_MIN).all():
        told = ", ".join(f"{tissue} {mean:.2f}" for tissue, mean in zip(TISSUES[::2], means[::2], strict=True))
        raise BadScanError(
            Reason.TISSUE,
            f"{name}: the tissues cannot be told apart by intensity, the means are {told} (white matter's 95th "
            f"percentile is about 1) and must rise by {CONTRAST_MIN:.0%} each; is this a T1 without contrast agent?",
        )
    return _shares(scaled, priors, means, sd)


def _monomials(places: np.ndarray) -> np.ndarray:
    """Return the monomials up to BIAS_DEGREE without the constant, (n, terms) float32."""
    columns = [
        places[:, list(axes)].prod(axis=1)
        for degree in range(1, BIAS_DEGREE + 1)
        for axes in combinations_with_replacement(range(3), degree)
    ]
    return np.stack(columns, axis=1).astype(np.float32)


def _shares(values: np.ndarray, priors: np.ndarray, means: np.ndarray, sd: float) -> np.ndarray:
    distance = (values[None] - means[:, None]) / sd
    return np.asarray(softmax(np.log(priors) - distance**2 / 2, axis=0), dtype=np.float32)


def _fit(sample: np.ndarray, shares: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the means (5,) and the standard deviation of the tissues' intensities; shares: the priors (5, n)."""
    from sklearn.mixture import GaussianMixture  # here: 80 MB, for this step alone

    weights = shares[::2] ** 4  # nearly pure voxels
    pure = weights @ sample / weights.sum(axis=1)
    means = np.array([pure[0], pure[:2].mean(), pure[1], pure[1:].mean(), pure[2]])
    mixture = GaussianMixture(
        len(TISSUES),
        covariance_type="tied",
        means_init=means[:, None],
        precisions_init=[[1 / START_SD**2]],
        weights_init=shares.mean(axis=1) / shares.mean(axis=1).sum(),
        reg_covar=1e-4,
        max_iter=200,
        random_state=0,
    ).fit(sample[:, None])
    return mixture.means_[:, 0], float(np.sqrt(mixture.covariances_[0, 0]))
