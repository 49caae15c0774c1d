"""Pictures of embeddings: who is near whom, and along which age."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models.components import principal_components
from models.objectives.pictures import montage

EDGE = 120
"""Pixels of a matrix, about, before the montage enlarges it."""


def matrices(shown: Mapping[str, Tensor]) -> NDArray[np.uint8]:
    """Return square matrices with values in [0, 1] beside each other, their names above; white is 1."""
    pictures = []
    for matrix in shown.values():
        grey = matrix.detach().float().cpu().clamp(0, 1).mul(255).round().numpy().astype(np.uint8)
        times = max(1, EDGE // len(grey))
        pictures.append(grey.repeat(times, axis=0).repeat(times, axis=1))
    return montage([pictures], gap=8, titles=list(shown))


def embedding_plot(features_NC: NDArray[np.float32], ages_N: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return a scatter plot (H, W, 3) of the first two principal components, coloured by age; grey: age unknown."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second to import
    from matplotlib.figure import Figure

    points = principal_components(features_NC)
    figure = Figure(figsize=(5, 4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    known = np.isfinite(ages_N)
    axes.scatter(points[~known, 0], points[~known, 1], c="0.7", s=16)
    drawn = axes.scatter(points[known, 0], points[known, 1], c=ages_N[known], s=16, cmap="viridis")
    figure.colorbar(drawn, label="age in years")
    axes.set(xlabel="component 1", ylabel="component 2", title=f"{len(points)} validation cases", xticks=[], yticks=[])
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
