"""Contrasts of two views, with negatives from all ranks and gradient through the gathering.

Sources: InfoNCE of BrainMVP (reference code): cosine similarities, mean of both directions, positives on the diagonal;
NT-Xent of SimCLR.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
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


def alone(local: Tensor) -> Tensor:
    """Return what `gather` returns in a single process."""
    return local[None]


def check_two_cases(cases: int, on_ranks: int) -> None:
    """Raise ValueError when a micro-batch of so many cases on so many ranks has no negative."""
    if cases * on_ranks < 2:
        raise ValueError(
            f"the contrast needs at least 2 cases a micro-batch (that of one is 0), got {cases} on "
            f"{on_ranks} rank; raise batch_size or the number of ranks"
        )


@dataclass(frozen=True)
class Compared:
    """Two views of B cases, all first ones, then all second ones, beside those of all candidates."""

    logits: Tensor
    """Cosine / temperature (2B, candidates)."""
    keep: Tensor
    """False where a view meets itself (2B, candidates)."""
    rows: Tensor
    """0 .. 2B - 1."""
    other: Tensor
    """Place of each view's counterpart among the candidates (2B,)."""
    join: Callable[[Tensor], Tensor]
    """Local tensor -> (ranks, ...)."""

    def same_person(self, identity_B: Tensor) -> Tensor:
        """Return where a candidate is another image of the anchor's person, which must not be repelled."""
        identity = identity_B.repeat(2)
        same = identity[:, None] == self.join(identity).flatten()[None]
        same[self.rows, self.other] = False
        return same


def compare_views(embeddings_2BD: Tensor, temperature: float, across_ranks: bool = False) -> Compared:
    """Compare L2-normalised embeddings with each other, or with those of all ranks; call it without autocast."""
    join, count = gather if across_ranks else alone, len(embeddings_2BD)
    rows = torch.arange(count, device=embeddings_2BD.device)
    first = count * (dist.get_rank() if across_ranks and ranks() > 1 else 0)
    logits = embeddings_2BD @ join(embeddings_2BD).flatten(0, 1).T / temperature
    keep = torch.ones_like(logits, dtype=torch.bool)
    keep[rows, first + rows] = False
    return Compared(logits, keep, rows, first + (rows + count // 2) % count, join)


def nt_xent(embeddings_2BD: Tensor, identity_B: Tensor, temperature: float, across_ranks: bool = False) -> Tensor:
    """Return NT-Xent of SimCLR (Chen et al., ICML 2020): the mean cross-entropy of each view's counterpart among all
    other views. Other images of the same person are no candidates."""
    with torch.autocast(embeddings_2BD.device.type, enabled=False):
        views = compare_views(embeddings_2BD, temperature, across_ranks)
        kept = views.keep & ~views.same_person(identity_B)
        return F.cross_entropy(views.logits.masked_fill(~kept, -torch.inf), views.other)


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
