"""Symmetric InfoNCE between two views, with negatives from all ranks and gradient through the gathering.

Source: BrainMVP's contrast (reference code): cosine similarities, mean of both directions, positives on the diagonal.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _Gather(torch.autograd.Function):
    """All ranks' tensors, stacked; the gradient of a rank's tensor is summed over the losses of all ranks."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)  # autograd's own must not be written to
        dist.all_reduce(total)
        return total[dist.get_rank()]


def ranks() -> int:
    """Return the number of ranks that `gather` joins."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(local: Tensor) -> Tensor:
    """Return the tensors of all ranks as (ranks, ...), with gradient; (1, ...) in a single process.

    Every rank must call it at the same place with the same shape. With the mean that DDP takes over ranks, the
    gradient is that of the mean loss over the global batch.
    """
    return _Gather.apply(local) if ranks() > 1 else local[None]


def identity_of(dataset: str, subject: str, person: str = "") -> int:
    """Return a number in 0..2^63-1 that is equal for, and practically only for, images of one person.

    person: what all subjects of a person share, over datasets; empty for a subject that stands alone.
    """
    digest = hashlib.sha256((person or f"{dataset}\n{subject}").encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def info_nce(
    one_BD: Tensor, two_BD: Tensor, identity_B: Tensor, temperature: float, across_ranks: bool = False
) -> Tensor:
    """Return the mean symmetric InfoNCE loss of B pairs of L2-normalised embeddings.

    Other samples with the same identity are the same person, so they are no negatives. The loss of a single case
    is 0: use two or more. `across_ranks` takes the other views of all ranks as candidates. Similarities keep the
    precision of the embeddings under autocast: in bf16 a logit of 10 would be known to 0.03 only.
    """
    views, identities, offset = torch.stack([one_BD, two_BD])[None], identity_B[None], 0
    if across_ranks:
        views, identities = gather(views[0]), gather(identity_B)
        offset = one_BD.shape[0] * (dist.get_rank() if len(views) > 1 else 0)
    candidates = views.transpose(0, 1).flatten(1, 2)  # (2, ranks x B, D)
    target = torch.arange(len(one_BD), device=one_BD.device) + offset
    same = identity_B[:, None] == identities.flatten()[None]
    same[torch.arange(len(one_BD), device=one_BD.device), target] = False
    directions = ((one_BD, candidates[1]), (two_BD, candidates[0]))
    with torch.autocast(one_BD.device.type, enabled=False):
        losses = [
            F.cross_entropy((anchor @ others.T / temperature).masked_fill(same, -torch.inf), target)
            for anchor, others in directions
        ]
    return (losses[0] + losses[1]) / 2


@torch.no_grad()
def collapse_metrics(one_BD: Tensor, two_BD: Tensor) -> dict[str, float]:
    """Return alignment, uniformity (Wang and Isola 2020) and effective rank (Roy and Vetterli 2007) of a batch.

    Alignment: mean squared distance of positives (0 is best). Uniformity: log mean exp(-2 d^2) over different cases
    (0: all embeddings coincide). Effective rank: exp of the entropy of the singular values, from 1 (collapsed) to B.
    """
    values = torch.linalg.svdvals(one_BD.float())
    share = values / values.sum().clamp_min(1e-12)
    distances = torch.pdist(one_BD.float()).square()
    return {
        "embedding_alignment": (one_BD - two_BD).square().sum(1).mean().item(),
        "embedding_uniformity": torch.exp(-2 * distances).mean().log().item() if len(distances) else 0.0,
        "embedding_rank": torch.exp(-(share * share.clamp_min(1e-12).log()).sum()).item(),
    }
