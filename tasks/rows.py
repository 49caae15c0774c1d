"""The rows that a benchmark trains: pre-trainings, their networks from scratch, and other networks from scratch.

All of them get the same budget, seeds and cases. Every pre-training keeps its network, and every network among them has
a row from scratch, so that what pre-training gives and what a network gives are told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from models.config import AnyNetwork
from models.config_scratch import SCRATCH_NETWORKS
from tasks import baselines
from tasks.benchmarks import Benchmark
from tasks.finetune import pretrained_digest, pretrained_network, read_json
from tasks.summary import MIXED, PRETRAINED, SCRATCH

RESERVED: tuple[str, ...] = (
    PRETRAINED,
    SCRATCH,
    MIXED,
    baselines.MAJORITY,
    baselines.AGE_SEX_VOLUME,
    baselines.TEMPLATE_OVERLAP,
    baselines.CEILING,
)
"""Names of rows that tables may have without any run; rows from scratch begin with `scratch`."""

FLAT: tuple[str, ...] = ("resnet3d", "vit3d")
"""Kinds of networks without a decoder: nothing can be segmented with them."""
SUPERVISED: tuple[str, ...] = ("segmentation", "classification")
"""Kinds of objectives that learn from the labels of a benchmark."""


@dataclass(frozen=True)
class Run:
    """A pre-training that is compared: what tables call it, and its folder."""

    name: str
    folder: Path
    repeats: tuple[Path, ...] = ()
    """Folders of the same pre-training from other seeds: one row with the first."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """Of all its trainings."""
        return (self.folder, *self.repeats)

    @property
    def each(self) -> tuple[Run, ...]:
        """Its trainings one by one."""
        return tuple(Run(self.name, folder) for folder in self.folders)

    @property
    def kind(self) -> str:
        """Kind of its network; empty where its run.json does not tell."""
        network = _network(self.folder)
        return "" if network is None else network.kind

    @property
    def origin(self) -> dict[str, Any] | None:
        """File and layout that it was imported from; None for a training of ours."""
        return (read_json(self.folder / "done.json") or {}).get("origin")

    @property
    def has_templates(self) -> bool:
        """Whether it learned templates of the modalities."""
        return self._objective == "brainmvp"

    @property
    def supervised(self) -> bool:
        """Whether it was trained on the labels of a benchmark: a fine-tuning, or a network from scratch."""
        return self._objective in SUPERVISED

    @property
    def _objective(self) -> str:
        objective = (read_json(self.folder / "run.json") or {}).get("objective") or {}
        return str(objective.get("kind", "brainmvp"))


@dataclass(frozen=True)
class Row:
    """What is trained under one name."""

    name: str
    _: KW_ONLY
    start: Path | None = None
    """Folder of the pre-training; None: from scratch."""
    weights: str = ""
    """Digest of the weights that it starts from."""
    repeats: tuple[tuple[Path, str], ...] = ()
    """Further starts of the row, with the digests of their weights: the same pre-training from other seeds."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Its network, as a setting of the recipe; empty: the recipe's own."""
    mix: bool = False
    """Learned templates are mixed into the channels; see tasks.finetune.with_template_mix."""
    segments_only: bool = False
    """Its network has no part that tells classes."""
    classifies_only: bool = False
    """Its network has no decoder."""

    @property
    def starts(self) -> tuple[Row, ...]:
        """A row of one start for each of its starts."""
        found = [(self.start, self.weights), *self.repeats]
        return tuple(replace(self, start=start, weights=weights, repeats=()) for start, weights in found)


def training_rows(
    runs: Sequence[Run], networks: Sequence[str] = (), mix: bool = False, size: str = "tiny"
) -> list[Row]:
    """Return the rows: all runs, a row from scratch for each of their networks, then the mix of the first and networks.

    networks: kinds of models.config_scratch. Raises ValueError for a run that is not finished.
    """
    trained = [_trained(run) for run in runs]
    others = [
        Row(f"{SCRATCH} ({kind})", settings={"network": SCRATCH_NETWORKS[kind][size]}, segments_only=True)
        for kind in networks
    ]
    mixed = [replace(trained[0], name=MIXED, mix=True)] if mix else []
    return [*trained, *_scratch_rows(runs), *mixed, *others]


def _trained(run: Run) -> Row:
    (start, weights), *repeats = [(folder, pretrained_digest(folder)) for folder in run.folders]
    return Row(
        run.name,
        start=start,
        weights=weights,
        repeats=tuple(repeats),
        settings=pretrained_network(run.folder),
        classifies_only=run.kind in FLAT,
    )


def _scratch_rows(runs: Sequence[Run]) -> list[Row]:
    """Return a row for every network: `scratch` has that of the first run, others are named after theirs."""
    found: list[tuple[AnyNetwork | None, Row]] = []
    for run in runs:
        network = _network(run.folder)
        if any(network == one for one, _ in found):
            continue
        name = f"{SCRATCH} ({run.kind})" if found else SCRATCH
        kinds = [one.kind for one, _ in found if one is not None]
        name = f"{SCRATCH} ({run.kind} of {run.name})" if run.kind in kinds else name
        flat = run.kind in FLAT
        found.append((network, Row(name, settings=pretrained_network(run.folder), classifies_only=flat)))
    return [row for _, row in found]


def scratch_of(runs: Sequence[Run]) -> dict[str, str]:
    """Return the name of the row from scratch with the network of each run, by the run's name."""
    names = {_digest(row.settings): row.name for row in _scratch_rows(runs)}
    return {run.name: names[_digest(pretrained_network(run.folder))] for run in runs}


def _network(folder: Path) -> AnyNetwork | None:
    """Return the network of a training with one input channel; None where its run.json does not tell."""
    return _parsed(pretrained_network(folder))


def _parsed(settings: Mapping[str, Any]) -> AnyNetwork | None:
    if not settings:
        return None
    found: AnyNetwork = TypeAdapter(AnyNetwork).validate_python(settings["network"])
    return found.replace(in_channels=1)


def _digest(settings: Mapping[str, Any]) -> str:
    network = _parsed(settings)
    return "" if network is None else network.content_digest()


def rows_for(benchmark: Benchmark, rows: Sequence[Row]) -> list[Row]:
    """Return the rows that a benchmark trains: one modality has nothing to mix, some networks only segment, others
    cannot."""
    segments = benchmark.kind == "segmentation"
    return [
        row
        for row in rows
        if (not row.mix or len(benchmark.modalities) > 1)
        and (not row.segments_only or segments)
        and (not row.classifies_only or not segments)
    ]


def left_out_notes(benchmark: Benchmark, networks: Sequence[str], runs: Sequence[Run] = ()) -> tuple[str, ...]:
    """Return the sentence of a table about networks and runs that cannot serve its benchmark; nothing without any."""
    if benchmark.kind == "segmentation":
        flat = [run.name for run in runs if run.kind in FLAT]
        return (f"Left out: {', '.join(flat)}; without a decoder nothing can be segmented.",) if flat else ()
    named = ", ".join(f"{SCRATCH} ({kind})" for kind in networks)
    return (f"Left out: {named}; these networks have no part that tells classes, they segment.",) if named else ()


def import_notes(runs: Sequence[Run]) -> list[str]:
    """Return a sentence for each imported pre-training: nothing here can tell what it has seen."""
    return [
        f"{run.name} was imported from the file {one.origin['file']}: which subjects it was trained on is not "
        "recorded, so it may have seen test subjects."
        for run in runs
        for one in run.each
        if one.origin
    ]
