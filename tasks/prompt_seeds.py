"""What the rows of a prompting table are made of: settings, embeddings of a cohort, and seeds of fitted rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from models.config_cinp import NetworkClassificationConfig
from tasks.network_embeddings import PairSource, Side, pair_embeddings
from tasks.probe_cohort import ProbeCohort
from tasks.probes import Bools, Floats
from tasks.probing import Progress, Together, probe_features
from tasks.prompt_cohort import PromptCohort
from tasks.prompting import VARIANTS, Variant
from tasks.row_scores import Seed

RULES_VERSION = 1
"""Raised when a rule of prompting or of its baselines changes, so that kept scores are computed again."""


@dataclass(frozen=True)
class PromptSettings:
    """What is prompted with."""

    variants: tuple[Variant, ...] = VARIANTS
    shares: tuple[float, ...] = (1.0, 0.5, 0.1)
    """Of the labelled connectomes; the first with the first variant is the table's reference."""
    draws: int = 5
    """Of supports that are smaller than all."""
    k: int = 5
    seed: int = 0
    classifier: NetworkClassificationConfig | None = None
    """Of the supervised network; None: it is left out."""


@dataclass(frozen=True)
class PairRow:
    """A row of trainings whose encoders of images and connectomes share a space."""

    name: str
    pairs: tuple[PairSource, ...]
    together: Together = "seeds"


@dataclass(frozen=True)
class Row:
    """A row of a table that is to be scored, or the reason why it is not."""

    name: str
    seeds: tuple[Seed, ...] = ()
    kind: Literal["ours", "baseline", "ceiling"] = "baseline"
    absent: str = ""
    variant: str = ""
    """Of prompting."""
    share: float = 0.0
    """Of the support of prompting."""


@dataclass
class Embedder:
    """Embeddings of one cohort, each read or computed once; lines of who lacks an image or a connectome are NaN."""

    cohort: PromptCohort
    workspace: Path
    progress: Progress = lambda note: None
    _kept: dict[tuple[str, Side], tuple[Floats, Floats]] = field(default_factory=dict)

    def of(self, source: PairSource, side: Side) -> tuple[Floats, Floats]:
        """Return the pooled features (N, C) and the embeddings (N, D)."""
        if (source.weights, side) not in self._kept:
            self._kept[source.weights, side] = self._embed(source, side)
        return self._kept[source.weights, side]

    def _embed(self, source: PairSource, side: Side) -> tuple[Floats, Floats]:
        def done(count: int, total: int) -> None:
            self.progress(f"{source.name}: {side} {count} of {total} embedded")

        here = self.cohort.has_image if side == "image" else self.cohort.has_network
        everybody = self.cohort.everybody
        cases = everybody.part(here).cases
        (features, embedded), _ = pair_embeddings(
            source, everybody.store, cases, side, self.workspace / "embeddings", done
        )
        return spread(features, here), spread(embedded, here)


def spread(values: npt.NDArray[Any], here: Bools) -> Floats:
    """Return values (M, ...) of some of N subjects as an array (N, ...), NaN for the others."""
    found = np.full((len(here), *values.shape[1:]), np.nan)
    found[here] = values
    return found


def fitted_seed(
    cohort: PromptCohort, row: str, made_from: Sequence[object], features: Callable[[], Sequence[Floats]], here: Bools
) -> Seed:
    """Return a seed of linear probes: fitted on whoever has the features, scored on those of them with an image."""

    def predict(own: ProbeCohort) -> Floats:
        part = own.part(here)
        return spread(np.mean([probe_features(values[here], part, row) for values in features()], axis=0), here)

    return Seed([*made_from, RULES_VERSION, cohort.roles_digest], predict, here & cohort.has_image)
