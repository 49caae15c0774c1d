"""Connectomes at a glance: the matrix of a case, and of a dataset their mean, their motion and what motion did to them.

Distance dependence is the check of Power et al. 2012 (NeuroImage 59:2142) and Ciric et al. 2017 (NeuroImage 154:174):
QC-FC, the correlation of each connection with mean framewise displacement over cases, against the distance of its
regions. Motion that was not removed raises short connections and lowers long ones: Spearman's rho is then negative.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.connectomes import ConnectomeSpec
from models.store import Store, StoredDataset
from tasks.atlas_image import AtlasImageError, region_centres
from tasks.figures import INK, MUTED, STYLE, png_of
from tasks.mosaic import BACKGROUND, HEADER, MARGIN, TEXT, write_text
from tasks.mosaic import MUTED as FAINT
from tasks.qc_outliers import MIN_CASES
from tasks.report import Picture

EDGE = 224
"""Pixels of a matrix."""
LIMIT_Z, LIMIT_R = 1.2, 0.8
"""Ends of the colours, with Fisher's z and without."""
COLOURS = 96
"""In the palette of a matrix's PNG."""
NOWHERE = (70, 76, 84)
"""Colour of regions without signal."""
MAX_CASES = 500
"""Of a dataset that its picture is made of, evenly spread: 200 regions of so many cases are 80 MB."""
DOTS = 4000
"""Connections that are drawn."""
SHIPPED = "desikan_killiany"
"""The atlas whose label image is installed with us."""

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Dependence:
    """What motion did to the connections of a dataset."""

    qc_fc: Doubles
    """By connection: its correlation with mean framewise displacement, over cases."""
    distance_mm: Doubles
    rho: float
    """Spearman's, of both."""
    cases: int


def limit_of(spec: ConnectomeSpec) -> float:
    """Return the value at the ends of the colours."""
    return LIMIT_Z if spec.fisher_z else LIMIT_R


def matrix_picture(matrix_RR: np.ndarray, spec: ConnectomeSpec, title: str) -> bytes:
    """Return a connectome (R, R) as a small PNG in the style of the mosaics: blue is negative, red positive."""
    from matplotlib import colormaps

    limit = limit_of(spec)
    shades = colormaps["RdBu_r"](np.clip(matrix_RR / (2 * limit) + 0.5, 0, 1))[..., :3] * 255
    shades[np.isnan(matrix_RR)] = NOWHERE
    picture = Image.fromarray(np.round(shades).astype(np.uint8))
    sharp = len(matrix_RR) <= EDGE
    picture = picture.resize((EDGE, EDGE), Image.Resampling.NEAREST if sharp else Image.Resampling.BOX)
    canvas = Image.new("RGB", (EDGE + 2 * MARGIN, HEADER + EDGE + MARGIN), BACKGROUND)
    write_text(canvas, (MARGIN, 10), title, 15, TEXT, bold=True)
    write_text(canvas, (MARGIN, 31), f"{spec.atlas}: {len(matrix_RR)} regions", 11, FAINT)
    write_text(canvas, (MARGIN, 47), f"{spec.kind}, {-limit:g} to {limit:g}", 11, FAINT)
    canvas.paste(picture, (MARGIN, HEADER))
    return _encoded(canvas)


def side_by_side(pictures: Sequence[bytes]) -> bytes:
    """Return PNGs beside each other as one; a single one as it is."""
    if len(pictures) == 1:
        return pictures[0]
    opened = [Image.open(io.BytesIO(picture)).convert("RGB") for picture in pictures]
    canvas = Image.new("RGB", (sum(i.width for i in opened), max(i.height for i in opened)), BACKGROUND)
    left = 0
    for image in opened:
        canvas.paste(image, (left, 0))
        left += image.width
    return _encoded(canvas)


def _encoded(canvas: Image.Image) -> bytes:
    buffer = io.BytesIO()
    canvas.quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def dataset_picture(store: Store, dataset: str, motion: Mapping[int, float]) -> Picture | None:
    """Return mean connectome, histogram of motion and distance dependence of a dataset; None without connectomes.

    motion: mean framewise displacement in mm by row with a connectome, NaN where nobody measured it.
    """
    spec = store.spec.connectome
    if spec is None or not motion:
        return None
    data = store.dataset(dataset)
    rows = [int(row) for row in np.array(sorted(motion))[_evenly(len(motion))]]
    moved = np.array([motion[row] for row in rows])
    mean, dependence = _gathered(data, rows, moved, spec)
    words = [f"mean connectome of {len(rows)} cases"]
    if np.isfinite(moved).any():
        words.append(f"median of the mean framewise displacement {np.nanmedian(moved):.2g} mm")
    words.append(_words(dependence))
    return Picture(
        _figure(mean, moved, dependence, spec), f"{dataset}: mean connectome, motion, distance", "; ".join(words)
    )


