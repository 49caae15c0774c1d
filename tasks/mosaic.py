"""A case at a glance: axial, coronal and sagittal slices of every modality with the label's outline, as a small PNG.

Left is left (neurological convention), the front is up in axial and to the right in sagittal slices.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from tasks.faces import Frame, face_mask

BACKGROUND = (13, 17, 23)
WHITE = (250, 250, 250)
LINE = (33, 40, 50)
TEXT = (230, 236, 242)
MUTED = (132, 144, 158)
LABEL_COLOURS = ((230, 159, 0), (86, 180, 233), (240, 228, 66), (204, 121, 167), (0, 158, 115))
"""Told apart with red-green blindness too (Okabe and Ito, 2008); one per label value in ascending order."""
PLANES = (("axial", "L", "R", 2), ("coronal", "L", "R", 1), ("sagittal", "P", "A", 0))
"""Name, what lies on the left and on the right, and the axis that is cut."""
ROW_PIXELS = (208, 184, 160, 136, 112, 88)
"""Heights of a row; the first that makes the PNG small enough is taken."""
LIMIT_BYTES = 120_000
ROWS_PER_BLOCK = 3
MARGIN, GAP, HEADER = 14, 8, 74
GREYS = 44
"""Shades in the PNG's palette: more cannot be told apart in a slice, and cost bytes."""
FINE = 3
"""Outlines are drawn this much finer and averaged, so that they are smooth."""

Array = npt.NDArray[np.float64]
_Outline = tuple[Array, tuple[int, int, int]]


@dataclass(frozen=True)
class _View:
    """What is drawn: RAS axes, millimetres per voxel, and the three cuts."""

    channels: list[tuple[str, npt.NDArray[np.float32]]]
    label: npt.NDArray[np.uint8] | None
    spacing: tuple[float, float, float]
    cut: tuple[int, int, int]
    counts: npt.NDArray[np.intp]
    """Voxels by label value."""
    extent: tuple[int, ...]
    """Of the whole image, by RAS axis."""
    label_names: Mapping[int, str]

    @property
    def header(self) -> int:
        """Height of title, notes and legend, which has a line of its own when its words are long."""
        return HEADER + (18 if self.label_names else 0)

    @property
    def label_values(self) -> list[int]:
        """Values of the label except 0, ascending."""
        return [] if self.label is None else [value for value in range(1, 256) if self.counts[value]]

    def slice(self, volume: npt.NDArray, axis: int) -> npt.NDArray:
        """Return a plane as rows from top to bottom."""
        return np.take(volume, self.cut[axis], axis=axis).T[::-1]

    def size_mm(self, axis: int) -> tuple[float, float]:
        """Return (width, height) of a plane."""
        shape = self.channels[0][1].shape
        across, up = (other for other in range(3) if other != axis)
        return shape[across] * self.spacing[across], shape[up] * self.spacing[up]


def mosaic(
    image: npt.NDArray,
    affine: npt.NDArray,
    label: npt.NDArray | None = None,
    *,
    modalities: Sequence[str] = (),
    title: str = "",
    frame: Frame = "image",
    label_names: Mapping[int, str] | None = None,
) -> bytes:
    """Return a PNG with one tri-planar row per present modality, below 120 kB for brains in the usual grids.

    Args:
        image: (M, X, Y, Z) intensities; a channel without a positive voxel is absent and not drawn.
        affine: (4, 4) voxel -> RAS+ mm.
        label: (X, Y, Z) integers or None; the slices cut its largest areas, else the centre of the head.
        modalities: M names; default channel 0, channel 1, ...
        title: e.g. dataset and case.
        frame: how the face is found, see tasks.faces.face_mask.
        label_names: what values of the label are called in the legend; default label 1, label 2, ...

    Raises ValueError when shapes disagree or no channel has a positive voxel.
    """
    names = list(modalities) or [f"channel {number}" for number in range(len(image))]
    if image.ndim != 4 or len(names) != len(image) or (label is not None and label.shape != image.shape[1:]):
        raise ValueError(
            f"mosaic: image must be (M, X, Y, Z) with M names and a label of (X, Y, Z); got image {image.shape}, "
            f"{len(names)} names, label {None if label is None else label.shape}"
        )
    there = [n for n, channel in enumerate(image) if channel.any()]
    names = [names[n] for n in there]
    image = np.asarray(image[there], dtype=np.float32)
    if not np.isfinite(image.sum()):
        image = np.nan_to_num(image, posinf=0, neginf=0)
    foreground = (image > 0).any(axis=0)
    if not foreground.any():
        raise ValueError(f"mosaic {title!r}: no channel has a positive voxel, so there is nothing to draw")
    hidden = face_mask(image, np.asarray(affine, dtype=np.float64), frame) & foreground
    if hidden.any():
        image = np.where(hidden, np.float32(0), image)
    view = _prepare(image, affine, label, names, label_names or {})
    notes = f"{' × '.join(str(n) for n in view.extent)} voxels of {_millimetres(view.spacing)}"
    if hidden.any():
        notes += ", face hidden"
    for height in ROW_PIXELS:
        png = _encode(_draw(view, title, notes, height))
        if len(png) <= LIMIT_BYTES:
            break
    return png


