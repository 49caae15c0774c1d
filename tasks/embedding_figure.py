"""A look at embeddings: their two strongest directions, coloured by age."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from models.components import principal_components
from tasks.figures import MUTED, STYLE, png_of
from tasks.probes import Floats


def directions(features_NC: Floats) -> tuple[Floats, Floats]:
    """Return the two strongest directions (N, 2) of standardised features, and their shares of the variance (2,).

    Features that do not vary count nothing.
    """
    spread = features_NC.std(axis=0)
    scaled = (features_NC - features_NC.mean(axis=0))[:, spread > 1e-12] / spread[spread > 1e-12]
    points = principal_components(scaled)
    return points, (points**2).sum(axis=0) / max(float((scaled**2).sum()), 1e-30)


def embedding_figure(features: Mapping[str, Floats], age: Floats, title: str) -> bytes:
    """Return a PNG with a panel of each encoder's features (N, C): a point a subject, coloured by age (N,) in years.

    Subjects without an age are grey. Raises ValueError without a panel, or with fewer than three subjects.
    """
    if not features or len(age) < 3:
        raise ValueError(f"embedding picture {title!r}: it needs features of three or more subjects, got {len(age)}")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    known = np.isfinite(age)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.0 * len(features) + 0.9, 3.3), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=10)
        panels = figure.subplots(1, len(features), squeeze=False)[0]
        for axes, (name, values) in zip(panels, features.items(), strict=True):
            points, shares = directions(values)
            axes.scatter(*points[~known].T, s=12, color=MUTED, label="age unknown")
            limits = {"vmin": np.nanmin(age), "vmax": np.nanmax(age)} if known.any() else {}
            dots = axes.scatter(*points[known].T, s=14, c=age[known], cmap="viridis", **limits)
            axes.set_title(name, fontsize=9)
            axes.set_xlabel(f"PC 1 ({shares[0]:.0%} of variance)")
            axes.set_ylabel(f"PC 2 ({shares[1]:.0%})")
            axes.set_xticks([])
            axes.set_yticks([])
        figure.colorbar(dots, ax=panels, label="age (years)", shrink=0.85)
        return png_of(figure)
