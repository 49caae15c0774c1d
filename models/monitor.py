"""An early look at collapse: do different cases get different features, and two views of one case similar ones?

Measured at every validation of a pre-training on the pooled stage-4 features of all validation cases together, which
the validation has computed anyway. What the contrast compares (`embedding_*`) is behind its projector and is measured
batch by batch; these are the features that downstream tasks use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import AnatCLConfig, BrainMVPConfig, CINPConfig, CropContrastConfig, MaskedCropsConfig
from models.networks.build import pool
from models.objectives.contrast import collapse_metrics

TWO_VIEWS = (BrainMVPConfig, MaskedCropsConfig, CropContrastConfig, AnatCLConfig)
"""Of the objectives whose validation encodes two views of every case: all first views, then all second ones."""
ONE_VIEW = (CINPConfig,)
"""Of the objectives whose validation encodes every case once as it is, or, without connectomes, not at all."""
LEAST_CASES = 4
"""With fewer cases a low rank says nothing."""

Views = tuple[Tensor, ...]
"""Pooled stage-4 features (cases, C) of the first and, where there are any, of the second views."""


@contextmanager
def pooled_features(encoder: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the last stage of every call of the encoder inside the block: means over positions (B, C), float32."""
    pooled: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, outputs: Sequence[Tensor]) -> None:
        pooled.append(pool([outputs[-1].detach().float()]))

    handle = encoder.register_forward_hook(keep)
    try:
        yield pooled
    finally:
        handle.remove()


def split_views(pooled: Sequence[Tensor]) -> Views:
    """Return the first and the second views of a batch, on the CPU; one call of the encoder for both, or two."""
    one, two = torch.cat(list(pooled)).cpu().chunk(2)
    return one, two


def feature_metrics(parts: Sequence[Views]) -> dict[str, float]:
    """Return `feature_rank`, `feature_alignment` and `feature_uniformity` over the cases of all batches and ranks.

    Of L2-normalised features. Rank: exp of the entropy of the singular values, from 1 (all cases alike) to the smaller
    of cases and channels (Roy and Vetterli 2007; RankMe, Garrido et al. 2023). Alignment and uniformity: Wang and
    Isola 2020. No alignment without second views; nothing for fewer than two cases.
    """
    views = [F.normalize(torch.cat(list(view)), dim=1) for view in zip(*parts, strict=True)]
    if not views or len(views[0]) < 2:
        return {}
    found = {name.replace("embedding", "feature"): x for name, x in collapse_metrics(views[0], views[-1]).items()}
    return {name: value for name, value in found.items() if len(views) > 1 or name != "feature_alignment"}


def collapse_warning(metrics: dict[str, float], cases: int, limit: float) -> str:
    """Return what to tell people when the features have collapsed, else an empty string."""
    rank = metrics.get("feature_rank")
    if rank is None or rank >= limit or cases < LEAST_CASES:
        return ""
    return (
        f"features may have collapsed: the effective rank over {cases} validation cases is {rank:.2f}, below "
        f"rank_limit {limit:g}; look at feature_uniformity and the reconstructions, or lower optimiser.lr"
    )
