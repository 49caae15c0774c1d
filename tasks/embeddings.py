"""Embeddings of stored cases, kept by what they were made from: encoder weights, network, modality, case digest."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from infra.storage import write_bytes
from models.config import AnyNetwork, BrainMVPConfig, CropContrastConfig, MaskedCropsConfig, SupervisedConfig
from models.export import NotFinishedError, read_done
from models.finished import read_settings
from models.records import SelectedCase, digest_of
from models.spec import PreprocessSpec, unlike_images
from tasks.scores import read_kept

if TYPE_CHECKING:
    from models.networks.build import Encoder
    from models.store import Store, StoredDataset

Vectors = tuple[NDArray[np.float32], ...]
"""Arrays (N, dim) that have a line for each of the same cases."""

CROPPED = BrainMVPConfig | MaskedCropsConfig | CropContrastConfig
"""Settings of pre-trainings that see crops of an image, never the whole of it."""
RULES_VERSION = 1
"""Raised when the way from image to embedding changes, so that kept embeddings are computed again."""


class EmbeddingError(ValueError):
    """An encoder and a store that do not fit together."""


@dataclass(frozen=True)
class EncoderSource:
    """Where a frozen encoder comes from."""

    name: str
    network: AnyNetwork
    weights: str
    """Digest of the weights, or what they are a function of."""
    folder: Path | None = None
    """Of a finished or imported training; None: randomly initialised."""
    seed: int = 0
    """Of a random initialisation."""
    spec: PreprocessSpec | None = None
    """That it was trained with; None: any."""
    modalities: tuple[str, ...] = ()
    """Input channels of a fine-tuned network; empty: one channel, each modality of the benchmark by itself."""
    window: tuple[int, int, int] | None = None
    """Voxels of the crops that it was trained on: such windows are embedded and averaged. None: the whole image."""

    @property
    def made_from(self) -> str:
        """What decides its embeddings of an image."""
        return f"{self.weights} in windows {list(self.window)}" if self.window else self.weights

    def load(self) -> Encoder:
        """Return the encoder in eval mode; raises NotFinishedError when the training's weights were changed."""
        from models.encoder import load_encoder
        from models.networks.build import build_encoder

        if self.folder is not None:
            return load_encoder(self.folder)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return build_encoder(self.network).eval()


def trained_encoder(folder: Path) -> EncoderSource:
    """Return the encoder of a finished or imported training; raises NotFinishedError for another folder."""
    done = read_done(folder)
    if done is None:
        raise NotFinishedError(
            f"{folder} has no done.json: it is no finished training; run it to its end, or import its weights"
        )
    config, spec = read_settings(folder)
    modalities = config.objective.modalities if isinstance(config.objective, SupervisedConfig) else ()
    window = config.data.crop if isinstance(config.objective, CROPPED) else None
    weights = str(done["weights_digest"])
    return EncoderSource(folder.name, config.network, weights, folder, 0, spec, modalities, window)


def random_encoder(network: AnyNetwork, seed: int) -> EncoderSource:
    """Return a randomly initialised encoder of the same network."""
    weights = f"random {digest_of(network.model_dump(mode='json'))} seed {seed}"
    return EncoderSource(f"random seed {seed}", network, weights, None, seed)


def case_features(
    source: EncoderSource,
    store: Store,
    cases: Sequence[SelectedCase],
    modalities: Sequence[str],
    present: NDArray[np.bool_],
    folder: Path,
    done: Callable[[int, int], None] = lambda count, total: None,
) -> NDArray[np.float32]:
    """Return the features (N, C) of cases with several modalities; `present` (N, M) says who has which.

    An encoder of one channel has learned one modality at a time: each is embedded by itself, and the embeddings stand
    side by side, then a column of 0 and 1 for each modality that some case lacks. What a case lacks is NaN, which a
    probe fills with the median of its training folds. A modality that nobody has is left out. A network fine-tuned on
    several channels sees its own, absent ones as zeros, as it was trained. Errors are those of `embeddings`.
    """
    if source.modalities or len(modalities) == 1:
        return embeddings(source, store, cases, modalities[0], folder, done)[0]
    columns: list[NDArray[np.float32]] = []
    for name, here in zip(modalities, present.T, strict=True):
        if here.any():
            found, _ = embeddings(source, store, list(compress(cases, here)), name, folder, done)
            block = np.full((len(cases), found.shape[1]), np.nan, dtype=np.float32)
            block[here] = found
            columns.append(block)
    varying = present[:, present.any(axis=0) & ~present.all(axis=0)]
    return np.concatenate([*columns, varying.astype(np.float32)], axis=1)


def embeddings(
    source: EncoderSource,
    store: Store,
    cases: Sequence[SelectedCase],
    modality: str,
    folder: Path,
    done: Callable[[int, int], None] = lambda count, total: None,
) -> tuple[NDArray[np.float32], int]:
    """Return the embeddings (N, dim) of cases in their order, and how many of them were computed now.

    Kept in one Parquet file an encoder and modality below `folder`, by case digest: a case that was embedded before is
    read back. `done` is told (finished, to compute). Raises EmbeddingError when the store has another preprocessing
    spec than the training, or lacks the modality.
    """
    channels = channels_of(source, store, modality)
    path = folder / f"{_key(source, store, channels)[:24]}.parquet"

    def compute(missing: Sequence[SelectedCase]) -> Vectors:
        return (_compute(source, store, missing, channels, done),)

    (values,), fresh = kept_vectors(
        path, cases, ("embedding",), compute, {"encoder": source.name, "weights": source.weights}
    )
    return values, fresh


