"""Scores that trainings choose weights by and that tables report: one definition for both."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def dice(prediction: npt.NDArray[np.bool_], target: npt.NDArray[np.bool_]) -> list[float]:
    """Return the Dice of each region of two masks (R, X, Y, Z); 1 when both are empty, 0 when one of them is."""
    import torch
    from monai.metrics import compute_dice

    tensors = [torch.from_numpy(np.ascontiguousarray(mask, dtype=np.float32))[None] for mask in (prediction, target)]
    return [float(value) for value in compute_dice(*tensors, include_background=True, ignore_empty=False)[0]]


def auroc(target: npt.NDArray[np.int64], probabilities: npt.NDArray[np.float64]) -> float:
    """Return the AUROC of class indices (N,) and probabilities (N, K); NaN when a class is absent from the targets.

    Two classes: the last is the positive one; more: macro one-vs-rest.
    """
    from sklearn.metrics import roc_auc_score

    labels = list(range(probabilities.shape[1]))
    if set(target.tolist()) != set(labels):
        return float("nan")
    if len(labels) == 2:
        return float(roc_auc_score(target, probabilities[:, 1]))
    return float(roc_auc_score(target, probabilities, multi_class="ovr", average="macro", labels=labels))
