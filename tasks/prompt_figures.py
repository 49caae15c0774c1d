"""Who is like whom: the cosines of images and connectomes; PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.figures import INK, STYLE, png_of
from tasks.probes import Floats, Ints

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def similarity_figure(images_ND: Floats, networks_ND: Floats, class_N: Ints, names: Sequence[str], title: str) -> bytes:
    """Return the cosines of unit embeddings of the same subjects: images (rows) against connectomes (columns).

    Sorted by class; an image and its own connectome meet on the diagonal.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    order = np.argsort(class_N, kind="stable")
    cosines = images_ND[order] @ networks_ND[order].T
    with rc_context(STYLE):
        figure = Figure(figsize=(5.4, 4.6), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
        reach = max(float(np.abs(cosines).max()), 1e-6)
        shown = axes.imshow(cosines, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest")
        for axis in "yx":
            _mark_classes(axes, axis, class_N, names)
        axes.set_ylabel("images")
        axes.set_xlabel("connectomes")
        axes.spines[:].set_visible(False)
        figure.colorbar(shown, ax=axes, label="cosine", shrink=0.85)
        return png_of(figure)


def _mark_classes(axes: Axes, axis: str, class_N: Ints, names: Sequence[str]) -> None:
    counts = np.bincount(class_N, minlength=len(names))
    ends = np.cumsum(counts)
    line: Any = axes.axhline if axis == "y" else axes.axvline
    for end in ends[:-1]:
        line(end - 0.5, color=INK, lw=1)
    ticks: Any = axes.set_yticks if axis == "y" else axes.set_xticks
    extra = {"rotation": 90, "va": "center"} if axis == "y" else {}
    ticks(ends - counts / 2 - 0.5, list(names), **extra)
    axes.tick_params(length=0)
