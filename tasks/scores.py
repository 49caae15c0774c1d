"""Scores of predictions in long form: masks by region and case, probabilities by class and case.

The rules for empty masks stand in tasks.metrics_masks, all definitions in docs/metrics.md.
"""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import write_bytes
from models.config import Region
from models.records import SelectedCase, digest_of
from models.scoring import dice
from tasks.benchmarks import Benchmark
from tasks.case_map import HERE, CaseMap
from tasks.label_schemes import scheme_labels
from tasks.metrics_masks import region_scores
from tasks.metrics_surface import union_box

COLUMNS: tuple[str, ...] = (
    "benchmark", "row", "seed", "dataset", "case", "subject", "region", "metric", "value", "target", "note",
)  # fmt: skip
SECONDS = b"seconds"
"""Of the metadata of kept scores."""
RULES_VERSION = 2
"""Raised when a rule of the scores changes, here or in tasks.metrics_*, so that kept ones are computed again."""


class ScoreError(ValueError):
    """Predictions or labels that cannot be scored: wrong shape, unknown label, not finite, missing case."""


@dataclass(frozen=True)
class RowKey:
    """Whose scores these are."""

    benchmark: str
    row: str
    seed: int


def region_masks(
    label: npt.NDArray[Any], regions: Sequence[Region], scheme: str, case: str = ""
) -> npt.NDArray[np.bool_]:
    """Return the mask (R, X, Y, Z) of each region; refuses label values that the scheme does not know."""
    found = {int(value) for value in np.unique(label)}
    if unknown := found - scheme_labels(scheme):
        raise ScoreError(
            f"case {case}: label values {sorted(unknown)} are outside scheme {scheme!r} "
            f"(it knows {sorted(scheme_labels(scheme))}); check the label scheme of the dataset"
        )
    return np.stack([np.isin(label, region.labels) for region in regions])


Truth = tuple[npt.NDArray[Any], Sequence[float]]
"""Label (X, Y, Z) of a case and the edges of its voxels in mm."""


def score_case(prediction: npt.NDArray[Any], truth: Truth, benchmark: Benchmark, case: str) -> list[dict[str, Any]]:
    """Return the entries of one case: region, metric, value, note, for the metrics of the benchmark.

    `prediction` is (R, X, Y, Z) with 0 and 1 in the order of the benchmark's regions, on the grid of the label.
    """
    label, spacing_mm = truth
    wanted = (len(benchmark.regions), *label.shape)
    if prediction.shape != wanted:
        raise ScoreError(
            f"case {case}: the prediction has shape {prediction.shape}, the label needs {wanted} "
            "(regions, x, y, z on the grid of the label); delete the folder `predictions` of the training and run "
            "evaluate again: it is predicted again"
        )
    # Whatever is not 0 lies in this box; dilated lesions must not be cut off by it.
    margin = benchmark.lesions.dilation + 1 if benchmark.lesions else 0
    box = union_box([label != 0, (prediction != 0).any(axis=0)], margin) or (slice(0, 1),) * label.ndim
    label, prediction = label[box], prediction[(slice(None), *box)]
    if prediction.dtype.kind == "f" and not np.isfinite(prediction).all():
        raise ScoreError(f"case {case}: the prediction has NaN or infinite values; masks of 0 and 1 are needed")
    if not np.isin(prediction, (0, 1)).all():
        raise ScoreError(f"case {case}: the prediction has values other than 0 and 1; threshold it first")
    masks, predicted = region_masks(label, benchmark.regions, benchmark.scheme, case), prediction.astype(bool)
    entries: list[dict[str, Any]] = []
    for index, (region, overlap) in enumerate(zip(benchmark.regions, dice(predicted, masks), strict=True)):
        others = region_scores(
            predicted[index], masks[index], spacing_mm, benchmark.surface_tolerance_mm, benchmark.lesions
        )
        entries += [
            {"region": region.name, "metric": metric, "value": value, "note": note}
            for metric, value, note in (("dice", overlap, ""), *others)
            if metric in benchmark.metrics
        ]
    return entries


Predict = Callable[[SelectedCase], npt.NDArray[Any]]
"""Reads the predicted masks (R, X, Y, Z) of a case."""


def segmentation_scores(
    key: RowKey,
    benchmark: Benchmark,
    cases: Sequence[SelectedCase],
    predict: Predict,
    truth: Callable[[SelectedCase], Truth],
    work: CaseMap = HERE,
    voxels: int = 0,
) -> pd.DataFrame:
    """Return the long-form scores of all cases; `predict` and `truth` read one case each, on one grid.

    work: where it is done, case by case; voxels: of a case, at most. The scores and their order do not depend on it.
    """
    score = partial(_case_rows, key, benchmark, predict, truth)
    return _frame([row for rows in work(score, cases, voxels) for row in rows])


def _case_rows(
    key: RowKey, benchmark: Benchmark, predict: Predict, truth: Callable[[SelectedCase], Truth], case: SelectedCase
) -> list[dict[str, Any]]:
    try:
        entries = score_case(predict(case), truth(case), benchmark, case.case)
    except ScoreError as error:
        raise ScoreError(f"{_words(key)}, {error}") from error
    return [{**_identity(key, case), "target": "", **entry} for entry in entries]


