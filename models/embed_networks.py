"""Frozen halves of a finished CINP training: embeddings of images and of connectomes in one space.

pair = load_pair("work/trainings/cinp_tiny")
images = embed_images(pair, store.dataset("abide"), rows)
networks = embed_connectomes(pair, store.dataset("abide"), rows)
cosines = images.embeddings @ networks.embeddings.T
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models.config_cinp import CINPConfig, ViT3DConfig
from models.connectomes import MEANING, ConnectomeSpec, unlike_connectomes
from models.embed import embed_cases, inference_device
from models.finished import ENCODER, FinishedTraining, read_training
from models.networks.build import build_encoder
from models.networks.connectome import NetworkEncoder, build_network_encoder
from models.spec import PreprocessSpec, unlike_images
from models.store import StoredDataset

BATCH = 32
"""Connectomes in one forward pass: the result does not depend on it."""

Floats = NDArray[np.float32]
Done = Callable[[int], None]


class PairError(ValueError):
    """A training that has no pair of encoders, or a store that does not fit one."""


@dataclass(frozen=True)
class Embedded:
    """Embeddings of N images or connectomes, in the order that was asked for."""

    features: Floats
    """Of the encoder (N, width): the mean over an image's tokens; [CLS] of a connectome."""
    embeddings: Floats
    """Behind the projection (N, D), L2-normalised: what the contrast compares."""


@dataclass(frozen=True)
class FrozenPair:
    """Both encoders and projections of a training, in eval mode, on the CPU."""

    name: str
    weights: str
    """Digest of the training's weights."""
    spec: PreprocessSpec
    """That it was trained with."""
    modality: str
    network: ViT3DConfig
    encoder: nn.Module
    image_projection: nn.Linear
    network_encoder: NetworkEncoder
    network_projection: nn.Linear
    temperature: float
    """That was learned; cosine / temperature are the logits of the contrast."""

    @property
    def connectome(self) -> ConnectomeSpec:
        """Return how the connectomes that it was trained on were made."""
        assert self.spec.connectome is not None
        return self.spec.connectome


def load_pair(training: str | Path) -> FrozenPair:
    """Return the frozen halves of a finished CINP training.

    Raises NotFinishedError when it is not finished or its weights were changed, PairError for another method and for
    a training without connectomes, RuntimeError naming the first key when weights and config do not belong together.
    """
    finished = read_training(training)
    config, spec = finished.config, finished.spec
    settings, network = config.objective, config.network
    if not isinstance(settings, CINPConfig) or not isinstance(network, ViT3DConfig):
        raise PairError(f"training {config.name} is a {settings.kind}; only CINP embeds images and connectomes alike")
    if not settings.uses_networks or spec.connectome is None:
        raise PairError(
            f"training {config.name} was trained on images alone (weight_contrast and weight_matching 0): it has no "
            "network encoder; use its image encoder by itself, or train the recipe cinp"
        )
    return FrozenPair(
        name=config.name,
        weights=str(finished.done["weights_digest"]),
        spec=spec,
        modality=settings.modality,
        network=network,
        encoder=_loaded(build_encoder(network), finished, ENCODER),
        image_projection=_loaded(nn.Linear(network.width, settings.embedding_dim), finished, "image_projection."),
        network_encoder=_loaded(
            build_network_encoder(settings.network_encoder, len(spec.connectome.regions)), finished, "network_encoder."
        ),
        network_projection=_loaded(
            nn.Linear(settings.network_encoder.width, settings.embedding_dim), finished, "network_projection."
        ),
        temperature=float(finished.tensors["temperature"]),
    )


def _loaded(part: Any, finished: FinishedTraining, prefix: str) -> Any:
    part.load_state_dict(finished.part(prefix))
    return part.eval()


def check_store(pair: FrozenPair, spec: PreprocessSpec, what: str) -> None:
    """Raise PairError naming the first difference between the training's connectomes or images and those of a spec.

    what: the store, for the message. The grid of images may differ, and how frames are chosen.
    """
    if spec.connectome is None:
        raise PairError(f"{what} has no connectomes: its spec {spec.name!r} asks for none; use a spec like cinp")
    if differs := unlike_images(pair.spec, spec) or unlike_connectomes(pair.connectome, spec.connectome):
        sides = (pair.connectome, spec.connectome) if differs in MEANING else (pair.spec, spec)
        one, other = (getattr(side, differs) for side in sides)
        values = f" ({one!r} and {other!r})" if differs != "regions" else f" ({len(one)} and {len(other)} of them)"
        raise PairError(
            f"training {pair.name} and {what} differ in {differs}{values}; an encoder is valid on data made like its "
            "own only: preprocess with the spec of the training, or pre-train on this store"
        )


def embed_images(
    pair: FrozenPair, dataset: StoredDataset, rows: Sequence[int], done: Done = lambda count: None
) -> Embedded:
    """Return the embeddings of the images of stored rows, seen at the size that the training saw.

    `done` is told how many cases are finished. Raises PairError for a store of another spec or without the modality,
    ValueError naming a case whose embedding is not finite.
    """
    check_store(pair, dataset.spec, f"the store {dataset.url}")
    if pair.modality not in dataset.spec.modalities:
        raise PairError(f"the store {dataset.url} has no modality {pair.modality!r}, which {pair.name} embeds")
    channel = dataset.spec.modalities.index(pair.modality)
    features = embed_cases(pair.encoder, dataset, rows, [channel], pair.network.image_size, done)
    return _projected(torch.from_numpy(features), pair.image_projection)


def embed_connectomes(
    pair: FrozenPair, dataset: StoredDataset, rows: Sequence[int], done: Done = lambda count: None
) -> Embedded:
    """Return the embeddings of the connectomes of stored rows.

    Raises PairError for a store of another spec, StoreError naming a case that has no connectome.
    """
    check_store(pair, dataset.spec, f"the store {dataset.url}")
    return embed_matrices(pair, np.stack([dataset.read_connectome(row) for row in rows]), done)


def embed_matrices(pair: FrozenPair, matrices_NRR: Floats, done: Done = lambda count: None) -> Embedded:
    """Return the embeddings of connectomes made like those of the training; NaN rows and columns: missing regions.

    Raises PairError for another number of regions and for embeddings that are not finite.
    """
    regions = len(pair.connectome.regions)
    if matrices_NRR.ndim != 3 or matrices_NRR.shape[1:] != (regions, regions):
        raise PairError(
            f"training {pair.name} embeds connectomes of {regions} regions (atlas {pair.connectome.atlas!r}), got "
            f"matrices of shape {matrices_NRR.shape}"
        )
    device = inference_device()
    encoder, found = pair.network_encoder.to(device).eval(), []
    with torch.inference_mode():
        for start in range(0, len(matrices_NRR), BATCH):
            matrices = torch.from_numpy(matrices_NRR[start : start + BATCH]).float().to(device)
            found.append(encoder(matrices)[0][:, 0].float().cpu())
            done(min(start + BATCH, len(matrices_NRR)))
    features = torch.cat(found)
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features).all(1)).nonzero()[0])
        raise PairError(f"the embedding of connectome {bad} is not finite; infinite values are no correlations")
    return _projected(features, pair.network_projection)


@torch.inference_mode()
def _projected(features_NW: Tensor, projection: nn.Linear) -> Embedded:
    embeddings = F.normalize(projection.cpu()(features_NW), dim=1)
    return Embedded(features_NW.numpy(), embeddings.numpy())
