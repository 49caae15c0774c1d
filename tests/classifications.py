"""Simulated predictions of classes, and what scikit-learn scores them: the reference of our weighted forms."""

from __future__ import annotations

import numpy as np
from sklearn import metrics


def simulated(rng: np.random.Generator, n: int, shift: float = 1.0, classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return class indices (N,) and probabilities (N, K); a larger shift is easier."""
    target = np.arange(n) % classes
    logits = rng.normal(size=(n, classes)) + shift * np.eye(classes)[target]
    probabilities = np.exp(logits)
    return target.astype(np.int64), probabilities / probabilities.sum(axis=1, keepdims=True)


def sklearn_metrics(target: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Return every classification score; NaN for those that need a class that is absent."""
    predicted, classes = probabilities.argmax(axis=1), probabilities.shape[1]
    labels = list(range(classes))
    sides = [1] if classes == 2 else labels
    complete = set(target.tolist()) == set(labels)
    nan = float("nan")

    def over_sides(score) -> float:
        return float(np.mean([score(target == k, predicted == k, probabilities[:, k]) for k in sides]))

    def specificity(true, guess, _) -> float:
        return metrics.recall_score(~true, ~guess)

    claimed = probabilities[:, 1] if classes == 2 else probabilities.max(axis=1)
    came_true = (target == 1) if classes == 2 else predicted == target
    place = np.minimum((claimed * 10).astype(int), 9)
    gaps = [abs(came_true[place == b].mean() - claimed[place == b].mean()) * (place == b).mean() for b in set(place)]
    return {
        "accuracy": metrics.accuracy_score(target, predicted),
        "balanced_accuracy": metrics.balanced_accuracy_score(target, predicted) if complete else nan,
        "auroc": over_sides(lambda t, _, p: metrics.roc_auc_score(t, p)) if complete else nan,
        "f1": metrics.f1_score(target, predicted, labels=labels, average="macro", zero_division=0),
        "auprc": over_sides(lambda t, _, p: metrics.average_precision_score(t, p)) if complete else nan,
        "sensitivity": over_sides(lambda t, g, _: metrics.recall_score(t, g)) if complete else nan,
        "specificity": over_sides(specificity) if complete else nan,
        "brier": metrics.brier_score_loss(target, probabilities, labels=labels),
        "ece": float(sum(gaps)),
    }
