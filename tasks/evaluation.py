"""Evaluating one benchmark: its cohort and the scores of all rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.records import SelectedCase, digest_of
from tasks import baselines
from tasks.benchmarks import Benchmark
from tasks.cohort import scheme_of_cases, select_cases, targets_of_seed
from tasks.crosswalk import Link
from tasks.faces import face_mask, frame_of
from tasks.finetune import Finetuning
from tasks.leaks import SOME, THE, find_leaks
from tasks.native_truth import SourceLabels
from tasks.overlap import overlap_sentence, shared_sentences
from tasks.predictions import predictions_digest, read_probabilities, read_regions
from tasks.scores import (
    Predict,
    RowKey,
    ScoreError,
    Truth,
    inputs_digest,
    kept_scores,
    probability_scores,
    region_masks,
    score_path,
    scoring_workers,
    segmentation_scores,
)
from tasks.splits import Subject

if TYPE_CHECKING:
    from models.store import Store, StoredDataset

KINDS: dict[str, str] = {
    baselines.MAJORITY: "baseline",
    baselines.AGE_SEX_VOLUME: "baseline",
    baselines.TEMPLATE_OVERLAP: "baseline",
    baselines.CEILING: "ceiling",
}
LATENTS: tuple[str, ...] = ("age", "head_scale", "grey_loss", "ventricle_log", "medial_temporal_loss")
"""Columns of latents.parquet that the ceiling sees: what generated the anatomy, never the label itself."""


@dataclass(frozen=True)
class Cohort:
    """A benchmark on the cases of one store."""

    benchmark: Benchmark
    selected: tuple[SelectedCase, ...]
    people: pd.DataFrame
    """One line a stored case with phenotype columns: dataset, row, subject, age, sex, ..."""
    store: Store
    latents: pd.DataFrame | None = None
    """Columns dataset, subject and LATENTS; only phantoms have them."""
    native: SourceLabels | None = None
    """Scored on the grids of the label files instead of the stored ones."""
    leaks: Mapping[Subject, str] = field(default_factory=dict)
    """Test subjects that the pre-training has seen, and why; they are predicted and count in no table."""
    seen_by: str = THE
    """Words for the pre-trainings that have seen `leaks`."""
    overlaps: tuple[str, ...] = ()
    """Sentences on people that the pre-training may have seen under other ids."""

    @property
    def trained_as(self) -> str:
        """Name of the benchmark whose trainings are scored."""
        return self.benchmark.name.removesuffix(NATIVE) if self.native else self.benchmark.name

    def own(self, trainings: Sequence[Finetuning]) -> list[Finetuning]:
        """Return the trainings of this benchmark."""
        return [one for one in trainings if one.benchmark == self.trained_as]

    def of_role(self, role: str) -> list[SelectedCase]:
        """Return the lines of one role."""
        return [case for case in self.selected if case.role == role]

    def without_leaks(self, scores: pd.DataFrame) -> pd.DataFrame:
        """Return long-form scores without the subjects that the pre-training has seen."""
        if not self.leaks or scores.empty:
            return scores
        pairs = zip(scores["dataset"], scores["subject"], strict=True)
        return scores[[pair not in self.leaks for pair in pairs]]

    def of_seed(self, seed: int) -> Cohort:
        """Return the cohort with the targets of one training's seed: its own where the benchmark shuffles them."""
        if self.benchmark.shuffle_seed is None:
            return self
        return replace(self, selected=tuple(targets_of_seed(self.benchmark, self.selected, seed)))

    @cached_property
    def _datasets(self) -> dict[str, StoredDataset]:
        return {name: self.store.dataset(name) for name in self.benchmark.datasets if name in self.store.datasets}

    def image(self, case: SelectedCase) -> npt.NDArray[np.float32]:
        """Return the benchmark's modalities of a case on its stored extent (M, X, Y, Z)."""
        dataset = self._datasets[case.dataset]
        indices = [self.store.spec.modalities.index(name) for name in self.benchmark.modalities]
        return dataset.read_crop(case.row, indices, (0, 0, 0), dataset.case_info(case.row).extent)

    def hidden(self, case: SelectedCase, image: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Return the voxels (X, Y, Z) of a case's face, which no picture may show."""
        affine = self._datasets[case.dataset].case_info(case.row).affine
        return face_mask(image, affine, frame_of(self.store.spec))

    def label(self, case: SelectedCase) -> npt.NDArray[np.uint8]:
        """Return the stored label of a case on its extent (X, Y, Z)."""
        dataset = self._datasets[case.dataset]
        return dataset.read_label(case.row, (0, 0, 0), dataset.case_info(case.row).extent)

    def truth(self, case: SelectedCase) -> Truth:
        """Return the label that a case is scored against, and its voxels' edges in mm: stored, or as in its file."""
        return self.native.truth(case) if self.native else (self.label(case), (self.store.spec.spacing_mm,) * 3)

    def on_grid(self, case: SelectedCase, masks: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return predicted masks (R, x, y, z) of the stored extent on the grid of `truth`."""
        if not self.native:
            return masks
        return self.native.moved(case, self._datasets[case.dataset], masks, self.benchmark.regions)

    def for_workers(self) -> Cohort:
        """Return what reads labels and grids of single cases, as small as another process needs it."""
        native = SourceLabels(self.store) if self.native else None
        return Cohort(self.benchmark, (), pd.DataFrame(), self.store, native=native)

    def place(self, case: SelectedCase) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return origin and extent of a case in the template grid."""
        info = self._datasets[case.dataset].case_info(case.row)
        return info.origin, info.extent


def find_cohort(
    benchmark: Benchmark,
    store: Store,
    people: pd.DataFrame,
    roles: dict[tuple[str, str], str],
    latents: pd.DataFrame | None = None,
) -> Cohort:
    """Return the cohort of a benchmark; without data its selection is empty."""
    benchmark = scheme_of_cases(benchmark, people)
    return Cohort(benchmark, tuple(select_cases(benchmark, people, roles)), people, store, latents)


NATIVE = "-native"
"""End of the name under which a benchmark is scored on the grids of its label files."""


def native_cohort(cohort: Cohort) -> Cohort:
    """Return a segmentation's cohort scored on the grids of its label files; published numbers are not beside it."""
    title = f"{cohort.benchmark.title}, on the grids of the label files"
    benchmark = cohort.benchmark.replace(name=f"{cohort.benchmark.name}{NATIVE}", title=title, published=())
    return replace(cohort, benchmark=benchmark, native=SourceLabels(cohort.store))


def without_seen(
    pretraining: Sequence[SelectedCase], cohort: Cohort, links: Sequence[Link], told: Sequence[Link] = ()
) -> Cohort:
    """Return the cohort with the test subjects set aside that a pre-training has seen; see tasks.leaks.

    links: pairs of subjects that look like one person; told: pairs that crosswalks call one. Raises ScoreError when too
    few are left, and when a table says that the pre-training holds people of the benchmark under other ids of whom no
    crosswalk says who they are.
    """
    seen = {(case.dataset, case.subject) for case in pretraining if case.role != "test"}
    datasets = cohort.benchmark.datasets
    if sentence := overlap_sentence(cohort.people, seen, datasets, certainly=True, told=told):
        raise ScoreError(f"benchmark {cohort.benchmark.name!r}: {sentence}")
    overlaps = shared_sentences(seen, datasets, told)
    return replace(cohort, leaks=find_leaks(pretraining, cohort, links, told), overlaps=overlaps)


def without_seen_by_any(
    pretrainings: Mapping[str, Sequence[SelectedCase]],
    cohort: Cohort,
    links: Sequence[Link],
    told: Sequence[Link] = (),
) -> Cohort:
    """Return the cohort without the test subjects that any of some pre-trainings has seen: one test set for all rows.

    pretrainings: the cases of each by the name of its row; of several, the reasons say which has seen a subject.
    """
    found = without_seen([case for cases in pretrainings.values() for case in cases], cohort, links, told)
    if len(pretrainings) < 2:
        return found
    why: dict[Subject, list[str]] = {subject: [] for subject in found.leaks}
    for row, cases in pretrainings.items():
        for subject, reason in find_leaks(cases, cohort, links, told).items():
            why[subject].append(f"{row}: {reason}")
    return replace(found, leaks={subject: "; ".join(reasons) for subject, reasons in why.items()}, seen_by=SOME)


def score_trainings(cohort: Cohort, trainings: Sequence[Finetuning], folder: Path) -> tuple[pd.DataFrame, int]:
    """Return the long-form scores of finished trainings and how many of them were computed now."""
    rows = []
    for training in trainings:
        own = cohort.of_seed(training.seed)
        key = RowKey(cohort.benchmark.name, training.row, training.seed)
        rows.append(_Row(key, own, predictions_digest(training.folder), _scorer(own, training)))
    return _gather(rows, folder)


Scorer = Callable[[RowKey], pd.DataFrame]


@dataclass(frozen=True)
class _Row:
    """Scores to compute: of whom, on which cohort, from which predictions."""

    key: RowKey
    cohort: Cohort
    predictions: str
    scorer: Scorer


def _gather(rows: Sequence[_Row], folder: Path) -> tuple[pd.DataFrame, int]:
    frames, fresh = [], 0
    for row in rows:
        key = row.key
        path = score_path(folder, key)
        test, native = row.cohort.of_role("test"), row.cohort.native
        made_from = digest_of([row.predictions, native.digest(test)]) if native else row.predictions
        inputs = inputs_digest(key, row.cohort.benchmark, test, made_from)
        frame, computed = kept_scores(path, inputs, partial(row.scorer, key))
        frames.append(frame)
        fresh += computed
    return (pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()), fresh


def _scorer(cohort: Cohort, training: Finetuning) -> Scorer:
    benchmark, test = cohort.benchmark, cohort.of_role("test")

    def score(key: RowKey) -> pd.DataFrame:
        if benchmark.kind == "classification":
            return probability_scores(
                key, benchmark, test, read_probabilities(training.folder, test, benchmark.classes)
            )
        return _region_scores(key, cohort, partial(read_regions, training.folder))

    return score


def _region_scores(key: RowKey, cohort: Cohort, predict: Predict) -> pd.DataFrame:
    """Return the scores of a segmentation's test cases; `predict` gives picklable masks on the stored extent."""
    test, sent = cohort.of_role("test"), cohort.for_workers()
    workers = scoring_workers(len(test), math.prod(cohort.store.spec.grid))
    return segmentation_scores(key, cohort.benchmark, test, partial(_on_grid, sent, predict), sent.truth, workers)


def _on_grid(cohort: Cohort, predict: Predict, case: SelectedCase) -> npt.NDArray[Any]:
    return cohort.on_grid(case, predict(case))


def score_baselines(cohort: Cohort, folder: Path, seeds: int = 1) -> tuple[pd.DataFrame, int]:
    """Return the scores of the baselines that fit the benchmark's kind (and of the ceiling, for phantoms).

    They have no seed of their own, so one score does; where targets are shuffled, each of the `seeds` shuffles has one.
    """
    shuffles = range(seeds if cohort.benchmark.shuffle_seed is not None else 1)
    rows = [row for seed in shuffles for row in _baseline_rows(cohort.of_seed(seed), seed)]
    return _gather(rows, folder)


def _baseline_rows(cohort: Cohort, seed: int) -> list[_Row]:
    if cohort.benchmark.kind == "segmentation":
        scorers: dict[str, Scorer] = {baselines.TEMPLATE_OVERLAP: lambda key: _template_scores(key, cohort)}
        made_from = ""
    else:
        scorers = {
            baselines.MAJORITY: lambda key: _majority_scores(key, cohort),
            baselines.AGE_SEX_VOLUME: lambda key: _logistic_scores(key, cohort, _simple_features(cohort)),
        }
        if cohort.latents is not None:
            scorers[baselines.CEILING] = lambda key: _logistic_scores(key, cohort, _latent_features(cohort))
        made_from = _features_digest(cohort)
    train = sorted(f"{case.dataset}/{case.row}/{case.digest}/{case.target}" for case in cohort.of_role("train"))
    digest = digest_of([train, made_from])
    return [_Row(RowKey(cohort.benchmark.name, row, seed), cohort, digest, s) for row, s in scorers.items()]


def _features_digest(cohort: Cohort) -> str:
    columns = [name for name in ("age", "sex") if name in cohort.people]
    tables = [cohort.people[["dataset", "row", *columns]], *([] if cohort.latents is None else [cohort.latents])]
    # pandas keeps a missing value missing when it makes text of a column, and NaN has no place in JSON.
    return digest_of([table.astype(str).fillna("nan").to_numpy().tolist() for table in tables])


def _majority_scores(key: RowKey, cohort: Cohort) -> pd.DataFrame:
    test = cohort.of_role("test")
    targets = [case.target for case in cohort.of_role("train")]
    return probability_scores(
        key, cohort.benchmark, test, baselines.majority(targets, cohort.benchmark.classes, len(test))
    )


Features = Callable[[Sequence[SelectedCase]], npt.NDArray[np.float64]]


def _logistic_scores(key: RowKey, cohort: Cohort, features: Features) -> pd.DataFrame:
    train, test = cohort.of_role("train"), cohort.of_role("test")
    targets = [case.target for case in train]
    found = baselines.logistic(features(train), targets, features(test), cohort.benchmark.classes, key.row)
    return probability_scores(key, cohort.benchmark, test, found)


def _simple_features(cohort: Cohort) -> Features:
    people = cohort.people.set_index(["dataset", "row"])

    def features(cases: Sequence[SelectedCase]) -> npt.NDArray[np.float64]:
        lines = people.loc[[(case.dataset, case.row) for case in cases]].copy()
        spacing = cohort.store.spec.spacing_mm
        lines["volume_ml"] = [baselines.foreground_ml(cohort.image(case), spacing) for case in cases]
        return baselines.age_sex_volume_features(lines)

    return features


def _latent_features(cohort: Cohort) -> Features:
    assert cohort.latents is not None
    if absent := [name for name in ("dataset", "subject", *LATENTS) if name not in cohort.latents]:
        raise ValueError(f"latents.parquet lacks the columns {absent}; write the phantom cohort again")
    table = cohort.latents.drop_duplicates(["dataset", "subject"]).set_index(["dataset", "subject"])

    def features(cases: Sequence[SelectedCase]) -> npt.NDArray[np.float64]:
        keys = pd.MultiIndex.from_tuples([(case.dataset, case.subject) for case in cases])
        return table.reindex(keys)[list(LATENTS)].to_numpy(dtype=np.float64)

    return features


def _template_scores(key: RowKey, cohort: Cohort) -> pd.DataFrame:
    benchmark, store = cohort.benchmark, cohort.store

    def placed() -> Iterable[baselines.Placed]:
        for case in cohort.of_role("train"):
            yield (
                region_masks(cohort.label(case), benchmark.regions, benchmark.scheme, case.case),
                cohort.place(case)[0],
            )

    prior = baselines.fit_template_prior(placed, store.spec.grid)
    return _region_scores(key, cohort, partial(_template_masks, cohort.for_workers(), prior))


def _template_masks(cohort: Cohort, prior: baselines.TemplatePrior, case: SelectedCase) -> npt.NDArray[np.uint8]:
    return prior.predict(*cohort.place(case))
