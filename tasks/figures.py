"""Pictures of results as PNG bytes: forest plots, loss curves, overlays of predictions on anatomy."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tasks.summary import Line
from tasks.tables import UNITS, heading, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = list[tuple[int, float]]
"""(step, value) in order."""
INK = "#1f2933"
MUTED = "#7b8794"
COLOURS = {
    "ours": "#1769aa", "baseline": "#7b8794", "ceiling": "#2e7d32", "published": "#b45309", "others": "#7a3e9d",
}  # fmt: skip
# Colours that people with red-green blindness can tell apart (Okabe and Ito, 2008).
REGION_COLOURS: tuple[str, ...] = ("#E69F00", "#56B4E9", "#F0E442", "#CC79A7", "#009E73")
LINE_COLOURS = (COLOURS["ours"], COLOURS["published"], COLOURS["ceiling"], MUTED)
TOGETHER = {
    "psnr": "PSNR (dB), validation",
    "embedding": "embedding, validation",
    "feature": "stage-4 features, validation",
    "probe": "probe of the phenotype, validation",
    "retrieval": "retrieval in a batch, validation",
    "matching": "network-image matching, validation",
}
"""Metrics `<group>_<member>` that are compared with each other and share a panel."""
STYLE: Any = {
    "font.size": 9, "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": "#cbd2d9", "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False,
    "text.parse_math": False,  # names of rows and classes may hold `$`
}  # fmt: skip
"""Of every picture: matplotlib settings."""


def png_of(figure: Figure, dpi: int = 110) -> bytes:
    """Return a figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def chance_of(metric: str, classes: int) -> float | None:
    """Return what guessing among so many classes scores; None for a metric without such a value."""
    return {"auroc": 0.5, "balanced_accuracy": 1 / max(classes, 2)}.get(metric)


def forest_plot(lines: Sequence[Line], title: str, over: str = "subjects", classes: int = 2) -> bytes:
    """Return a forest plot: one row a line (all of one metric and region), point and 95 % interval; PNG.

    `over`: what the intervals speak of; `classes`: among how many is chosen. Published numbers are open diamonds
    without an interval. Raises ValueError when no line has a number.
    """
    shown = [line for line in lines if line.estimate is not None]
    if not shown:
        raise ValueError(f"forest plot {title!r}: no line has a number; draw it once there are scores")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(shown)), layout="constrained")
        axes = figure.add_subplot()
        _draw_forest(axes, shown, over, chance_of(shown[0].metric, classes))
        # Of the figure, not of the axes: long names of rows leave these too little width for a title.
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10, wrap=True)
        return png_of(figure)


def _draw_forest(axes: Axes, lines: Sequence[Line], over: str, chance: float | None) -> None:
    metric = lines[0].metric
    places = np.arange(len(lines))[::-1]
    for place, line in zip(places, lines, strict=True):
        colour = COLOURS.get(line.kind, INK)
        estimate = float(line.estimate or 0.0)
        if line.low is not None and line.high is not None:
            axes.plot([line.low, line.high], [place, place], color=colour, lw=2.2, solid_capstyle="round", alpha=0.75)
        open_marker = line.kind == "published"
        axes.plot(
            estimate, place, "D" if open_marker else "o", ms=6.5, color=colour, mfc="white" if open_marker else colour
        )
        text = number(estimate, metric)
        axes.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=colour)
    if chance is not None:
        axes.axvline(chance, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=0)
        axes.annotate("chance", (chance, len(lines) - 0.45), fontsize=7.5, color=MUTED, ha="center", va="bottom")
    if metric not in UNITS:
        left, right = axes.get_xlim()
        axes.set_xlim(max(left, -0.02), min(right, 1.02))
    axes.set_ylim(-0.6, len(lines) - 0.3)
    axes.set_yticks(
        places, [f"{line.row} ({line.kind})" if line.kind in ("published", "others") else line.row for line in lines]
    )
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e4e7eb", lw=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"{heading(metric, lines[0].region)}, 95 % interval over {over}")


