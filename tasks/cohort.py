"""Which cases of a store belong to a benchmark, in which role, with which target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import pandas as pd

from models.records import SelectedCase
from tasks.benchmarks import Benchmark
from tasks.splits import ROLES


class CohortError(ValueError):
    """A benchmark that cannot be run on these cases: no test case, a class absent, an unknown class name."""


def select_cases(benchmark: Benchmark, cases: pd.DataFrame, roles: Mapping[tuple[str, str], str]) -> list[SelectedCase]:
    """Return the frozen lines of a benchmark, sorted by dataset and row; empty when the store has none of its data.

    `cases` are the lines of cases.parquet with the phenotype columns joined; `roles` maps (dataset, subject) to train,
    val or test. A case counts when it is stored, has at least one of the benchmark's modalities and a known target: a
    label of the benchmark's scheme, or a value in the target column. Cases without a role are left out.
    """
    chosen = cases[(cases["status"] == "stored") & cases["dataset"].isin(benchmark.datasets)]
    if chosen.empty:
        return []
    if benchmark.kind == "segmentation":
        chosen = _with_scheme(benchmark, chosen[chosen["has_label"].astype(bool)])
        targets = pd.Series("", index=chosen.index)
    else:
        chosen, targets = _with_targets(benchmark, chosen)
    wanted = set(benchmark.modalities)
    selected = [
        SelectedCase(
            dataset=str(line.dataset), row=int(cast("int", line.row)), case=str(line.case), subject=str(line.subject),
            digest=str(line.digest), role=roles[str(line.dataset), str(line.subject)], target=str(target),
        )
        for line, target in zip(chosen.itertuples(index=False), targets, strict=True)
        if wanted & set(cast("Sequence[str]", line.modalities)) and (str(line.dataset), str(line.subject)) in roles
    ]  # fmt: skip
    selected = sorted(selected, key=lambda case: (case.dataset, case.row))
    if selected:
        check_cohort(benchmark, selected)
    return selected


def scheme_of_cases(benchmark: Benchmark, cases: pd.DataFrame) -> Benchmark:
    """Return the benchmark with the label scheme that its labelled cases have, where it knows several releases of them.

    `cases` as for `select_cases`. Raises CohortError when the cases have several of its schemes: their regions differ.
    """
    if not benchmark.other_schemes:
        return benchmark
    mine = cases[(cases["status"] == "stored") & cases["dataset"].isin(benchmark.datasets)]
    schemes = (benchmark.scheme, *benchmark.other_schemes)
    there = [name for name in schemes if (mine["label_scheme"] == name)[mine["has_label"].astype(bool)].any()]
    if len(there) > 1:
        raise CohortError(
            f"benchmark {benchmark.name!r}: labels of {', '.join(benchmark.datasets)} follow {' and '.join(there)}, "
            "whose regions differ; keep one release in the store"
        )
    return benchmark.replace(scheme=there[0]) if there else benchmark


def _with_scheme(benchmark: Benchmark, labelled: pd.DataFrame) -> pd.DataFrame:
    chosen = labelled[labelled["label_scheme"] == benchmark.scheme]
    if chosen.empty and len(labelled):
        raise CohortError(
            f"benchmark {benchmark.name!r} needs labels of scheme {benchmark.scheme!r}; the {len(labelled)} labelled "
            f"cases of {', '.join(benchmark.datasets)} have {sorted(set(labelled['label_scheme']))}; set label_scheme "
            "of the source and ingest again"
        )
    return chosen


def _with_targets(benchmark: Benchmark, cases: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    if benchmark.target not in cases.columns:
        raise CohortError(
            f"benchmark {benchmark.name!r} needs the phenotype column {benchmark.target!r}; phenotypes.parquet has "
            f"{', '.join(sorted(cases.columns))}"
        )
    values = cases[benchmark.target]
    known = values.notna() & (values.astype(str) != "") & ~values.astype(str).isin(benchmark.others)
    if unknown := set(values[known].astype(str)) - set(benchmark.classes):
        raise CohortError(
            f"benchmark {benchmark.name!r}: column {benchmark.target!r} has values {sorted(unknown)} that are not "
            f"among its classes {list(benchmark.classes)}"
        )
    return cases[known], values[known].astype(str)


def targets_of_seed(benchmark: Benchmark, cases: Sequence[SelectedCase], seed: int) -> list[SelectedCase]:
    """Return the cases as the training with this seed sees them: a negative control shuffles anew for each."""
    if benchmark.shuffle_seed is None:
        return list(cases)
    return shuffle_targets(cases, benchmark.shuffle_seed + seed)


def fewer_labels(cases: Sequence[SelectedCase], share: float, seed: int) -> list[SelectedCase]:
    """Return the cases with a share of each class's training subjects, at least two; smaller shares are nested."""
    rng = np.random.default_rng(seed)
    kept: set[tuple[str, str]] = set()
    for target in sorted({case.target for case in cases}):
        subjects = sorted({(c.dataset, c.subject) for c in cases if c.role == "train" and c.target == target})
        order = rng.permutation(len(subjects))
        kept |= {subjects[k] for k in order[: max(2, round(share * len(subjects)))]}
    return [case for case in cases if case.role != "train" or (case.dataset, case.subject) in kept]


def shuffle_targets(cases: Sequence[SelectedCase], seed: int) -> list[SelectedCase]:
    """Return the cases with targets permuted over subjects inside each role: class shares stay, meaning goes."""
    rng = np.random.default_rng(seed)
    target: dict[tuple[str, str], str] = {}
    for role in ROLES:
        first = {(c.dataset, c.subject): c.target for c in reversed(cases) if c.role == role}
        subjects = sorted(first)
        order = rng.permutation(len(subjects))
        target |= {subject: first[subjects[k]] for subject, k in zip(subjects, order, strict=True)}
    return [case.replace(target=target[case.dataset, case.subject]) for case in cases]


def check_cohort(benchmark: Benchmark, cases: Sequence[SelectedCase]) -> None:
    """Refuse a cohort without training or test cases, or with a class that is absent from either."""
    for role in ("train", "test"):
        present = [case.target for case in cases if case.role == role]
        if not present:
            raise CohortError(
                f"benchmark {benchmark.name!r}: no {role} case among {len(cases)}; make a split with larger shares"
            )
        if absent := [name for name in benchmark.classes if name not in present]:
            raise CohortError(
                f"benchmark {benchmark.name!r}: class {absent[0]!r} is absent from the {role} role "
                f"({len(present)} cases); make another split, stratified by {benchmark.target!r}"
            )
