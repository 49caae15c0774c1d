"""Which run can serve which benchmark: asked of all of them before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from models.config_scratch import SCRATCH_NETWORKS
from tasks.benchmarks import Benchmark, has_data
from tasks.rows import Run

if TYPE_CHECKING:
    from models.store import Store

FLAT = ("resnet3d", "vit3d")
"""Kinds of networks without a decoder: nothing can be segmented with them."""


class RunError(ValueError):
    """Runs that cannot be compared as asked: unknown, unfinished, or of no use for a benchmark."""


def check_runs(runs: Sequence[Run], benchmarks: Sequence[Benchmark], store: Store) -> None:
    """Raise RunError naming every run that is not there or cannot serve a benchmark, and why."""
    found: list[str] = []
    for run in runs:
        if problem := _absent(run):
            found.append(f"run {run.name!r}: {problem}")
            continue
        reasons = ((benchmark.name, why_not(run, benchmark, store)) for benchmark in benchmarks)
        found += [f"run {run.name!r} cannot serve benchmark {name!r}: {why}" for name, why in reasons if why]
    raise_for(found)


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
