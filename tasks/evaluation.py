"""The cohort of one benchmark: its cases, what is known of them, and who of them counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.records import SelectedCase
from tasks import baselines
from tasks.benchmarks import Benchmark
from tasks.cohort import scheme_of_cases, select_cases, targets_of_seed
from tasks.crosswalk import Link
from tasks.faces import face_mask, frame_of
from tasks.finetune import Finetuning
from tasks.leaks import SOME, THE, find_leaks
from tasks.native_truth import SourceLabels
from tasks.overlap import overlap_sentence, shared_sentences
from tasks.scores import ScoreError, Truth
from tasks.splits import Subject
from tasks.summary import OTHERS

if TYPE_CHECKING:
    from models.store import Store, StoredCase, StoredDataset
    from tasks.others import Others

KINDS: dict[str, str] = {
    baselines.MAJORITY: "baseline",
    baselines.AGE_SEX_VOLUME: "baseline",
    baselines.TEMPLATE_OVERLAP: "baseline",
    baselines.CEILING: "ceiling",
}


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
    others: tuple[Others, ...] = ()
    """Predictions of others that are rows of its table."""

    @property
    def kinds(self) -> dict[str, str]:
        """What rows are that were not trained here."""
        return {**KINDS, **{one.name: OTHERS for one in self.others}}

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
        indices = [self.store.spec.modalities.index(name) for name in self.benchmark.modalities]
        return self._datasets[case.dataset].read_crop(case.row, indices, (0, 0, 0), self.stored(case).extent)

    def hidden(self, case: SelectedCase, image: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """Return the voxels (X, Y, Z) of a case's face, which no picture may show."""
        return face_mask(image, self.stored(case).affine, frame_of(self.store.spec))

    def label(self, case: SelectedCase) -> npt.NDArray[np.uint8]:
        """Return the stored label of a case on its extent (X, Y, Z)."""
        return self._datasets[case.dataset].read_label(case.row, (0, 0, 0), self.stored(case).extent)

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

    def stored(self, case: SelectedCase) -> StoredCase:
        """Return what the store publishes of a case: its digest and where its voxels lie."""
        return self._datasets[case.dataset].case_info(case.row)

    def dataset(self, case: SelectedCase) -> StoredDataset:
        """Return the stored dataset of a case."""
        return self._datasets[case.dataset]

    def place(self, case: SelectedCase) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return origin and extent of a case in the template grid."""
        info = self.stored(case)
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
