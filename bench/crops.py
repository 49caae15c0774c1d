"""One random crop for training: from the store, from a float16 memory map, nnU-Net's layout, and through the chain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench import nnunet
from bench.inputs import DATASET, MODALITIES, Workplace, workplace
from bench.timing import Ratio, Rounds, Target, race
from models.records import Scan
from models.store import StoredDataset, open_store
from tasks import shards
from tasks.preprocess import preprocess_batch

STORE, STORE_16 = "store, to float32", "store, as float16"
PLAIN, PLAIN_16 = "store with codec none, to float32", "store with codec none, as float16"
MEMMAP, MEMMAP_32 = "memmap, as float16", "memmap, to float32"
NNUNET, NNUNET_PAIR = "nnU-Net's blosc2, all channels in a file", "nnU-Net's blosc2, a file of the two channels"
READS = 20
"""Crops in one round."""

Draw = tuple[tuple[int, int], tuple[slice, slice, slice]]
"""Two modalities (indices among those present) and a window."""


def draws(extent: tuple[int, int, int], edge: int, seed: int = 0) -> list[Draw]:
    """Return the random crops of a round: two different modalities, windows inside the extent."""
    if min(extent) < edge:
        raise ValueError(f"a crop of {edge} voxels does not fit an extent of {extent}; use a smaller crop")
    rng = np.random.default_rng(seed)
    out: list[Draw] = []
    for _ in range(READS):
        first, second = (int(i) for i in rng.choice(len(MODALITIES), 2, replace=False))
        x, y, z = (int(rng.integers(0, n - edge + 1)) for n in extent)
        out.append(((first, second), (slice(x, x + edge), slice(y, y + edge), slice(z, z + edge))))
    return out


def measure(
    folder: Path, place: Workplace, scans: list[Scan], edge: int, rounds: int, chain: Rounds
) -> tuple[dict[str, Rounds], list[Target]]:
    """Race the reads of `READS` crops of edge^3 x 2 modalities; chain: its times for one case, from the same run.

    scans: of the place, for a second store without codec. Returns times per crop by rival, and the targets.
    """
    plain = workplace(folder / "plain.zarr", scans, place.writer.spec.replace(codec="none"))
    stored, unpacked = _filled(place), _filled(plain)
    info = stored.case_info(0)
    indices = [stored.spec.modalities.index(m) for m in MODALITIES]
    image = stored.read_case(0)[0][indices]
    voxels = np.memmap(folder / "case.f16", dtype=np.float16, mode="w+", shape=image.shape)
    voxels[:] = image
    voxels.flush()
    todo = draws(info.extent, edge)
    rivals = {
        STORE: _from_store(stored, indices, todo, np.float32),
        STORE_16: _from_store(stored, indices, todo, np.float16),
        PLAIN: _from_store(unpacked, indices, todo, np.float32),
        PLAIN_16: _from_store(unpacked, indices, todo, np.float16),
        MEMMAP: _from_memmap(voxels, todo, np.float16),
        MEMMAP_32: _from_memmap(voxels, todo, np.float32),
        **_from_nnunet(folder, image, todo, edge),
    }
    whole = race(rivals, rounds)
    results = {name: _per_crop(times) for name, times in whole.items()}
    return results, _targets(results, f"crop {edge}^3 x 2", chain)


def _targets(results: dict[str, Rounds], title: str, chain: Rounds) -> list[Target]:
    against_chain = Ratio(tuple(chain.median / seconds for seconds in results[STORE].wall))
    at_most = [(STORE, MEMMAP_32), (STORE_16, MEMMAP), (PLAIN, MEMMAP_32), (PLAIN_16, MEMMAP)]
    return [
        *(Target(f"{title}: {a} / {b}", Ratio.of(results[a], results[b]), 3, at_least=False) for a, b in at_most),
        *(
            Target(f"{title}: {rival} / {STORE}", Ratio.of(results[rival], results[STORE]), 1, at_least=True)
            for rival in (NNUNET, NNUNET_PAIR)
        ),
        Target(f"{title}: chain on 4 modalities / {STORE}", against_chain, 100, at_least=True),
    ]


def _filled(place: Workplace) -> StoredDataset:
    preprocess_batch(place.writer.url, [place.case.model_dump(mode="json")], "bench")
    shards.finalise(place.writer.url, [place.case])
    return open_store(place.writer.url).dataset(DATASET)


def _from_store(dataset: StoredDataset, indices: list[int], todo: list[Draw], dtype: type) -> Callable[[], None]:
    def run() -> None:
        for pair, window in todo:
            size = [s.stop - s.start for s in window]
            dataset.read_crop(0, [indices[c] for c in pair], [s.start for s in window], size, dtype)

    return run


def _from_memmap(voxels: np.ndarray, todo: list[Draw], dtype: type) -> Callable[[], None]:
    def run() -> None:
        for pair, window in todo:
            out: np.ndarray = np.empty((2, *(s.stop - s.start for s in window)), dtype=dtype)
            for row, channel in enumerate(pair):
                out[row] = voxels[(channel, *window)]

    return run


def _from_nnunet(folder: Path, image: np.ndarray, todo: list[Draw], edge: int) -> dict[str, Callable[[], None]]:
    patch = (edge,) * 3
    whole = nnunet.write(folder / "case.b2nd", image, patch)
    pair = nnunet.write(folder / "pair.b2nd", image[:2], patch)

    def all_channels() -> None:
        for channels, window in todo:
            nnunet.read(whole, window)[list(channels)]

    def two_channels() -> None:
        for _, window in todo:
            nnunet.read(pair, window)

    return {NNUNET: all_channels, NNUNET_PAIR: two_channels}


def _per_crop(times: Rounds) -> Rounds:
    return Rounds(tuple(t / READS for t in times.wall), tuple(t / READS for t in times.cpu))