def loss_curves(records: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Return the numbers of a training against its step, a panel each, `psnr_*` and `embedding_*` together; PNG.

    `records` are lines of metrics.jsonl: kind, step and a dict `losses` (train) or `metrics` (val). Raises ValueError
    without a number.
    """
    series = loss_series(records)
    if not series:
        raise ValueError(f"loss curves {title!r}: metrics.jsonl has no finite loss yet")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = _panels(series)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.1 * columns + 0.4, 2.3 * rows + 0.4), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10)
        for k, (name, lines) in enumerate(panels.items()):
            _draw_panel(figure.add_subplot(rows, columns, k + 1), name, lines)
        return png_of(figure)


def _panels(series: Mapping[str, Mapping[str, Points]]) -> dict[str, list[tuple[str, str, Points]]]:
    """Return the panels, `loss` first: title -> (label, colour, points) of its lines."""
    panels: dict[str, list[tuple[str, str, Points]]] = {}
    for name in sorted(series, key=lambda name: (name != "loss", name)):
        group, _, member = name.partition("_")
        if group in TOGETHER:
            lines = panels.setdefault(TOGETHER[group], [])
            lines += [
                (member, LINE_COLOURS[len(lines) % len(LINE_COLOURS)], points) for points in series[name].values()
            ]
        else:
            colours = {"train": COLOURS["ours"], "val": COLOURS["published"]}
            panels[name] = [(kind, colour, series[name].get(kind, [])) for kind, colour in colours.items()]
    return panels


def _draw_panel(axes: Axes, title: str, lines: Sequence[tuple[str, str, Points]]) -> None:
    from matplotlib.ticker import MaxNLocator

    drawn = [line for line in lines if line[2]]
    for label, colour, points in drawn:
        _draw_series(axes, points, label, colour)
    steps = {step for _, _, points in drawn for step, _ in points}
    if len(steps) == 1:
        axes.set_xlim(min(steps) - 1, min(steps) + 1)
    values = [value for _, _, points in drawn for _, value in points]
    if len(values) == 1:
        reach = 0.5 * abs(values[0]) or 0.5
        axes.set_ylim(values[0] - reach, values[0] + reach)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel("optimiser step")
    axes.grid(color="#e4e7eb", lw=0.8)
    if len(drawn) > 1:
        axes.legend(frameon=False, fontsize=8)


def loss_series(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Points]]:
    """Return the finite numbers of metrics.jsonl as name -> kind (train, val) -> (step, value), in order."""
    found: dict[str, dict[str, Points]] = {}
    for record in records:
        kind = str(record.get("kind", "train"))
        for name, value in {**dict(record.get("losses") or {}), **dict(record.get("metrics") or {})}.items():
            if isinstance(value, int | float) and np.isfinite(value):
                found.setdefault(name, {}).setdefault(kind, []).append((int(record["step"]), float(value)))
    return found


def _draw_series(axes: Axes, points: Points, label: str, colour: str) -> None:
    steps, values = np.array(points).T
    width = max(1, len(values) // 20)
    if width > 1:
        axes.plot(steps, values, color=colour, lw=0.6, alpha=0.3)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color=colour, lw=1.6, label=label)
    else:
        axes.plot(steps, values, color=colour, lw=1.6, marker="o" if len(values) < 4 else "", ms=4, label=label)


@dataclass(frozen=True)
class OverlayCase:
    """One case of an overlay picture."""

    title: str
    image: npt.NDArray[np.float32]
    """(X, Y, Z) in RAS+ order."""
    target: npt.NDArray[np.bool_]
    """(R, X, Y, Z)."""
    prediction: npt.NDArray[np.bool_]
    """(R, X, Y, Z)."""


def overlays(cases: Sequence[OverlayCase], regions: Sequence[str], title: str) -> bytes:
    """Return axial slices with the outlines of target (solid) and prediction (dashed) by region; PNG.

    The slice is the one with most target voxels (or most predicted ones, when the target is empty). Left is left
    (neurological convention), as in the mosaics.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    if not cases:
        raise ValueError(f"overlay {title!r}: no case to draw")
    with rc_context(STYLE):
        figure = Figure(figsize=(2.7 * len(cases), 3.75), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10)
        for k, case in enumerate(cases):
            _draw_overlay(figure.add_subplot(1, len(cases), k + 1), case)
        handles = [Line2D([], [], color=c, lw=2, label=n) for n, c in zip(regions, REGION_COLOURS, strict=False)]
        handles += [
            Line2D([], [], color=INK, lw=1.6, label="target"),
            Line2D([], [], color=INK, lw=1.6, ls=(0, (3, 2)), label="prediction"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
        return png_of(figure, 130)


def _draw_overlay(axes: Axes, case: OverlayCase) -> None:
    chosen = case.target if case.target.any() else case.prediction
    counts = chosen.any(axis=0).sum(axis=(0, 1))
    z = int(counts.argmax()) if counts.any() else case.image.shape[2] // 2

    def flat(volume: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        return np.asarray(volume[:, :, z].T, dtype=np.float64)

    slice_ = flat(case.image)
    top = float(np.percentile(slice_[slice_ > 0], 99.5)) if (slice_ > 0).any() else 1.0
    axes.imshow(slice_, cmap="gray", vmin=0, vmax=top, origin="lower", interpolation="bilinear")
    for masks, style in ((case.target, "solid"), (case.prediction, "dashed")):
        for mask, colour in zip(masks, REGION_COLOURS, strict=False):
            outline = flat(mask)
            if outline.any():
                axes.contour(outline, levels=[0.5], colors=[colour], linewidths=1.3, linestyles=style)
    axes.set_title(case.title, fontsize=8.5)
    axes.annotate("L", (0.02, 0.5), xycoords="axes fraction", color="white", fontsize=8, va="center")
    axes.annotate(f"z = {z}", (0.98, 0.02), xycoords="axes fraction", color="white", fontsize=7, ha="right")
    axes.set_axis_off()
