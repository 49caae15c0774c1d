"""Chunk edge and codec of a shard: bytes, time to write, time to read crops. `python -m bench.layouts` prints it.

Times are processor time, which other work on the machine disturbs least. Every layout is written by zarr with the Rust
pipeline and read by our reader, which knows blosc frames and plain bytes. The table is in
docs/decisions/0004-chunk-and-codec.md.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zarr
from zarr.codecs import BloscCodec

from bench.crops import READS, draws
from bench.inputs import GRID, MODALITIES, centred, mni_brain, workplace, write_scans
from bench.timing import machine, race
from models.shard_reader import ShardReader
from models.spec import SPECS, PreprocessSpec
from models.store_layout import limit_threads, rust_pipeline
from tasks.prepare import prepare_case

EDGES = (32, 48, 64, 96)
CODECS: dict[str, BloscCodec | None] = {
    "lz4 5, no shuffle": BloscCodec(cname="lz4", clevel=5, shuffle="noshuffle"),
    "lz4 5, shuffle": BloscCodec(cname="lz4", clevel=5, shuffle="shuffle"),
    "lz4 5, bitshuffle": BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"),
    "zstd 3, shuffle": BloscCodec(cname="zstd", clevel=3, shuffle="shuffle"),
    "zstd 3, bitshuffle": BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"),
    "none": None,
}


@dataclass(frozen=True)
class Layout:
    """One case written in one layout."""

    megabytes: float
    write: Callable[[], None]
    read: Callable[[], None]
    """READS crops of two modalities."""


def table(folder: Path, image: np.ndarray, spec: PreprocessSpec, crop: int, rounds: int) -> Iterator[str]:
    """Yield the lines of the table; layouts are read in turn. image: as it is stored, (M, x, y, z) float16."""
    layouts = {
        (edge, name): prepare(folder / f"{edge}-{name}", image, spec, edge, codec, crop)
        for edge in EDGES
        for name, codec in CODECS.items()
    }
    written = race({str(key): layout.write for key, layout in layouts.items()}, rounds)
    read = race({str(key): layout.read for key, layout in layouts.items()}, rounds)
    yield "| chunk | codec | MB | write | crop as float16 |"
    yield "|---|---|---|---|---|"
    for (edge, name), layout in layouts.items():
        write_ms = statistics.median(written[str((edge, name))].cpu) * 1e3
        read_ms = statistics.median(read[str((edge, name))].cpu) * 1e3 / READS
        yield f"| {edge} | {name} | {layout.megabytes:.1f} | {write_ms:.0f} ms | {read_ms:.1f} ms |"


def prepare(
    url: Path, image: np.ndarray, spec: PreprocessSpec, edge: int, codec: BloscCodec | None, crop: int
) -> Layout:
    """Write a case in one layout, and return how to write and read it again."""
    shard = tuple(-(-n // edge) * edge for n in spec.grid)
    with rust_pipeline():
        array = zarr.create_array(
            str(url),
            name="image",
            shape=(1, len(image), *spec.grid),
            shards=(1, len(image), *shard),
            chunks=(1, 1, edge, edge, edge),
            dtype="float16",
            compressors=codec,
            fill_value=0,
        )
    reader = ShardReader.of(str(url), "image", array)
    if reader is None:
        raise ValueError(f"our reader does not know chunks of {edge} with {codec}")
    x, y, z = image.shape[1:]
    present = np.flatnonzero(image.any(axis=(1, 2, 3))).tolist()
    todo = draws((x, y, z), crop)

    def write() -> None:
        array[0, :, :x, :y, :z] = image

    def read() -> None:
        for pair, window in todo:
            reader.read(0, [(present[c],) for c in pair], window, np.zeros((2, crop, crop, crop), np.float16))

    write()
    (file,) = [path for path in (url / "image" / "c").rglob("*") if path.is_file()]
    return Layout(file.stat().st_size / 1e6, write, read)


def main() -> None:
    """Measure a full-size case and print the table."""
    torch.set_num_threads(1)
    limit_threads(1)
    spec = SPECS["brainmvp"]
    with tempfile.TemporaryDirectory(prefix="brainloom-layouts-") as name:
        folder = Path(name)
        place = workplace(folder / "s.zarr", write_scans(folder / "scans", centred(mni_brain(), GRID)), spec)
        image = prepare_case(place.case, spec).image
        print(f"{machine()}; {len(MODALITIES)} of {len(image)} modalities, extent {image.shape[1:]}\n", flush=True)
        for line in table(folder, image, spec, crop=96, rounds=3):
            print(line, flush=True)


if __name__ == "__main__":
    main()
