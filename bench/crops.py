"""One random crop for training: from the store, from a float16 memory map, and through the chain."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.inputs import DATASET, MODALITIES, Workplace
from bench.timing import Ratio, Rounds, Target, race
from models.store import open_store
from tasks import shards
from tasks.preprocess import preprocess_batch

STORE, MEMMAP, MEMMAP_32 = "store", "memmap, as float16", "memmap, to float32"
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
    folder: Path, place: Workplace, edge: int, rounds: int, chain: Rounds
) -> tuple[dict[str, Rounds], list[Target]]:
    """Race the reads of `READS` crops of edge^3 x 2 modalities; chain: its times for one case, from the same run.

    Returns times per crop by rival, and the targets.
    """
    url = place.writer.url
    preprocess_batch(url, [place.case.model_dump(mode="json")], "bench")
    shards.finalise(url, [place.case])
    dataset = open_store(url).dataset(DATASET)
    info = dataset.case_info(0)
    indices = [dataset.spec.modalities.index(m) for m in MODALITIES]
    voxels = np.memmap(folder / "case.f16", dtype=np.float16, mode="w+", shape=(len(indices), *info.extent))
    voxels[:] = dataset.read_case(0)[0][indices]
    voxels.flush()
    todo = draws(info.extent, edge)

    def from_store() -> None:
        for pair, window in todo:
            dataset.read_crop(0, [indices[c] for c in pair], [s.start for s in window], (edge,) * 3)

    def from_memmap(dtype: type) -> Callable[[], None]:
        def run() -> None:
            for pair, window in todo:
                out: np.ndarray = np.empty((2, edge, edge, edge), dtype=dtype)
                for row, channel in enumerate(pair):
                    out[row] = voxels[(channel, *window)]

        return run

    rivals = {STORE: from_store, MEMMAP: from_memmap(np.float16), MEMMAP_32: from_memmap(np.float32)}
    whole = race(rivals, rounds)
    results = {name: _per_crop(times) for name, times in whole.items()}
    against_chain = Ratio(tuple(chain.median / seconds for seconds in results[STORE].wall))
    title = f"crop {edge}^3 x 2"
    return results, [
        Target(f"{title} (store / memmap, as float16)", Ratio.of(results[STORE], results[MEMMAP]), 3, at_least=False),
        Target(
            f"{title} (store / memmap, to float32)", Ratio.of(results[STORE], results[MEMMAP_32]), 3, at_least=False
        ),
        Target(f"{title} (chain on 4 modalities / store)", against_chain, 100, at_least=True),
    ]


def _per_crop(times: Rounds) -> Rounds:
    return Rounds(tuple(t / READS for t in times.wall), tuple(t / READS for t in times.cpu))
