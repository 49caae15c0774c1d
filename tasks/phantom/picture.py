"""One picture of a cohort: axial slices of a few subjects, a row each, with the lesion's outline."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from models.records import MODALITIES
from tasks.phantom.cohort import list_jobs, read_marker
from tasks.phantom.config import PhantomConfig
from tasks.phantom.layout import Place

Array = np.ndarray[Any, np.dtype[Any]]

SLICE_MM = 16.0
"""Height of the slice of a subject without a lesion: through the lateral ventricles."""


def choose_places(config: PhantomConfig, root: Path) -> list[Place]:
    """Return subjects worth showing: youngest, oldest, large ventricles, each kind of lesion, and an IXI-like one."""
    jobs = [job for job in list_jobs(config) if not job.fault]
    markers = {job.place: read_marker(root, job.place) for job in jobs}

    def trait(place: Place, name: str) -> Any:
        return markers[place]["traits"][name]

    small = sorted(
        (place for place in markers if trait(place, "control_group") == "small"), key=lambda p: trait(p, "age")
    )
    large = [place for place in markers if trait(place, "control_group") == "large"]
    chosen = [*small[:1], *small[-1:], *large[:1]]
    for kind in ("tumour", "stroke", "schwannoma"):
        of_kind = [place for place in markers if trait(place, "lesion") == kind and place not in chosen]
        # The longest list of modalities shows most.
        chosen += sorted(of_kind, key=lambda p: -len(markers[p]["images"]))[:1]
    chosen += [place for place in markers if place.group == "ixi" and place not in chosen][:1]
    return chosen


def draw_picture(config: PhantomConfig, root: Path, places: list[Place] | None = None) -> bytes:
    """Return a PNG with one row per subject and one column per modality; missing modalities stay empty.

    Slices lie at the lesion's widest height, in RAS orientation seen from above.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = places if places is not None else choose_places(config, root)
    figure, axes = plt.subplots(
        len(rows), len(MODALITIES), figsize=(1.5 * len(MODALITIES), 1.8 * len(rows)), squeeze=False
    )
    for line, place in zip(axes, rows, strict=True):
        _draw_row(line, read_marker(root, place), place, root)
    for axis in axes.ravel():
        axis.set_axis_off()
    figure.subplots_adjust(left=0.01, right=0.99, top=0.96, bottom=0.01, wspace=0.03, hspace=0.16)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=75, facecolor="black")
    plt.close(figure)
    return buffer.getvalue()


def _draw_row(line: Any, marker: dict[str, Any], place: Place, root: Path) -> None:
    mask = nib.as_closest_canonical(nib.load(root / marker["label"])) if marker["label"] else None
    height = _height_mm(mask)
    traits = marker["traits"]
    title = (
        f"{traits['age']:.0f} y {traits['sex']}  site {traits['site']}  {traits['diagnosis']}  "
        f"ventricles {traits['control_group']}  {traits['lesion']}"
    )
    line[0].text(0, 1.02, title, transform=line[0].transAxes, color="white", fontsize=7)
    scans = {place.scan(name): name for name in MODALITIES if _has_name(place, name)}
    for path in marker["images"]:
        axis = line[MODALITIES.index(scans[path])]
        image = nib.as_closest_canonical(nib.load(root / path))
        plane, extent = _axial(image, height)
        axis.imshow(
            plane, cmap="gray", vmin=0, vmax=np.percentile(plane[plane > 0], 99.5), extent=extent, origin="lower"
        )
        axis.text(0.03, 0.03, scans[path], transform=axis.transAxes, color="white", fontsize=6)
        if mask is not None and axis is not line[0]:
            labels, extent = _axial(mask, height)
            axis.contour(labels > 0, levels=[0.5], colors="tab:orange", linewidths=0.5, extent=extent)
        axis.set(xlim=(-85, 85), ylim=(-120, 85))


def _has_name(place: Place, modality: str) -> bool:
    try:
        place.scan(modality)
    except KeyError:
        return False
    return True


def _height_mm(mask: Any) -> float:
    """Return the height of the slice with most lesion voxels."""
    if mask is None:
        return SLICE_MM
    labels = np.asarray(mask.dataobj) > 0
    where = np.append(np.argwhere(labels)[:, :2].mean(0), labels.sum((0, 1)).argmax())
    return float((mask.affine[:3, :3] @ where + mask.affine[:3, 3])[2])


def _axial(image: Any, height: float) -> tuple[Array, tuple[float, float, float, float]]:
    """Return the slice of a RAS-nearest image at a height (y, x) and its extent in mm; tilt is ignored."""
    volume = np.asarray(image.dataobj, np.float32)
    centre = (np.asarray(volume.shape) - 1) / 2
    middle = image.affine[:3, :3] @ centre + image.affine[:3, 3]
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    index = int(np.clip(np.rint(centre[2] + (height - middle[2]) / spacing[2]), 0, volume.shape[2] - 1))
    half = centre[:2] * spacing[:2]
    x, y = middle[:2]
    return volume[:, :, index].T, (x - half[0], x + half[0], y - half[1], y + half[1])
