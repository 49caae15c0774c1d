"""Principal components of embeddings, for pictures of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def principal_components(features_NC: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the coordinates (N, 2) along the first two principal components; 0 where there is no second one."""
    centred = features_NC.astype(np.float64) - features_NC.mean(axis=0, dtype=np.float64)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(centred), 2))
    points[:, : min(2, len(values))] = (left * values)[:, :2]
    return points