def _millimetres(spacing: tuple[float, ...]) -> str:
    lengths = [f"{length:.2f}".rstrip("0").rstrip(".") for length in spacing]
    return " × ".join(lengths if len(set(lengths)) > 1 else lengths[:1]) + " mm"


def _prepare(
    image: npt.NDArray,
    affine: npt.NDArray,
    label: npt.NDArray | None,
    names: list[str],
    label_names: Mapping[int, str],
) -> _View:
    """Turn to RAS axes, crop to the foreground, choose the cuts and scale every channel to 0..1."""
    turn = nib.orientations.io_orientation(affine)
    volumes = [nib.orientations.apply_orientation(channel, turn) for channel in image]
    turned = None if label is None else nib.orientations.apply_orientation(label, turn).astype(np.uint8)
    lengths = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)
    spacing = [0.0, 0.0, 0.0]
    for source, target in enumerate(turn[:, 0]):
        spacing[int(target)] = round(float(lengths[source]), 3)
    box = _bounding_box(np.any([volume > 0 for volume in volumes], axis=0))
    shown = [(name, _scaled(volume[box])) for name, volume in zip(names, volumes, strict=True) if (volume > 0).any()]
    inner = None if turned is None else turned[box]
    cut = _cuts(np.any([volume > 0.05 for _, volume in shown], axis=0), inner)
    counts = np.bincount(np.zeros(0, np.uint8) if inner is None else inner.ravel(), minlength=256)
    labelled = inner if counts[1:].any() else None
    return _View(shown, labelled, (spacing[0], spacing[1], spacing[2]), cut, counts, volumes[0].shape, label_names)


def _bounding_box(mask: npt.NDArray[np.bool_]) -> tuple[slice, ...]:
    box = []
    for axis in range(3):
        found = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append(slice(max(int(found[0]) - 2, 0), int(found[-1]) + 3))
    return tuple(box)


