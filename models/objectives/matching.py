"""The pair losses of CINP: contrast with given candidates, and hard negatives drawn by similarity.

Source: ALBEF (Li et al., NeurIPS 2021). Shapes: B local cases (anchors), G candidates (the local cases, or those of all
ranks), N image tokens, T network tokens, D the width of embeddings. A case that is not `paired` has no connectome.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.objectives.base import Batch


@dataclass(frozen=True)
class Candidates:
    """All cases that anchors are compared with, and which of them the anchors are."""

    identity: Tensor
    """Person (G,)."""
    paired: Tensor
    """Has image and connectome (G,) bool."""
    me: Tensor
    """Places of the anchors (B,)."""
    parts: int
    """Ranks whose mean loss is the loss; 1 when the candidates are local."""

    @property
    def others(self) -> Tensor:
        """Return where a candidate is a pair of another person (B, G)."""
        return (self.identity[self.me][:, None] != self.identity[None]) & self.paired[None]

    @property
    def kept(self) -> Tensor:
        """Return what an anchor is contrasted with (B, G): itself and the pairs of other people."""
        keep = self.others
        keep[torch.arange(len(keep), device=keep.device), self.me] = True
        return keep

    @property
    def contrasted(self) -> Tensor:
        """Return which candidates count in the contrast (G,): pairs, when there are two or more."""
        return self.paired & (self.paired.sum() > 1)

    @property
    def matched(self) -> Tensor:
        """Return which candidates have a hard negative (G,): pairs, when there are pairs of two or more people."""
        first = self.identity[self.paired.int().argmax()]
        return self.paired & (self.paired & (self.identity != first)).any()

    def mean(self, values_B: Tensor, counted_G: Tensor) -> Tensor:
        """Return the mean of the anchors' values over all that count (G or more); its mean over ranks is that of all.

        0, with a gradient of 0, when none counts.
        """
        weights = counted_G[self.me] * (self.parts / counted_G.sum().clamp_min(1))
        return (values_B * weights).sum()


class Encoded(NamedTuple):
    """Tokens and embeddings of a batch."""

    image: Tensor
    """Tokens (B, N, W)."""
    network: Tensor
    """Tokens (B, T, W'), the first stands for the connectome."""
    absent: Tensor
    """Tokens of missing regions (B, T) bool."""
    embeddings: Tensor
    """L2-normalised, float32, of images and of networks (2, B, D)."""


def encode_both(parts: Any, batch: Batch) -> Encoded:
    """Encode whole images and connectomes with the encoders and projections of an objective, or with their copies."""
    image = parts.encoder(batch["image"][:, None])[-1].flatten(2).transpose(1, 2)
    network, absent = parts.network_encoder(batch["network"])
    both = parts.image_projection(image.mean(1)).float(), parts.network_projection(network[:, 0]).float()
    return Encoded(image, network, absent, F.normalize(torch.stack(both), dim=2))


@dataclass(frozen=True)
class Pairs:
    """The encoded cases of a batch."""

    encoded: Encoded
    everyone: Tensor
    """L2-normalised embeddings of all candidates (2, G, D): images, then networks."""
    candidates: Candidates
    join: Callable[[Tensor], Tensor]
    """Local tensor -> (ranks, ...), with gradient."""


def contrast(logits_BG: Tensor, candidates: Candidates) -> Tensor:
    """Return the cross-entropy (B,) of each anchor's counterpart among itself and the pairs of other people."""
    return F.cross_entropy(logits_BG.masked_fill(~candidates.kept, -torch.inf), candidates.me, reduction="none")


@torch.no_grad()
def hard_negatives(logits_BG: Tensor, candidates: Candidates, pick_B: Tensor) -> Tensor:
    """Return a candidate (B,) for each anchor, drawn from the softmax of its logits over pairs of other people.

    pick: numbers in [0, 1), the place in the cumulated probabilities; so a draw does not depend on the ranks. No
    gradient. An anchor without another person gets itself.
    """
    others = candidates.others
    some = others.any(1)
    logits = logits_BG.double().masked_fill(~others & some[:, None], -torch.inf)
    cumulated = logits.softmax(1).cumsum(1)
    drawn = torch.searchsorted(cumulated, (pick_B.double() * cumulated[:, -1])[:, None], right=True)[:, 0]
    return torch.where(some, drawn.clamp_max(len(candidates.identity) - 1), candidates.me)


def triples(pairs: Pairs, image_BNW: Tensor, network_B: Tensor, image_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return network tokens, what is absent, and image tokens of 3 B combinations: the cases themselves, their images
    with other networks, their networks with other images.

    image_BNW: image tokens as the matching takes them; network_B, image_B: places of the others among the candidates.
    """
    own = pairs.encoded
    networks, absent, images = (pairs.join(value).flatten(0, 1) for value in (own.network, own.absent, image_BNW))
    return (
        torch.cat([own.network, networks[network_B], own.network]),
        torch.cat([own.absent, absent[network_B], own.absent]),
        torch.cat([image_BNW, image_BNW, images[image_B]]),
    )