def kept_vectors(
    path: Path,
    cases: Sequence[SelectedCase],
    columns: Sequence[str],
    compute: Callable[[Sequence[SelectedCase]], Vectors],
    about: Mapping[str, str],
) -> tuple[Vectors, int]:
    """Return one array (N, dim) a column with a line for each case, and how many cases were computed now.

    Kept at `path` by case digest; `compute` makes the arrays of the cases that are not there. What a file was made from
    decides its name; `about` is only told to who reads it. A file that cannot be read is made again.
    """
    kept = _read(path, columns)
    missing = [case for case in cases if case.digest not in kept]
    if missing:
        made = compute(missing)
        kept |= {case.digest: line for case, *line in zip(missing, *made, strict=True)}
        _write(path, kept, columns, about)
    lines = [kept[case.digest] for case in cases]
    return tuple(np.stack(column) for column in zip(*lines, strict=True)), len(missing)


def channels_of(source: EncoderSource, store: Store, modality: str) -> list[int]:
    """Return the store's channels that an encoder is given; raises EmbeddingError where they do not fit together."""
    if source.spec and (differs := unlike_images(source.spec, store.spec)):
        raise EmbeddingError(
            f"training {source.name} and the store {store.url} differ in {differs} (specs {source.spec.name!r} and "
            f"{store.spec.name!r}): an encoder is valid on images like its own only; probe a store of its spec"
        )
    names = source.modalities or (modality,)
    if absent := [name for name in names if name not in store.spec.modalities]:
        raise EmbeddingError(
            f"the store {store.url} has no modality {absent[0]!r}; its spec {store.spec.name!r} has "
            f"{', '.join(store.spec.modalities)}"
        )
    if len(names) != source.network.in_channels:
        raise EmbeddingError(
            f"the encoder of {source.name} takes {source.network.in_channels} channels, the probe gives {len(names)} "
            f"({', '.join(names)})"
        )
    return [store.spec.modalities.index(name) for name in names]


def _key(source: EncoderSource, store: Store, channels: Sequence[int]) -> str:
    network = source.network.model_dump(mode="json")
    made_from = [source.made_from, network, store.spec.content_digest(), list(channels)]
    return digest_of([*made_from, RULES_VERSION])


def _compute(
    source: EncoderSource,
    store: Store,
    cases: Sequence[SelectedCase],
    channels: Sequence[int],
    done: Callable[[int, int], None],
) -> NDArray[np.float32]:
    from models.embed import embed_cases, embed_windows, window_size

    encoder, size = source.load(), source.window or window_size(source.network, store.spec.grid)
    way = embed_windows if source.window else embed_cases

    def embed(dataset: StoredDataset, rows: Sequence[int], count: Callable[[int], None]) -> Vectors:
        return (way(encoder, dataset, rows, channels, size, count),)

    return by_dataset(store, cases, embed, done)[0]


def by_dataset(
    store: Store,
    cases: Sequence[SelectedCase],
    embed: Callable[[StoredDataset, Sequence[int], Callable[[int], None]], Vectors],
    done: Callable[[int, int], None],
) -> Vectors:
    """Return what `embed` makes of the rows of each dataset, in the order of the cases; `done` is told as above."""
    found: dict[SelectedCase, list[NDArray[np.float32]]] = {}
    for dataset in sorted({case.dataset for case in cases}):
        mine, before = [case for case in cases if case.dataset == dataset], len(found)

        def count(finished: int, before: int = before) -> None:
            done(before + finished, len(cases))

        made = embed(store.dataset(dataset), [case.row for case in mine], count)
        found |= {case: line for case, *line in zip(mine, *made, strict=True)}
    return tuple(np.stack(column) for column in zip(*(found[case] for case in cases), strict=True))


def _read(path: Path, columns: Sequence[str]) -> dict[str, list[NDArray[np.float32]]]:
    table = read_kept(path)
    if table is None:
        return {}
    values = [[np.asarray(value, dtype=np.float32) for value in table[name].to_numpy()] for name in columns]
    return {digest: line for digest, *line in zip(table["case_digest"].to_pylist(), *values, strict=True)}


def _write(
    path: Path, kept: dict[str, list[NDArray[np.float32]]], columns: Sequence[str], about: Mapping[str, str]
) -> None:
    digests = sorted(kept)
    values = {name: [kept[digest][place] for digest in digests] for place, name in enumerate(columns)}
    fields = [("case_digest", pa.string()), *((name, pa.list_(pa.float32())) for name in columns)]
    schema = pa.schema(fields).with_metadata(dict(about))
    table = pa.table({"case_digest": digests, **values}, schema=schema)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(str(path), buffer.getvalue())