def _scaled(volume: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    # A sample gives the same window to a grey level, in a fraction of the time.
    positive = volume[volume > 0]
    low, high = np.percentile(positive[:: max(len(positive) // 100_000, 1)], [0.5, 99.7])
    # Dark tissue stays darker than bright air would be: 0 is the lower end when the image is nearly positive.
    low = min(float(low), 0.25 * float(high))
    return np.where(volume > 0, np.clip((volume - low) / max(float(high) - low, 1e-6), 0, 1), 0).astype(np.float32)


def _cuts(foreground: npt.NDArray[np.bool_], label: npt.NDArray[np.uint8] | None) -> tuple[int, int, int]:
    """Return the index per axis: the largest area of the label, else the centre of mass of the foreground."""
    target = foreground if label is None or not label.any() else label > 0
    cuts = []
    for axis in range(3):
        area = target.sum(axis=tuple(other for other in range(3) if other != axis))
        centre = round(float(np.average(np.arange(len(area)), weights=area))) if area.any() else len(area) // 2
        cuts.append(centre if target is foreground else int(area.argmax()))
    return cuts[0], cuts[1], cuts[2]


def _draw(view: _View, title: str, notes: str, row: int) -> Image.Image:
    blocks = 1 if len(view.channels) <= ROWS_PER_BLOCK else 2
    rows = -(-len(view.channels) // blocks)
    sizes = [view.size_mm(axis) for *_, axis in PLANES]
    scale = row / max(height for _, height in sizes)
    widths = [round(width * scale) for width, _ in sizes]
    block_width = sum(widths) + GAP * (len(widths) - 1)
    height = view.header + rows * (row + GAP) + MARGIN - GAP
    canvas = Image.new("RGB", (2 * MARGIN + blocks * block_width + (blocks - 1) * 3 * GAP, height), BACKGROUND)
    _draw_header(canvas, view, title, notes)
    outlines = [_outlines(view, axis, (round(w * scale), round(h * scale))) for axis, (w, h) in enumerate(sizes[::-1])]
    for number, (name, volume) in enumerate(view.channels):
        left = MARGIN + (number % blocks) * (block_width + 3 * GAP)
        top = view.header + (number // blocks) * (row + GAP)
        for (plane, before, after, axis), width, (_, tall) in zip(PLANES, widths, sizes, strict=True):
            pane = _pane(view.slice(volume, axis), outlines[axis], (width, round(tall * scale)))
            canvas.paste(pane, (left, top + (row - pane.height) // 2))
            if number < blocks:
                _draw_plane_name(canvas, (left, top - 5, width), plane, before, after)
            left += width + GAP
        write_text(canvas, (left - block_width - GAP, top + 3), name, 12, TEXT, bold=True)
    return canvas


def _draw_header(canvas: Image.Image, view: _View, title: str, notes: str) -> None:
    right = canvas.width - MARGIN
    write_text(canvas, (MARGIN, 10), title, 15, TEXT, bold=True)
    values = view.label_values
    for value in reversed(values):
        name = view.label_names.get(value, f"label {value}")
        right -= round(_font(11, False).getlength(name))
        write_text(canvas, (right, view.header - 43), name, 11, MUTED)
        right -= 16
        colour = _label_colour(values, value)
        ImageDraw.Draw(canvas).rounded_rectangle(
            (right, view.header - 41, right + 10, view.header - 31), 2, fill=colour
        )
        right -= 14
    write_text(canvas, (MARGIN, 31), notes, 11, MUTED)
    ImageDraw.Draw(canvas).line((MARGIN, view.header - 22, canvas.width - MARGIN, view.header - 22), fill=LINE)


def _draw_plane_name(canvas: Image.Image, place: tuple[int, int, int], plane: str, before: str, after: str) -> None:
    left, bottom, width = place
    font = _font(10, False)
    write_text(canvas, (left, bottom - 11), before, 10, MUTED)
    write_text(canvas, (left + round((width - font.getlength(plane)) / 2), bottom - 11), plane, 10, MUTED)
    write_text(canvas, (left + width - round(font.getlength(after)), bottom - 11), after, 10, MUTED)


def _pane(plane: npt.NDArray[np.float32], outlines: list[_Outline], size: tuple[int, int]) -> Image.Image:
    """Return one slice in its final size with the outlines of the label's values."""
    grey = Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC)
    shade = np.clip(np.asarray(grey, dtype=np.float64), 0, 1)[..., None]
    # Air takes the colour of the page, so that slices float on it.
    pixels = np.asarray(BACKGROUND) * (1 - shade) + np.asarray(WHITE) * shade
    for line, colour in outlines:
        pixels = pixels * (1 - line) + np.asarray(colour) * line
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def _outlines(view: _View, axis: int, size: tuple[int, int]) -> list[_Outline]:
    """Return opacity (height, width, 1) and colour of every label value that a plane cuts."""
    if view.label is None:
        return []
    plane, values = view.slice(view.label, axis), view.label_values
    masks = {value: plane == value for value in values if (plane == value).any()}
    # What encloses is drawn first: a shared border belongs to the enclosed part.
    order = sorted(masks, key=lambda value: -int(ndimage.binary_fill_holes(masks[value]).sum()))
    return [(_outline(masks[value], size)[..., None], _label_colour(values, value)) for value in order]


def _outline(mask: npt.NDArray[np.bool_], size: tuple[int, int]) -> Array:
    """Return the opacity of a smooth outline around a mask, (height, width) in 0..1."""
    fine = (size[0] * FINE, size[1] * FINE)
    grown = Image.fromarray(mask.astype(np.float32)).resize(fine, Image.Resampling.BICUBIC)
    inside = np.asarray(grown) > 0.5
    edge = ndimage.binary_dilation(inside, iterations=2) & ~ndimage.binary_erosion(inside, iterations=2)
    return edge.reshape(size[1], FINE, size[0], FINE).mean(axis=(1, 3))


def _label_colour(values: list[int], value: int) -> tuple[int, int, int]:
    return LABEL_COLOURS[values.index(value) % len(LABEL_COLOURS)]


@cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which matplotlib brings along, so pictures look the same on every machine."""
    from matplotlib import get_data_path

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", name), size)


def write_text(
    canvas: Image.Image, place: tuple[int, int], text: str, size: int, colour: tuple[int, int, int], bold: bool = False
) -> None:
    """Write a line of text; place: its left upper corner."""
    ImageDraw.Draw(canvas).text(place, text, font=_font(size, bold), fill=colour)


@cache
def _palette() -> Image.Image:
    """Return the colours of all mosaics: a ramp from page to white, and the label colours over dark, grey and white."""
    page, white = np.asarray(BACKGROUND), np.asarray(WHITE)
    ramp = [page + (white - page) * share for share in np.linspace(0, 1, GREYS)]
    under = [page + (white - page) * share for share in (0.0, 0.4, 0.8)]
    blends = [base + (np.asarray(c) - base) * share for c in LABEL_COLOURS for share in (0.35, 0.7) for base in under]
    colours = [*ramp, *blends, *map(np.asarray, LABEL_COLOURS), *map(np.asarray, (LINE, TEXT, MUTED))]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.round(np.concatenate(colours)).astype(np.uint8).tolist())
    return palette


def _encode(canvas: Image.Image) -> bytes:
    buffer = io.BytesIO()
    canvas.quantize(palette=_palette(), dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
