"""Curves of results: a score against a share of the data, and calibration; PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING

import pandas as pd

from tasks.figures import COLOURS, MUTED, REGION_COLOURS, STYLE, png_of
from tasks.summary import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = 4
"""Beside each other; more reliability curves start another line."""
LETTERS = 38
"""Of a line of a reliability curve's title."""
SHADES = (COLOURS["ours"], COLOURS["published"], COLOURS["ceiling"], *REGION_COLOURS)


def share_figure(
    curves: Mapping[str, Sequence[tuple[float, Line]]],
    majority: float | None,
    title: str,
    words: tuple[str, str] = ("share of the labelled connectomes, %", "accuracy, 95 % interval over folds"),
) -> bytes:
    """Return a score with its interval against a share of the data, a line a name.

    curves: (share, line of the score) of each; majority: accuracy of the largest class, dashed; words: below and beside
    the axes. Raises ValueError when there is nothing to draw.
    """
    if not any(curves.values()):
        raise ValueError(f"support curve {title!r}: no row of prompting has a number")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, loc="left", fontweight="bold", fontsize=10)
        shares = sorted({100 * share for points in curves.values() for share, _ in points})
        step = 0.012 * max(shares[-1], 1)
        for place, (name, points) in enumerate(curves.items()):
            _draw_curve(axes, points, name, SHADES[place % len(SHADES)], step * (place - (len(curves) - 1) / 2))
        if majority is not None:
            axes.axhline(majority, color=MUTED, lw=1, ls=(0, (4, 3)), label="majority class")
        axes.set_xticks(shares, [f"{share:g}" for share in shares])
        axes.set_xlabel(words[0])
        axes.set_ylabel(words[1])
        axes.grid(axis="y", color="#e4e7eb", lw=0.8)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        return png_of(figure)


def _draw_curve(axes: Axes, points: Sequence[tuple[float, Line]], name: str, colour: str, shift: float) -> None:
    ordered = sorted(points, key=lambda point: point[0])
    x = [100 * share + shift for share, _ in ordered]
    axes.plot(x, [float(line.estimate or 0) for _, line in ordered], "o-", color=colour, ms=4.5, lw=1.6, label=name)
    for place, (_, line) in zip(x, ordered, strict=True):
        if line.low is not None and line.high is not None:
            axes.plot([place, place], [line.low, line.high], color=colour, lw=1.4, alpha=0.6)


def reliability_figure(
    curves: Mapping[str, pd.DataFrame], errors: Mapping[str, float], title: str, words: str = "pseudo-probability"
) -> bytes:
    """Return reliability curves (tasks.metrics_weighted.reliability) of some rows with their expected errors."""
    if not curves:
        raise ValueError(f"reliability curves {title!r}: no row to draw")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        across, down = min(len(curves), PANELS), -(-len(curves) // PANELS)
        figure = Figure(figsize=(2.7 * across + 0.4, 3.1 * down), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10)
        grid = figure.subplots(down, across, squeeze=False, sharey=True)
        panels = grid.ravel()[: len(curves)]
        for axes in grid.ravel()[len(curves) :]:
            axes.set_axis_off()
        for axes, (name, curve) in zip(panels, curves.items(), strict=True):
            axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=(0, (4, 3)))
            x, y = curve["mean_probability"].to_numpy(), curve["observed"].to_numpy()
            axes.vlines(x, curve["observed_low"], curve["observed_high"], color=COLOURS["ours"], lw=1.4, alpha=0.6)
            axes.plot(x, y, "o-", color=COLOURS["ours"], ms=4.5, lw=1.4)
            axes.set_title(f"{fill(name, LETTERS)}\nECE {errors[name]:.3f}", fontsize=8.5, loc="left")
            axes.set_xlim(-0.02, 1.02)
            axes.set_ylim(-0.02, 1.02)
            axes.set_xlabel(words)
        for axes in grid[:, 0]:
            axes.set_ylabel("share that came true")
        return png_of(figure)