def distance_dependence(matrices: np.ndarray, moved: np.ndarray, centres: np.ndarray) -> Dependence | None:
    """Return how QC-FC depends on distance; None for fewer than MIN_CASES cases or when nothing varies.

    matrices: (N, R, R); moved: (N,) mean framewise displacement, NaN where unknown; centres: (R, 3) mm.
    """
    from scipy.stats import spearmanr

    known = np.isfinite(moved)
    if known.sum() < MIN_CASES or np.ptp(moved[known]) == 0:
        return None
    one, other = np.triu_indices(len(centres), 1)
    strengths = matrices[known][:, one, other].astype(np.float64)
    usable = np.isfinite(strengths).all(axis=0)
    strengths = strengths[:, usable] - strengths[:, usable].mean(axis=0)
    centred = moved[known] - moved[known].mean()
    scale = np.linalg.norm(strengths, axis=0) * np.linalg.norm(centred)
    qc_fc = centred @ strengths / np.where(scale > 0, scale, np.inf)
    distance = np.linalg.norm(centres[one] - centres[other], axis=1)[usable]
    if len(qc_fc) < MIN_CASES or np.ptp(qc_fc) == 0:
        return None
    return Dependence(qc_fc, distance, float(spearmanr(qc_fc, distance).statistic), int(known.sum()))


def centres_of(spec: ConnectomeSpec) -> np.ndarray | None:
    """Return the centres of the regions, (R, 3) RAS+ mm; None when no label image of the atlas is at hand."""
    if spec.atlas_image:
        try:
            return region_centres(spec)
        except (AtlasImageError, OSError):
            return None
    if spec.atlas != SHIPPED:
        return None
    from tasks.atlas import desikan_killiany_labels
    from tasks.atlas_image import centres_in

    labels, affine = desikan_killiany_labels()
    return centres_in(labels, affine, len(spec.regions)) if len(spec.regions) == labels.max() else None


def _evenly(count: int) -> npt.NDArray[np.intp]:
    return np.linspace(0, count - 1, min(count, MAX_CASES)).round().astype(np.intp)


def _gathered(
    data: StoredDataset, rows: Sequence[int], moved: np.ndarray, spec: ConnectomeSpec
) -> tuple[np.ndarray, Dependence | None]:
    """Return the mean matrix and the distance dependence of some rows."""
    matrices = np.stack([data.read_connectome(row) for row in rows])
    here = np.isfinite(matrices)
    total = np.where(here, matrices, 0).sum(axis=0, dtype=np.float64)
    mean = np.where(here.any(axis=0), total / np.maximum(here.sum(axis=0), 1), np.nan)
    centres = centres_of(spec)
    return mean, None if centres is None else distance_dependence(matrices, moved, centres)


def _words(found: Dependence | None) -> str:
    if found is None:
        return (
            f"distance dependence unknown (needs {MIN_CASES} cases whose motion is known, and the atlas's label image)"
        )
    return (
        f"QC-FC {np.median(np.abs(found.qc_fc)):.2g} (median of the absolute values), distance dependence "
        f"rho = {found.rho:.2f} over {len(found.qc_fc):,} connections of {found.cases} cases"
    )


def _figure(mean: np.ndarray, moved: np.ndarray, dependence: Dependence | None, spec: ConnectomeSpec) -> bytes:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = 1 + bool(np.isfinite(moved).any()) + (dependence is not None)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.1 * panels, 2.9), layout="constrained")
        axes = iter(figure.subplots(1, panels, squeeze=False)[0])
        matrix, limit = next(axes), limit_of(spec)
        shown = matrix.imshow(mean, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        figure.colorbar(shown, ax=matrix, shrink=0.8, label="Fisher z" if spec.fisher_z else "r")
        matrix.set(title=f"mean, {spec.atlas}", xlabel="region", ylabel="region")
        if np.isfinite(moved).any():
            motion = next(axes)
            motion.hist(moved[np.isfinite(moved)], bins=24, color=MUTED)
            motion.set(title="motion", xlabel="mean framewise displacement (mm)", ylabel="cases")
            motion.set_xlim(left=0)
        if dependence is not None:
            scatter = next(axes)
            step = max(1, len(dependence.qc_fc) // DOTS)
            far, qc_fc = dependence.distance_mm[::step], dependence.qc_fc[::step]
            scatter.scatter(far, qc_fc, s=2, color=MUTED, alpha=0.5, linewidths=0)
            slope, level = np.polyfit(dependence.distance_mm, dependence.qc_fc, 1)
            ends = np.array([far.min(), far.max()])
            scatter.plot(ends, level + slope * ends, color=INK)
            scatter.axhline(0, color=MUTED, linewidth=0.6)
            scatter.set(title=f"rho = {dependence.rho:.2f}", xlabel="distance of regions (mm)", ylabel="QC-FC")
        return png_of(figure)
