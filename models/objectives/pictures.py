"""Volumes as grey pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GROUND = 32
LETTERS = 14
"""Height of the letters in pixels."""
WIDTH = 1200
"""Pixels that an enlarged montage may be wide: what the UI's page and the report show without shrinking it."""


def middle_slice(volume_XYZ: Tensor, axis: int = 2) -> NDArray[np.uint8]:
    """Return the middle slice of a volume in [0, 1] (values outside are clipped), the anterior or upper side on top."""
    plane = volume_XYZ.detach().float().cpu().select(axis, volume_XYZ.shape[axis] // 2)
    grey = torch.nan_to_num(plane).clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    return np.ascontiguousarray(np.rot90(grey))


def montage(
    rows: Sequence[Sequence[NDArray[np.uint8]]],
    gap: int = 2,
    titles: Sequence[str] = (),
    names: Sequence[str] = (),
) -> NDArray[np.uint8]:
    """Return pictures in rows and columns on a dark ground, each centred in its cell, `gap` voxels apart.

    Voxels are enlarged up to four times, as far as WIDTH pixels allow; `titles` stand above the columns, `names` left
    of the rows. Raises ValueError when there are no pictures.
    """
    if not rows or not rows[0]:
        raise ValueError("a montage needs at least one picture")
    height = max(picture.shape[0] for row in rows for picture in row) + gap
    width = max(picture.shape[1] for row in rows for picture in row) + gap
    columns = max(len(row) for row in rows)
    out = np.full((len(rows) * height - gap, columns * width - gap), GROUND, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            top = i * height + (height - gap - picture.shape[0]) // 2
            left = j * width + (width - gap - picture.shape[1]) // 2
            out[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    scale = max(1, min(4, WIDTH // out.shape[1]))
    return _lettered(out.repeat(scale, axis=0).repeat(scale, axis=1), width * scale, height * scale, titles, names)


def _lettered(
    picture: NDArray[np.uint8], width: int, height: int, titles: Sequence[str], names: Sequence[str]
) -> NDArray[np.uint8]:
    """Return a picture with titles over its columns, `width` pixels apart, and names beside its rows, `height` apart.

    A title that is wider than its column is broken into lines.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=LETTERS)
    line = round(1.4 * LETTERS)
    texts = [_broken(title, width, font.getlength) for title in titles]
    top = line * max((len(text) for text in texts), default=0)
    left = round(max((font.getlength(name) for name in names), default=-LETTERS) + LETTERS)
    page = Image.new("L", (left + picture.shape[1], top + picture.shape[0]), GROUND)
    page.paste(Image.fromarray(picture), (left, top))
    draw = ImageDraw.Draw(page)
    for k, text in enumerate(texts):
        for n, words in enumerate(text):
            draw.text((left + (k + 0.5) * width, (n + 0.5) * line), words, fill=255, font=font, anchor="mm")
    for k, name in enumerate(names):
        draw.text((LETTERS // 2, top + (k + 0.5) * height), name, fill=255, font=font, anchor="lm")
    return np.asarray(page)


def _broken(text: str, width: int, length: Callable[[str], float]) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and length(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
