"""Embeddings of images and connectomes by the two encoders of one training, kept by case as other embeddings are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from models.config_cinp import CINPConfig
from models.export import NotFinishedError, read_done
from models.finished import read_settings
from models.records import SelectedCase, digest_of
from tasks.embeddings import RULES_VERSION, EncoderSource, Vectors, by_dataset, kept_vectors, trained_encoder
from tasks.prompting import PromptError

if TYPE_CHECKING:
    from models.embed_networks import FrozenPair
    from models.store import Store, StoredDataset

Side = Literal["image", "network"]
COLUMNS = ("features", "embedding")
"""Pooled features before the projection, and unit embeddings after it."""


@dataclass(frozen=True)
class PairSource:
    """A finished training whose encoders of images and connectomes share a space."""

    encoder: EncoderSource
    """Of its images."""

    @property
    def name(self) -> str:
        """Of the training."""
        return self.encoder.name

    @property
    def weights(self) -> str:
        """Digest of all weights."""
        return self.encoder.weights

    @cached_property
    def pair(self) -> FrozenPair:
        """Both encoders with their projections, in eval mode; raises what `load_pair` raises."""
        from models.embed_networks import load_pair

        assert self.encoder.folder is not None
        return load_pair(self.encoder.folder)

    @property
    def temperature(self) -> float:
        """Of the softmax, as the training left it."""
        return float(self.pair.temperature)


def trained_pair(folder: Path) -> PairSource:
    """Return the encoders of a finished CINP training.

    Raises NotFinishedError for a folder that is no finished training, PromptError for a training without an encoder of
    connectomes.
    """
    if read_done(folder) is None:
        raise NotFinishedError(f"{folder} has no done.json: it is no finished training; run it to its end")
    config, _ = read_settings(folder)
    if not isinstance(config.objective, CINPConfig) or not config.objective.uses_networks:
        raise PromptError(
            f"training {folder.name} (recipe {config.recipe!r}) has no encoder of connectomes, so nothing can be "
            "prompted with it; name a training of recipe cinp under `rows`, and this one under `image_only`"
        )
    return PairSource(trained_encoder(folder))


def check_pair(source: PairSource, store: Store, modalities: Sequence[str]) -> None:
    """Raise PairError for a store without connectomes, of another atlas, or of other images than the training's.

    Raises PromptError when the training embeds another modality than one of `modalities`.
    """
    from models.embed_networks import check_store

    check_store(source.pair, store.spec, f"the store {store.url}")
    if others := [name for name in modalities if name != source.pair.modality]:
        raise PromptError(
            f"training {source.name} embeds {source.pair.modality}, a task asks for {others[0]}; prompt with a "
            "training on that modality"
        )


def pair_embeddings(
    source: PairSource,
    store: Store,
    cases: Sequence[SelectedCase],
    side: Side,
    folder: Path,
    done: Callable[[int, int], None] = lambda count, total: None,
) -> tuple[Vectors, int]:
    """Return the pooled features (N, C) and unit embeddings (N, D) of the cases, and how many were computed now.

    Every case needs an image, or a connectome, by `side`. Kept in one file a training and side below `folder`.
    """

    def compute(missing: Sequence[SelectedCase]) -> Vectors:
        return by_dataset(store, missing, embed, done)

    def embed(dataset: StoredDataset, rows: Sequence[int], count: Callable[[int], None]) -> Vectors:
        from models.embed_networks import embed_connectomes, embed_images

        made = (embed_images if side == "image" else embed_connectomes)(source.pair, dataset, rows, count)
        return made.features, made.embeddings

    key = digest_of(["pair", side, source.weights, store.spec.content_digest(), RULES_VERSION])
    about = {"encoder": source.name, "weights": source.weights, "side": side}
    return kept_vectors(folder / f"{key[:24]}.parquet", cases, COLUMNS, compute, about)
