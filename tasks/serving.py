"""Which run can serve which benchmark: asked of all of them before anything is trained.

A run that cannot serve one of several benchmarks is left out of that table, which says why. One that can serve none of
them, and a benchmark that no run can serve, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from models.config_scratch import SCRATCH_NETWORKS
from tasks.benchmarks import Benchmark, has_data
from tasks.finetune import read_json
from tasks.rows import FLAT, Run

if TYPE_CHECKING:
    from models.store import Store


class RunError(ValueError):
    """Runs that cannot be compared as asked: unknown, unfinished, or of no use for a benchmark."""


@dataclass(frozen=True)
class Serving:
    """Which of some runs serve which of some benchmarks."""

    runs: tuple[Run, ...]
    reasons: Mapping[tuple[str, str], str]
    """(run, benchmark) -> why the run cannot serve it; of the others there is no entry."""

    def of(self, benchmarks: Sequence[str]) -> list[Run]:
        """Return the runs that serve all of some benchmarks, in their order."""
        return [run for run in self.runs if not any((run.name, name) in self.reasons for name in benchmarks)]

    def left_out(self, benchmarks: Sequence[str]) -> list[str]:
        """Return a sentence for each run that serves none of some benchmarks; places of stores are not told."""
        found = []
        for run in self.runs:
            why = [self.reasons.get((run.name, name), "") for name in benchmarks]
            if benchmarks and all(why):
                words = re.sub(r"the store \S+", "the store", "; ".join(dict.fromkeys(why)))
                found.append(f"{run.name} is left out: {words}.")
        return found


def check_runs(
    runs: Sequence[Run], benchmarks: Sequence[Benchmark], store: Store, stores: Mapping[str, Store] | None = None
) -> Serving:
    """Return who serves what.

    stores: those of other protocols than fine-tuning, by protocol, where they are not `store`. Raises RunError naming
    every run that is not there, or serves no benchmark, every benchmark that no run serves, and every run that serves
    some but not all of the probes or of the prompting tasks, each with why: a table of frozen encoders has all rows.
    """
    problems = {run: _problem(run) for run in runs}
    there = [run for run in runs if not problems[run]]
    reasons = {
        (run.name, one.name): why
        for run in there
        for one in benchmarks
        if (why := why_not(run, one, (stores or {}).get(one.protocol, store)))
    }
    wrong = (
        f"run {run!r} cannot serve benchmark {name!r}: {why}"
        for (run, name), why in reasons.items()
        if _is_wrong(run, name, there, benchmarks, reasons)
    )
    raise_for([*(f"run {run.name!r}: {problem}" for run, problem in problems.items() if problem), *wrong])
    return Serving(tuple(runs), reasons)


def _is_wrong(
    run: str, name: str, runs: Sequence[Run], benchmarks: Sequence[Benchmark], reasons: Mapping[tuple[str, str], str]
) -> bool:
    """Say whether a run that cannot serve a benchmark is refused, and not left out of its table."""
    if all((run, one.name) in reasons for one in benchmarks) or all((one.name, name) in reasons for one in runs):
        return True
    protocol = next(one.protocol for one in benchmarks if one.name == name)
    same = [one.name for one in benchmarks if one.protocol == protocol]
    return protocol != "fine-tune" and any((run, other) not in reasons for other in same)


def check_templates(runs: Sequence[Run], mix: bool, missing: bool) -> None:
    """Raise RunError when learned templates are asked for and the runs have none."""
    if mix and not runs[0].has_templates:
        raise RunError(
            f"template_mix needs the template bank of the first run, and {runs[0].name!r} was not pre-trained with "
            "BrainMVP; name a BrainMVP training first, or switch it off"
        )
    if missing and not any(run.has_templates for run in runs):
        raise RunError(
            f"missing_modalities compares zeros with learned templates, and none of the runs "
            f"({', '.join(run.name for run in runs)}) was pre-trained with BrainMVP; add one, or switch it off"
        )


def raise_for(problems: Iterable[str]) -> None:
    """Raise RunError with all problems, one a line; nothing without any."""
    if lines := list(problems):
        raise RunError("\n".join(lines))


def _problem(run: Run) -> str:
    """Return why a run cannot be used at all; empty when it can."""
    found = [*map(_absent, run.each)]
    return next(filter(None, found), "") or next(filter(None, (_unlike(run, one) for one in run.repeats)), "")


def _absent(run: Run) -> str:
    folder = run.folder
    if not folder.is_dir():
        done = sorted(path.parent for path in folder.parent.glob("*/done.json"))
        known = [one.name for one in done if not Run(one.name, one).supervised]
        return (
            f"there is no training {folder.name!r} in {folder.parent}; finished pre-trainings: "
            f"{', '.join(known) or 'none'}"
        )
    if not (folder / "done.json").exists():
        return f"training {folder.name!r} is not finished: {folder / 'done.json'} is missing; run pretrain to its end"
    return ""


SAME: tuple[str, ...] = ("recipe", "preset", "network", "objective", "optimiser", "epochs")
"""Parts of a config in which the repeats of a pre-training agree."""


def _unlike(run: Run, repeat: Path) -> str:
    """Return in what a repeat is no repetition of the first training of its row; empty where it is one."""
    from models.checkpoint import first_difference  # torch

    configs = [read_json(folder / "run.json") or {} for folder in (run.folder, repeat)]
    one, other = ({name: config.get(name) for name in SAME} for config in configs)
    different = first_difference(one, other)
    if not different:
        return ""
    return (
        f"{run.folder.name} and {repeat.name} are no repetitions of one pre-training: {different}; make them rows of "
        "their own"
    )


def why_not(run: Run, benchmark: Benchmark, store: Store) -> str:
    """Return why a finished run cannot serve a benchmark by its protocol; empty when it can."""
    if benchmark.protocol == "fine-tune":
        return _not_tunable(run, benchmark)
    try:
        _check_frozen(run, benchmark, store)
    except ValueError as error:
        return str(error)
    return ""


def _not_tunable(run: Run, benchmark: Benchmark) -> str:
    if run.kind in SCRATCH_NETWORKS:
        return f"its network {run.kind!r} is trained from scratch only; name it under `networks`"
    if run.supervised:
        return "it was trained on the labels of a benchmark, so it is no pre-training; name one that was not"
    if benchmark.kind == "segmentation" and run.kind in FLAT:
        return f"its network {run.kind!r} has no decoder, so nothing can be segmented with it"
    return ""


def _check_frozen(run: Run, benchmark: Benchmark, store: Store) -> None:
    """Raise ValueError when a run's frozen encoder cannot be probed, or nothing can be prompted with it."""
    from tasks.embeddings import channels_of, trained_encoder  # torch
    from tasks.network_embeddings import check_pair, trained_pair

    modality = benchmark.modalities[0]
    if benchmark.protocol == "prompt":
        check_pair(trained_pair(run.folder), store, [modality])
    elif has_data(benchmark, list(store.datasets)):
        channels_of(trained_encoder(run.folder), store, modality)