def probability_scores(
    key: RowKey, benchmark: Benchmark, cases: Sequence[SelectedCase], probabilities: npt.NDArray[np.float64]
) -> pd.DataFrame:
    """Return one entry a case and class: metric `probability`, region = class name, target = the true class.

    Kept case by case so that a bootstrap over subjects can recompute every metric. `probabilities` is (N, K).
    """
    wanted = (len(cases), len(benchmark.classes))
    if probabilities.shape != wanted:
        raise ScoreError(
            f"{key.benchmark}: probabilities have shape {probabilities.shape}, need {wanted} (cases, classes)"
        )
    for case, line in zip(cases, probabilities, strict=True):
        if not np.isfinite(line).all() or line.min() < 0 or abs(line.sum() - 1) > 1e-3:
            raise ScoreError(
                f"{_words(key)}, case {case.case}: probabilities {line.tolist()} are not finite numbers from 0 to 1 "
                "with sum 1; the training has diverged or the file is damaged"
            )
        if case.target not in benchmark.classes:
            raise ScoreError(f"case {case.case}: target {case.target!r} is not among the classes {benchmark.classes}")
    return _frame(
        [
            {**_identity(key, case), "region": name, "metric": "probability", "value": float(p), "target": case.target}
            for case, line in zip(cases, probabilities, strict=True)
            for name, p in zip(benchmark.classes, line, strict=True)
        ]
    )


def prediction_scores(key: RowKey, cases: Sequence[SelectedCase], predictions: npt.NDArray[np.float64]) -> pd.DataFrame:
    """Return one entry a case: metric `prediction`, its value, target = the true number; `predictions` is (N,)."""
    if not np.isfinite(predictions).all():
        raise ScoreError(f"{key.benchmark}, row {key.row!r}: a prediction is not finite; the encoder has diverged")
    return _frame(
        [
            {**_identity(key, case), "region": "", "metric": "prediction", "value": float(p), "target": case.target}
            for case, p in zip(cases, predictions, strict=True)
        ]
    )


def _words(key: RowKey) -> str:
    return f"{key.benchmark}, row {key.row!r}, seed {key.seed}"


def _identity(key: RowKey, case: SelectedCase) -> dict[str, Any]:
    return {
        "benchmark": key.benchmark,
        "row": key.row,
        "seed": key.seed,
        "dataset": case.dataset,
        "case": case.case,
        "subject": case.subject,
        "note": "",
    }


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    if not rows:
        raise ScoreError("nothing to score: the test set has no case")
    return pd.DataFrame(rows, columns=list(COLUMNS))


def inputs_digest(key: RowKey, benchmark: Benchmark, cases: Sequence[SelectedCase], predictions: str) -> str:
    """Return the digest of everything that decides the scores of one row."""
    return digest_of(
        {
            "key": [key.benchmark, key.row, key.seed],
            "benchmark": benchmark.content_digest(),
            "cases": [case.model_dump(mode="json") for case in cases],
            "predictions": predictions,
            "rules": RULES_VERSION,
        }
    )


def score_path(folder: Path, key: RowKey) -> Path:
    """Return the file that keeps the scores of one row and seed."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', f'{key.benchmark} {key.row} seed{key.seed}'.lower())}.parquet"


def kept_scores(path: Path, inputs: str, compute: Callable[[], pd.DataFrame]) -> tuple[pd.DataFrame, bool]:
    """Return scores and whether they were computed now: read from `path` when it was made from the same `inputs`.

    A file that cannot be read is made again.
    """
    table = read_kept(path)
    if table is not None and (table.schema.metadata or {}).get(b"inputs") == inputs.encode():
        return _from_table(table), False
    begun = time.perf_counter()
    frame = compute()
    write_scores(frame, path, inputs, seconds=time.perf_counter() - begun)
    return frame, True


def read_kept(path: Path) -> pa.Table | None:
    """Return a kept table; None when there is none, or none that can be read: it is made again then."""
    try:
        return pq.read_table(path) if path.exists() else None
    except (OSError, pa.ArrowException):
        return None


def scoring_seconds(path: Path) -> float | None:
    """Return how long it took to compute kept scores, by the clock; None when the file does not say."""
    said = (pq.read_schema(path).metadata or {}).get(SECONDS) if path.exists() else None
    return None if said is None else float(said)


def write_scores(frame: pd.DataFrame, path: Path, inputs: str, seconds: float | None = None) -> None:
    """Write long-form scores as one Parquet file that names the digest of its inputs; further columns come last.

    seconds: how long it took to compute them.
    """
    names = [*COLUMNS, *(name for name in frame.columns if name not in COLUMNS)]
    table = pa.Table.from_pandas(frame[names], preserve_index=False)
    metadata = {b"inputs": inputs.encode(), b"columns": json.dumps(names).encode()}
    metadata |= {} if seconds is None else {SECONDS: f"{seconds:.3f}".encode()}
    table = table.replace_schema_metadata(metadata)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(str(path), buffer.getvalue())


def _from_table(table: pa.Table) -> pd.DataFrame:
    return table.replace_schema_metadata(None).to_pandas()
