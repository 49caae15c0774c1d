"""Who is prompted: stored cases with a known target, some with an image, some with a connectome, some with both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.records import digest_of
from models.store_connectomes import has_connectome
from tasks.benchmarks import Benchmark
from tasks.crosswalk import person_links
from tasks.probe_cohort import ProbeCohort, find_cohort, named
from tasks.probes import Bools, Ints, ProbeError, check_targets
from tasks.prompting import PromptError, Subjects, check_supports
from tasks.splits import Subject, link_groups, subjects_in

if TYPE_CHECKING:
    from models.store import Store


def _nobody() -> npt.NDArray[np.bool_]:
    return np.zeros(0, dtype=bool)


@dataclass(frozen=True)
class PromptCohort:
    """A prompting task on the cases of one store; without data it has no cases."""

    everybody: ProbeCohort
    """Who has an image or a connectome, one case a subject: folds are made of them."""
    has_image: Bools = field(default_factory=_nobody)
    """(N,) can be a query."""
    has_network: Bools = field(default_factory=_nobody)
    """(N,) can be a support."""
    group: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """(N,) equal numbers: subjects that are one person (tasks.crosswalk)."""
    everyone: PromptCohort | None = None
    """Where subjects were left out because a pre-training has seen them: the cohort with them."""

    @property
    def benchmark(self) -> Benchmark:
        """The task."""
        return self.everybody.benchmark

    @property
    def has_both(self) -> Bools:
        """(N,) has an image and a connectome."""
        return self.has_image & self.has_network

    def subjects(self, own: ProbeCohort) -> Subjects:
        """Return the roles of all subjects with the targets of one seed of `everybody`."""
        return Subjects(own.target, own.fold, self.has_image, self.has_network, self.group)

    @cached_property
    def roles_digest(self) -> str:
        """Digest of who has what and who is one person with whom."""
        return digest_of([one.tolist() for one in (self.has_image, self.has_network, self.group)])

    @cached_property
    def matrices(self) -> npt.NDArray[np.float32]:
        """The stored connectomes (M, R, R) of whoever has one, in order."""
        cases = [case for case, here in zip(self.everybody.cases, self.has_network, strict=True) if here]
        stored = {name: self.everybody.store.dataset(name) for name in {case.dataset for case in cases}}
        return np.stack([stored[case.dataset].read_connectome(case.row) for case in cases])

    def why_without_networks(self) -> str:
        """Return why rows that see the query's own connectome are absent; empty when they are not."""
        scored = self.has_both
        cohort = self.everybody
        for index, name in enumerate(self.benchmark.classes):
            for fold in range(int(cohort.fold.max()) + 1):
                if not (scored & (cohort.fold == fold) & (cohort.target == index)).any():
                    return f"nobody in fold {fold} is {name} and has both image and connectome"
        return ""


def find_prompt_cohort(
    benchmark: Benchmark,
    store: Store,
    people: pd.DataFrame,
    workspace: Path,
    folds: int,
    seen: Mapping[Subject, str] = MappingProxyType({}),
    latents: pd.DataFrame | None = None,
) -> PromptCohort:
    """Return the cohort of a prompting task; its folds are kept in `<workspace>/splits/<task>-<folds>.folds.parquet`.

    A case counts when it is stored, has the benchmark's image or a connectome, and a known target. Of several cases of
    a subject one with both is taken, else one with an image, else the first. Folds are stratified by target, dataset
    and site. Raises PromptError when nobody has an image or nobody a connectome, and for too few of a class; ProbeError
    and FoldError as `find_probe_cohort` does.
    """
    chosen = _usable(benchmark, people)
    everybody = find_cohort(chosen, benchmark, store, people, workspace, folds, seen, latents)
    if not everybody.cases:
        return PromptCohort(everybody)
    cohort = _with_roles(everybody, workspace)
    return replace(cohort, everyone=_with_roles(everybody.everyone, workspace) if everybody.everyone else None)


def _with_roles(everybody: ProbeCohort, workspace: Path) -> PromptCohort:
    """Return who of a cohort is a query and who a support."""
    lines = everybody.people
    has_image, has_network = (lines[name].to_numpy(dtype=bool) for name in ("_image", "_network"))
    groups = link_groups(person_links(workspace, everybody.store.url))
    pairs = [groups.get(pair, pair) for pair in subjects_in(lines)]
    numbers = {pair: number for number, pair in enumerate(dict.fromkeys(pairs))}
    group = np.array([numbers[pair] for pair in pairs], dtype=np.int64)
    cohort = PromptCohort(everybody, has_image, has_network, group)
    _check(cohort)
    words = (
        f"Queries have an image ({int(has_image.sum())} subjects), supports a connectome ({int(has_network.sum())}); "
        f"{int(cohort.has_both.sum())} have both. Who has a connectome alone is never a query, who has an image alone "
        "never a support."
    )
    return replace(cohort, everybody=replace(everybody, notes=(words, *everybody.notes)))


def _usable(benchmark: Benchmark, people: pd.DataFrame) -> pd.DataFrame:
    chosen = people[(people["status"] == "stored") & people["dataset"].isin(benchmark.datasets)]
    image = chosen["modalities"].map(lambda has: benchmark.modalities[0] in has).astype(bool)
    network = pd.Series([has_connectome({"qc": qc}) for qc in chosen.get("qc", [""] * len(chosen))], chosen.index, bool)
    chosen = chosen.assign(_image=image, _network=network, _less=2 - image.astype(int) * 2 + ~(image & network))
    chosen = chosen[chosen["_image"] | chosen["_network"]]
    return chosen.sort_values(["dataset", "subject", "_less", "case"], kind="stable")


def _check(cohort: PromptCohort) -> None:
    who, everybody, benchmark = named(cohort.benchmark), cohort.everybody, cohort.benchmark
    count, image = len(everybody.cases), benchmark.modalities[0]
    if not cohort.has_image.any():
        raise PromptError(
            f"{who}: {count} unseen subjects have a connectome and a known target, none has an image ({image}); the "
            "queries of prompting are images: add T1s to the store"
        )
    if not cohort.has_network.any():
        raise PromptError(
            f"{who}: {count} unseen subjects have an image and a known target, none has a connectome; the supports of "
            "prompting are connectomes: add BOLD or ROI series to the store, whose spec needs `connectome`"
        )
    subjects = cohort.subjects(everybody)
    check_supports(subjects, benchmark.classes, who)
    try:
        check_targets(everybody.fold[cohort.has_image], everybody.target[cohort.has_image], benchmark.classes, who)
    except ProbeError as error:
        raise PromptError(f"{error} (counted: subjects with an image)") from None
