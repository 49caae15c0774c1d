"""Simple baselines that every table shows, fitted on the train role only, and the ceiling of a phantom.

`majority` predicts the class shares of the training set; `age+sex+volume` is a logistic regression on three numbers
that need no network; `template overlap` marks the voxels where training lesions are most often found; `ceiling (true
latents)` is a logistic regression on the traits that generated a phantom: what is left to learn at best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

MAJORITY = "majority"
AGE_SEX_VOLUME = "age+sex+volume"
TEMPLATE_OVERLAP = "template overlap"
CEILING = "ceiling (true latents)"

Floats = npt.NDArray[np.float64]


def majority(train_targets: Sequence[str], classes: Sequence[str], n_test: int) -> Floats:
    """Return probabilities (n_test, K): the class shares of the training set, the same for everybody (AUROC 0.5)."""
    check_classes(train_targets, classes, MAJORITY)
    shares = np.array([list(train_targets).count(name) for name in classes], dtype=np.float64)
    return np.tile(shares / shares.sum(), (n_test, 1))


def check_classes(train_targets: Sequence[str], classes: Sequence[str], who: str) -> None:
    """Refuse a training set in which a class is absent."""
    if absent := [name for name in classes if name not in set(train_targets)]:
        raise ValueError(
            f"baseline {who}: class {absent[0]!r} is absent from the training role ({len(train_targets)} cases); "
            "make another split, stratified by the target"
        )


def foreground_ml(image: npt.NDArray[Any], spacing_mm: float) -> float:
    """Return the volume in ml where any modality of an image (M, X, Y, Z) is above zero."""
    return float((image > 0).any(axis=0).sum()) * spacing_mm**3 / 1000


def age_sex_volume_features(people: pd.DataFrame) -> Floats:
    """Return the features (N, 3): age in years, sex (1 for female, 0 for male, NaN otherwise), volume in ml.

    `people` has the columns age, sex and volume_ml; an absent age or sex column counts as missing everywhere.
    """
    sexes = {"f": 1.0, "female": 1.0, "m": 0.0, "male": 0.0}
    blank = pd.Series(np.nan, index=people.index)
    age = pd.to_numeric(people.get("age", blank), errors="coerce")
    sex = people.get("sex", blank).astype(str).str.lower().map(sexes)
    return np.column_stack([age, sex, people["volume_ml"]]).astype(np.float64)


def logistic(train: Floats, train_targets: Sequence[str], test: Floats, classes: Sequence[str], who: str) -> Floats:
    """Return probabilities (n_test, K) of a logistic regression (L2, C = 1) on standardised features.

    Missing values get the training median, a feature that is missing for all is left out; median, mean and standard
    deviation come from the training rows only.
    """
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    check_classes(train_targets, classes, who)
    known = np.isfinite(train).any(axis=0)
    if not known.any():
        raise ValueError(f"baseline {who}: every feature is missing in the training role")
    model = make_pipeline(SimpleImputer(strategy="median"), StandardScaler(), LogisticRegression(max_iter=1000))
    codes = np.array([list(classes).index(target) for target in train_targets])
    model.fit(train[:, known], codes)
    return np.asarray(model.predict_proba(test[:, known]), dtype=np.float64)


@dataclass(frozen=True)
class TemplatePrior:
    """How often each voxel of the template grid belongs to each region, and the threshold chosen on training cases."""

    probability: npt.NDArray[np.float32]
    """(R, X, Y, Z) of the template grid."""
    thresholds: tuple[float, ...]
    """One for each region."""

    def predict(self, origin: Sequence[int], extent: Sequence[int]) -> npt.NDArray[np.uint8]:
        """Return the masks (R, x, y, z) for a case of this extent whose voxel 0 is at `origin` in the template grid."""
        shape = (len(self.thresholds), *extent)
        masks = np.zeros(shape, dtype=np.uint8)
        grid, case = _overlap(origin, extent, self.probability.shape[1:])
        for index, threshold in enumerate(self.thresholds):
            masks[index][case] = self.probability[index][grid] > threshold
        return masks


Placed = tuple[npt.NDArray[np.bool_], Sequence[int]]
"""Region masks (R, x, y, z) of a training case and its origin in the template grid."""


def fit_template_prior(cases: Callable[[], Iterable[Placed]], grid: Sequence[int]) -> TemplatePrior:
    """Return the mean of training masks in the template grid with, per region, the threshold of highest mean Dice.

    `cases` is called twice, so that one case at a time is in memory. Thresholds tried: 19 shares (0, 5, ..., 90 %) of
    the region's highest probability. The cases that gave the prior choose the threshold too: optimistic on training
    cases, which are not reported. Raises ValueError without a case.
    """
    total: npt.NDArray[np.float32] | None = None
    count = 0
    for masks, origin in cases():
        total = np.zeros((len(masks), *grid), dtype=np.float32) if total is None else total
        inside, case = _overlap(origin, masks.shape[1:], grid)
        total[(slice(None), *inside)] += masks[(slice(None), *case)]
        count += 1
    if total is None:
        raise ValueError(f"baseline {TEMPLATE_OVERLAP}: no training case with a label")
    probability = total / np.float32(count)
    candidates = np.linspace(0, 0.9, 19)[None, :] * probability.max(axis=(1, 2, 3))[:, None]
    scores = sum(_dice_by_threshold(probability, candidates, placed) for placed in cases())
    best = np.argmax(np.asarray(scores), axis=1)
    return TemplatePrior(probability, tuple(float(row[i]) for row, i in zip(candidates, best, strict=True)))


def _dice_by_threshold(probability: npt.NDArray[np.float32], candidates: Floats, placed: Placed) -> Floats:
    """Return the Dice (R, T) of one case for each region and candidate threshold."""
    masks, origin = placed
    grid, case = _overlap(origin, masks.shape[1:], probability.shape[1:])
    scores = np.ones(candidates.shape)
    for r, thresholds in enumerate(candidates):
        prior, mask = probability[r][grid], masks[r][case].astype(bool)
        for t, threshold in enumerate(thresholds):
            predicted = prior > threshold
            size = int(masks[r].sum()) + int(predicted.sum())
            scores[r, t] = 2 * int((predicted & mask).sum()) / size if size else 1.0
    return scores


def _overlap(
    origin: Sequence[int], extent: Sequence[int], grid: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return where a case lies in the grid, as slices of the grid and of the case."""
    starts = [max(int(o), 0) for o in origin]
    stops = [
        max(start, min(int(o) + int(e), int(g))) for start, o, e, g in zip(starts, origin, extent, grid, strict=True)
    ]
    in_grid = tuple(slice(a, b) for a, b in zip(starts, stops, strict=True))
    in_case = tuple(slice(a - int(o), b - int(o)) for a, b, o in zip(starts, stops, origin, strict=True))
    return in_grid, in_case
