"""What people see of CINP while it trains: retrieval, matching, collapse, reconstructions, similarities."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.networks.vit import patch_grid, patches, unpatch, zscore
from models.objectives.base import Batch, Metrics
from models.objectives.contrast import collapse_metrics
from models.objectives.embedding_pictures import matrices
from models.objectives.matching import Pairs, contrast
from models.objectives.pictures import middle_slice, montage

if TYPE_CHECKING:
    from models.objectives.cinp import CINP

SHOWN = 4
"""Cases of a picture of reconstructions."""
NEAREST = (1, 5)


def pair_metrics(pairs: Pairs, logits: Tensor, matched: tuple[Tensor, Tensor] | None = None) -> Metrics:
    """Return (sum, count) over the pairs of a batch of contrast, retrieval and collapse, and, of matching logits and
    classes (3B), loss and accuracy. Nothing for fewer than two pairs.

    Retrieval: the share of cases whose counterpart is among the 1 or 5 most similar of the batch, where other sessions
    of the person are no candidates; its chance is 1 over the candidates. `matching_balanced` is the mean of the
    accuracies of pairs and of hard negatives; without skill it is 0.5.
    """
    known = pairs.candidates
    mine = known.paired[known.me]
    count = mine.sum().float()
    if int(count) < 2:
        return {}
    losses = (contrast(logits[0], known) + contrast(logits[1], known)) / 2
    found: Metrics = {"loss_contrast": (losses[mine].sum(), count)}
    candidates = known.others.sum(1)[mine] + 1
    found["retrieval_chance"] = ((1 / candidates).sum(), count)
    for name, scores in zip(("image_to_network", "network_to_image"), logits, strict=True):
        own = scores.gather(1, known.me[:, None])
        # Whoever is as similar stands before: equal embeddings retrieve nothing, and neither does NaN.
        before = (~(scores < own) & known.others).sum(1)[mine]
        for most in NEAREST:
            found[f"retrieval_{name}_top{most}"] = ((before < most).float().sum(), count)
    images, networks = pairs.encoded.embeddings[:, mine]
    values = collapse_metrics(images, networks)
    other = collapse_metrics(networks, images)
    values |= {f"{name}_networks": other[name] for name in ("embedding_uniformity", "embedding_rank")}
    found |= {name: (value * count, count) for name, value in values.items()}
    if matched is not None and bool(known.matched.any()):
        found |= _matching(matched, mine)
    return found


def _matching(matched: tuple[Tensor, Tensor], mine: Tensor) -> Metrics:
    logits, target = matched
    errors = torch.nn.functional.cross_entropy(logits, target, reduction="none").view(3, -1)[:, mine]
    right = (logits.argmax(1) == target).float().view(3, -1)[:, mine]
    count = mine.sum().float()
    return {
        "loss_matching": (errors.mean(0).sum(), count),
        "matching_accuracy": (right.mean(0).sum(), count),
        "matching_balanced": ((right[0] / 2 + right[1:].mean(0) / 2).sum(), count),
    }


def reconstructions(objective: CINP, batch: Batch) -> NDArray[np.uint8]:
    """Return input, visible patches and output of some cases, a row each, as axial middle slices.

    In the output visible patches are the input's. Patches that were predicted without their mean and spread get those
    of the input; the background stays black.
    """
    few = {name: value[:SHOWN] for name, value in batch.items()}
    patch, image = objective.encoder.config.patch, few["image"][:, None]
    grid = patch_grid(image, patch)
    predicted, _, hidden = objective.reconstruct(few)
    seen = objective.encoder.standardised(image)
    true = patches(seen, patch)
    if objective.settings.normalise_patches:
        predicted = predicted * true.std(2, keepdim=True, correction=0) + true.mean(2, keepdim=True)
    output = unpatch(torch.where(hidden[:, :, None], predicted, true), grid, patch)
    if objective.encoder.config.standardise == "zscore":
        _, mean, deviation = zscore(image)
        output = output * deviation + mean
    output = torch.where(image > 0, output, 0)
    visible = unpatch(patches(image, patch) * ~hidden[:, :, None], grid, patch)
    rows = [[middle_slice(volume[case, 0]) for volume in (image, visible, output)] for case in range(len(image))]
    return montage(rows, titles=("input", "visible", "output"))


def similarity_matrix(pairs: Pairs) -> NDArray[np.uint8]:
    """Return the cosines of images (rows) and networks (columns) of the pairs of a batch, -1 black and 1 white."""
    mine = pairs.candidates.paired[pairs.candidates.me]
    images, networks = pairs.encoded.embeddings[:, mine]
    return matrices({"cosine": (images @ networks.T + 1) / 2})
