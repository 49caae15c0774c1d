"""How alike two subjects are, by age and by anatomy, and the contrast that weighs positives by it.

Sources: y-Aware contrastive learning (Dufumier et al., MICCAI 2021), its exponential and threshold forms (Barbano et
al., ISBI 2023) and AnatCL (Barbano et al., Pattern Recognition Letters 2026). The anatomical similarity is a
reconstruction, because its exact form was not published; see docs/anatcl.md.

Shapes: N anchors, C candidates, M measures, R regions. Unknown values are NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.config_anatcl import Form, Kernel, Negative, Variant


def kernel_of(difference: Tensor, kernel: Kernel, sigma: float) -> Tensor:
    """Return K(d) of differences: rbf exp(-d^2 / (2 sigma^2)); gaussian, the same as a density, with peak
    1 / (sqrt(2 pi) sigma); cauchy 1 / (sigma d^2 + 1). sigma is a width, not a variance."""
    if kernel == "cauchy":
        return 1 / (sigma * difference.square() + 1)
    rbf = torch.exp(-difference.square() / (2 * sigma**2))
    return rbf / (math.sqrt(2 * math.pi) * sigma) if kernel == "gaussian" else rbf


def age_weights(anchors_N: Tensor, candidates_C: Tensor, kernel: Kernel, sigma: float) -> Tensor:
    """Return the kernel (N, C) of the differences of ages in years; 0 where either age is unknown."""
    difference = anchors_N[:, None] - candidates_C[None]
    return torch.nan_to_num(kernel_of(difference, kernel, sigma), nan=0.0)


def anatomical_weights(anchors_NMR: Tensor, candidates_CMR: Tensor, variant: Variant, negative: Negative) -> Tensor:
    """Return how alike two subjects' z-scored descriptors are, (N, C) in 0..1; 0 where they have nothing in common.

    global: for each measure the cosine of the two vectors of regions, over the regions that both have; the mean over
    measures. local: for each region of which both have all measures, the cosine of the two vectors of measures; the
    mean over regions. A negative mean is shifted, (1 + s) / 2 for all, or clamped at 0.
    """
    sides = (anchors_NMR, candidates_CMR)
    if variant == "local":
        sides = tuple(_whole_regions(side).transpose(1, 2) for side in sides)  # type: ignore[assignment]
    similarity, known = _mean_cosine(*sides)
    positive = (1 + similarity) / 2 if negative == "shift" else similarity.clamp_min(0)
    return torch.where(known, positive, 0)


def _whole_regions(values_NMR: Tensor) -> Tensor:
    """Make a region unknown unless all its measures are known."""
    whole = values_NMR.isfinite().all(dim=1, keepdim=True)
    return torch.where(whole, values_NMR, torch.nan)


def _mean_cosine(anchors_NGI: Tensor, candidates_CGI: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over groups G of the cosine over items I that both sides know, and where there is one at all."""
    known_N, known_C = anchors_NGI.isfinite().float(), candidates_CGI.isfinite().float()
    one, other = torch.nan_to_num(anchors_NGI), torch.nan_to_num(candidates_CGI)
    pairs = "ngi,cgi->ncg"
    lengths = torch.einsum(pairs, one.square(), known_C) * torch.einsum(pairs, known_N, other.square())
    cosine = torch.einsum(pairs, one, other) / lengths.sqrt().clamp_min(1e-12)
    common = (torch.einsum(pairs, known_N, known_C) > 0).float()
    groups = common.sum(2)
    return (cosine * common).sum(2) / groups.clamp_min(1), groups > 0


def weighted_contrast(logits_NC: Tensor, weights_NC: Tensor, keep_NC: Tensor, form: Form = "yaware") -> Tensor:
    """Return the mean contrast of N anchors with C candidates, weighted by how alike they are.

    logits: cosine / temperature; keep: False for the anchor itself and for what is no candidate. Of anchor i:

        yaware      - sum_j  (w_ij / sum_k w_ik)  log( exp(s_ij) / sum_t exp(s_it) )
        expw        the denominator is  sum_t exp(s_it (1 - w_it)):  repelled the less, the more alike
        threshold   the denominator is  sum over t with w_it < w_ij of exp(s_it):  repelled are only those less alike

    j, k and t run over what is kept. Nothing is taken off before the weights multiply, so expw has the value of its
    formula. An anchor without any weight, and a pair without a candidate that is less alike, add 0.
    """
    weights = torch.where(keep_NC, weights_NC, 0)
    share = weights / weights.sum(1, keepdim=True).clamp_min(1e-12)
    if form == "threshold":
        terms = _threshold_terms(logits_NC, weights, keep_NC)
    else:
        repelled = logits_NC * (1 - weights) if form == "expw" else logits_NC
        terms = logits_NC - repelled.masked_fill(~keep_NC, -torch.inf).logsumexp(1, keepdim=True)
    return -(share * terms).sum(1).mean()


def _threshold_terms(logits_NC: Tensor, weights_NC: Tensor, keep_NC: Tensor) -> Tensor:
    less_NCC = (weights_NC[:, None] < weights_NC[:, :, None]) & keep_NC[:, None]
    some = less_NCC.any(2)
    # A row without candidates keeps all of them, so that its gradient is 0 instead of NaN; its term is 0.
    candidates = logits_NC[:, None].masked_fill(~less_NCC & some[:, :, None], -torch.inf)
    return torch.where(some, logits_NC - candidates.logsumexp(2), 0)
