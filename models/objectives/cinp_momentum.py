"""Momentum encoders and a queue for CINP's contrast: slow copies make the candidates and soften the targets.

Source: ALBEF (Li et al., NeurIPS 2021): momentum 0.995, soft targets with a share of 0.4 that grows over the first
epoch, a queue of embeddings of earlier batches. Shapes: B local cases, G cases of all ranks, K entries of the queue, D
the width of embeddings.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from models.config_cinp import CINPConfig
from models.objectives.matching import Candidates

NOBODY = -1
"""Identity of an entry of the queue that is free, or of a case without a connectome."""


class SlowPair(nn.Module):
    """Moving averages of both encoders and projections, and the queue. All of it is part of a checkpoint.

    The averages are parameters without gradient: unlike buffers they are not sent to the ranks at every step.
    """

    queue: Tensor
    people: Tensor
    place: Tensor
    followed: Tensor

    def __init__(self, fast: Any, settings: CINPConfig) -> None:
        super().__init__()
        self.momentum = settings.momentum
        self.encoder = copy.deepcopy(fast.encoder)
        self.network_encoder = copy.deepcopy(fast.network_encoder)
        self.image_projection = copy.deepcopy(fast.image_projection)
        self.network_projection = copy.deepcopy(fast.network_projection)
        self.requires_grad_(False)
        self.register_buffer("queue", torch.zeros(2, settings.queue, settings.embedding_dim))
        self.register_buffer("people", torch.full((settings.queue,), NOBODY))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.register_buffer("followed", torch.tensor(-1))

    @torch.no_grad()
    def follow(self, fast: nn.Module, step: int) -> None:
        """Move the averages towards the trained weights, once a step, whatever the number of micro-batches."""
        if step > int(self.followed):
            for name, slow in self.named_parameters():
                slow.lerp_(fast.get_parameter(name), 1 - self.momentum)
            self.followed.fill_(step)

    @torch.no_grad()
    def become(self, fast: nn.Module) -> None:
        """Take the trained weights as they are: after pre-trained ones were loaded."""
        for name, slow in self.named_parameters():
            slow.copy_(fast.get_parameter(name))

    def with_queue(self, everyone_2GD: Tensor, known: Candidates) -> tuple[Tensor, Candidates]:
        """Return the embeddings (2, G + K, D) of the cases of this batch and of earlier ones, and who they are."""
        identity = torch.cat([known.identity, self.people])
        paired = torch.cat([known.paired, self.people != NOBODY])
        wide = Candidates(identity, paired, known.me, known.parts)
        return torch.cat([everyone_2GD, self.queue], dim=1), wide

    @torch.no_grad()
    def push(self, everyone_2GD: Tensor, known: Candidates) -> None:
        """Put the cases of this batch where the oldest ones are; those without a connectome take a place, too."""
        count = len(known.identity)
        if len(self.people):
            places = slice(int(self.place), int(self.place) + count)
            self.queue[:, places] = everyone_2GD
            self.people[places] = torch.where(known.paired, known.identity, NOBODY)
            self.place.copy_((self.place + count) % len(self.people))


def soft_contrast(logits_BC: Tensor, teacher_BC: Tensor, candidates: Candidates, share: float) -> Tensor:
    """Return the cross-entropy (B,) of logits with targets that are, to a share, the softmax of the slow pair's logits
    and else the own counterpart; candidates as in `models.objectives.matching.contrast`."""
    keep = candidates.kept
    targets = share * teacher_BC.masked_fill(~keep, -torch.inf).softmax(1)
    targets = targets.scatter_add(1, candidates.me[:, None], torch.full_like(targets[:, :1], 1 - share))
    log_shares = logits_BC.masked_fill(~keep, -torch.inf).log_softmax(1)
    return -(targets * log_shares.masked_fill(~keep, 0)).sum(1)
