"""Who is probed: stored cases with a known target that no pre-training has seen, one a subject, in stratified folds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.records import OLDEST, SelectedCase
from tasks.benchmarks import Benchmark
from tasks.crosswalk import Link, crosswalk_links, person_links
from tasks.folds import ensure_folds, fold_of, folds_digest
from tasks.leaks import seen_because
from tasks.overlap import overlap_sentence, shared_sentences
from tasks.probes import Bools, Ints, ProbeError, check_targets
from tasks.splits import Subject, subjects_in

if TYPE_CHECKING:
    from models.store import Store


TRAINING_MIN = 4
"""Subjects that the inner cross-validation of a fold needs."""


@dataclass(frozen=True)
class ProbeCohort:
    """A probe on the cases of one store; without data it has no cases."""

    benchmark: Benchmark
    store: Store
    cases: tuple[SelectedCase, ...] = ()
    """One a subject, sorted; `target` is the class, or the number as text."""
    fold: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """(N,) of every case."""
    folds_digest: str = ""
    people: pd.DataFrame = field(default_factory=pd.DataFrame)
    """One line a case, in the order of `cases`: age, sex, site, ..."""
    latents: pd.DataFrame | None = None
    """One line a case of the traits that generated it; only phantoms have them."""
    notes: tuple[str, ...] = ()
    """Sentences on who was left out, and why."""
    leaks: Mapping[Subject, str] = field(default_factory=dict)
    """Subjects that a pre-training has seen, and why; they are left out."""
    everyone: ProbeCohort | None = None
    """Where somebody was left out for that: the cohort with them, in the same folds, under a name of its own."""

    @property
    def present(self) -> Bools:
        """Which modality of the benchmark each case has (N, M)."""
        has = [[name in names for name in self.benchmark.modalities] for names in self.people["modalities"]]
        return np.array(has, dtype=bool).reshape(len(self.cases), len(self.benchmark.modalities))

    @property
    def target(self) -> npt.NDArray[Any]:
        """Class indices (N,) int64, or numbers (N,) float64 of a regression."""
        if self.benchmark.kind == "regression":
            return np.array([float(case.target) for case in self.cases])
        return np.array([self.benchmark.classes.index(case.target) for case in self.cases], dtype=np.int64)

    @property
    def test_share(self) -> float:
        """n_test / n_train of a fold, on average."""
        sizes = np.bincount(self.fold)
        return float(sizes.mean() / (len(self.fold) - sizes.mean()))

    def part(self, mask: Bools) -> ProbeCohort:
        """Return the cohort of some of its cases, (N,) bool; folds keep their numbers."""
        cases = tuple(case for case, here in zip(self.cases, mask, strict=True) if here)
        latents = None if self.latents is None else self.latents[mask].reset_index(drop=True)
        people = self.people[mask].reset_index(drop=True)
        return replace(self, cases=cases, fold=self.fold[mask], people=people, latents=latents)

    def of_seed(self, seed: int) -> ProbeCohort:
        """Return the cohort with the targets of one seed: a negative control permutes them inside every fold anew."""
        if self.benchmark.shuffle_seed is None:
            return self
        rng = np.random.default_rng(self.benchmark.shuffle_seed + seed)
        targets = np.array([case.target for case in self.cases], dtype=object)
        for fold in np.unique(self.fold):
            inside = np.flatnonzero(self.fold == fold)
            targets[inside] = targets[rng.permutation(inside)]
        shuffled = [case.replace(target=target) for case, target in zip(self.cases, targets, strict=True)]
        return replace(self, cases=tuple(shuffled))


WITH_SEEN = "-with-seen"
"""End of the name under which a benchmark is scored with the subjects that a pre-training has seen."""


def seen_subjects(
    selections: Iterable[Iterable[SelectedCase]], workspace: Path, store_url: str, elsewhere: Iterable[Link] = ()
) -> dict[Subject, str]:
    """Return the subjects that pre-trainings were trained or validated on, and whoever is one person with one of them,
    each with why.

    By looks or by a crosswalk (tasks.crosswalk), also through others (tasks.splits.lookalikes). elsewhere: pairs that
    look alike, one of each from another store (tasks.seen_prints).
    """
    every = (case for cases in selections for case in cases)
    links = [*person_links(workspace, store_url), *elsewhere]
    return seen_because(every, links, crosswalk_links(workspace))


def find_probe_cohort(
    benchmark: Benchmark,
    store: Store,
    people: pd.DataFrame,
    workspace: Path,
    folds: int,
    seen: Mapping[Subject, str] = MappingProxyType({}),
    latents: pd.DataFrame | None = None,
) -> ProbeCohort:
    """Return the cohort of a probe; its folds are kept in `<workspace>/splits/<benchmark>-<folds>.folds.parquet`.

    A case counts when it is stored, has one of the benchmark's modalities and a known target; of several cases of a
    subject the first one is taken. Values that are none of the classes are other diagnoses and left out. `seen` are the
    subjects that pre-trainings have seen, each with why.
    Raises ProbeError when a class is absent, when too few of it are there, when a fold has nobody, and when
    pre-trainings have seen everybody, or people of these datasets under other ids (tasks.overlap) that no crosswalk of
    the workspace names; FoldError for fewer subjects than folds.
    """
    return find_cohort(with_image(benchmark, people), benchmark, store, people, workspace, folds, seen, latents)


def with_image(benchmark: Benchmark, people: pd.DataFrame) -> pd.DataFrame:
    """Return the stored cases of a benchmark that have one of its modalities, in order."""
    chosen = people[(people["status"] == "stored") & people["dataset"].isin(benchmark.datasets)]
    chosen = chosen[chosen["modalities"].map(lambda has: not set(benchmark.modalities).isdisjoint(has)).astype(bool)]
    return chosen.sort_values(["dataset", "subject", "case"])


def find_cohort(
    chosen: pd.DataFrame,
    benchmark: Benchmark,
    store: Store,
    people: pd.DataFrame,
    workspace: Path,
    folds: int,
    seen: Mapping[Subject, str] = MappingProxyType({}),
    latents: pd.DataFrame | None = None,
) -> ProbeCohort:
    """Return the cohort of the chosen cases of a benchmark: of several of a subject the first with a known target.

    Folds are kept, and errors raised, as `find_probe_cohort` says.
    """
    who = named(benchmark)
    chosen = chosen.assign(_target=targets_of(benchmark, chosen))
    known = chosen[chosen["_target"].notna()].drop_duplicates(["dataset", "subject"])
    if known.empty:
        why = f"{len(chosen)} cases of {', '.join(benchmark.datasets)} are stored, none has a usable value in column"
        return ProbeCohort(benchmark, store, notes=(f"{why} {benchmark.target!r}.",) if len(chosen) else ())
    told = crosswalk_links(workspace)
    if certain := overlap_sentence(people, seen, benchmark.datasets, certainly=True, told=told):
        raise ProbeError(f"{who}: {certain}")
    unseen = known[[pair not in seen for pair in subjects_in(known)]].reset_index(drop=True)
    if unseen.empty:
        raise ProbeError(
            f"{who}: all {len(known)} subjects were seen by a pre-training; pre-train with a split "
            "that keeps some of them for testing, or probe other data"
        )
    possible = overlap_sentence(people, seen, benchmark.datasets, told=told)
    notes = (
        *_notes(benchmark, chosen, known, unseen),
        *((f"{possible}.",) if possible else ()),
        *shared_sentences(seen, benchmark.datasets, told),
    )
    cohort = replace(_folded(benchmark, store, unseen, workspace, folds, latents), notes=notes)
    leaks = {pair: seen[pair] for pair in subjects_in(known) if pair in seen}
    if not leaks:
        return cohort
    everyone = _folded(benchmark, store, known.reset_index(drop=True), workspace, folds, latents)
    named_apart = benchmark.replace(name=f"{benchmark.name}{WITH_SEEN}")
    return replace(cohort, leaks=leaks, everyone=replace(everyone, benchmark=named_apart))


def _folded(
    benchmark: Benchmark, store: Store, chosen: pd.DataFrame, workspace: Path, folds: int, latents: pd.DataFrame | None
) -> ProbeCohort:
    """Return the cohort of these lines, one a subject, in the kept folds, which are extended by who is new."""
    _check_classes(benchmark, chosen)
    lines = chosen if benchmark.classes else chosen.assign(_target=chosen["_target"].astype("float64"))
    strata = ("_target", "dataset", "site")
    table = ensure_folds(workspace, f"{benchmark.name}-{folds}", store.url, lines, folds, strata=strata)
    by_subject = fold_of(table)
    fold = np.array([by_subject[pair] for pair in subjects_in(chosen)])
    _check_folds(benchmark, fold, folds)
    cases = tuple(
        SelectedCase(
            dataset=str(line.dataset), row=int(cast("int", line.row)), case=str(line.case), subject=str(line.subject),
            digest=str(line.digest), role="test", target=str(target),
        )
        for line, target in zip(chosen.itertuples(index=False), chosen["_target"], strict=True)
    )  # fmt: skip
    cohort = ProbeCohort(benchmark, store, cases, fold, _digest(table, cases), chosen, _aligned(latents, cases))
    check_targets(cohort.fold, cohort.target, benchmark.classes, named(benchmark))
    return cohort


def named(benchmark: Benchmark) -> str:
    """Return what errors call a benchmark, e.g. `probe 'adni-ad'`."""
    return f"{benchmark.protocol} {benchmark.name!r}"


def targets_of(benchmark: Benchmark, people: pd.DataFrame) -> pd.Series:
    """Return the target of each line: a finite number, a class name, or None where there is none.

    Raises ProbeError for an age that is none of a human.
    """
    blank = pd.Series([None] * len(people), index=people.index, dtype=object)
    values = people.get(benchmark.target, blank)
    if benchmark.kind == "regression" or benchmark.cuts or benchmark.quantiles:
        numbers = pd.to_numeric(values, errors="coerce").astype("float64")
        numbers = numbers.where(np.isfinite(numbers))
        if benchmark.target == "age" and len(odd := numbers[(numbers < 0) | (numbers > OLDEST)]):
            raise ProbeError(
                f"{named(benchmark)}: {len(odd)} ages, first {odd.iloc[0]:g}, are not from 0 to {OLDEST} years; "
                "correct them in the phenotypes (months, days, a code for missing?)"
            )
        if benchmark.classes:
            return _cut(benchmark, numbers)
        return numbers.astype(object).where(numbers.notna(), None)
    words = values.astype(object).where(values.notna(), "").astype(str)
    return words.where(words.isin(benchmark.classes), None)


def _cut(benchmark: Benchmark, numbers: pd.Series) -> pd.Series:
    """Return the class of each number; quantiles are those of all known numbers, so they do not depend on folds."""
    cuts = benchmark.cuts
    if benchmark.quantiles and numbers.notna().any():
        count = len(benchmark.classes)
        cuts = tuple(numbers.quantile([k / count for k in range(1, count)]))
    names = [None if pd.isna(x) else benchmark.classes[int(np.searchsorted(cuts, x, side="left"))] for x in numbers]
    return pd.Series(names, index=numbers.index, dtype=object)


def _notes(benchmark: Benchmark, chosen: pd.DataFrame, known: pd.DataFrame, unseen: pd.DataFrame) -> tuple[str, ...]:
    found = []
    subjects = len(chosen.drop_duplicates(["dataset", "subject"]))
    if missing := subjects - len(known):
        found.append(f"Subjects left out for want of a usable value of {benchmark.target!r}: {missing} of {subjects}.")
    if seen := len(known) - len(unseen):
        found.append(
            f"Subjects left out because a pre-training of this table has seen them: {seen}; see the table of "
            "leaks, whose .csv names them."
        )
    return tuple(found)


def _check_classes(benchmark: Benchmark, people: pd.DataFrame) -> None:
    values = people["_target"].value_counts()
    if absent := [name for name in benchmark.classes if name not in values]:
        raise ProbeError(
            f"{named(benchmark)}: no unseen subject is {absent[0]!r} in column {benchmark.target!r}; there are "
            f"{', '.join(f'{count} {name}' for name, count in values.items())}; check the layout of the phenotypes, or "
            "leave the benchmark out"
        )


def _check_folds(benchmark: Benchmark, fold: Ints, folds: int) -> None:
    """Raise ProbeError for an empty fold, which kept folds of other people may have, and for too few to train on."""
    sizes = np.bincount(fold, minlength=folds)
    if sizes.min() == 0 or len(fold) - sizes.max() < TRAINING_MIN:
        raise ProbeError(
            f"{named(benchmark)}: its {len(fold)} unseen subjects lie in {folds} folds as "
            f"{', '.join(map(str, sizes))}; every fold needs one, and {TRAINING_MIN} others to train on: ask for fewer "
            "folds, or add subjects to the store"
        )


def _digest(table: pd.DataFrame, cases: Iterable[SelectedCase]) -> str:
    """Return the digest of the folds of these cases: subjects that are not probed do not count."""
    mine = {(case.dataset, case.subject) for case in cases}
    return folds_digest(table[[pair in mine for pair in subjects_in(table)]])


def _aligned(latents: pd.DataFrame | None, cases: Iterable[SelectedCase]) -> pd.DataFrame | None:
    if latents is None:
        return None
    table = latents.drop_duplicates(["dataset", "subject"]).set_index(["dataset", "subject"])
    return table.reindex(pd.MultiIndex.from_tuples([(case.dataset, case.subject) for case in cases])).reset_index()
