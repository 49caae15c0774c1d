"""A catalog with the composition of BrainMVP-16k: 3,755 cases, 16,021 small files, from lists to Parquet."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from bench.timing import Ratio, Rounds, Target, race
from tasks.catalog import build_catalog, read_catalog, write_catalog
from tasks.headers import READ_BYTES
from tasks.sources import DatalistSource, SourceConfig

OURS, AGAIN, FLOOR = "catalog", "catalog, nothing new", "open and read 16 kB of each file"
LIMIT_S = 60.0
"""Asked of 16,021 scans, writing included."""
COMPOSITION = {
    "brats2021": (1470, ("flair", "t1", "t1ce", "t2")),
    "brats2023-ssa": (75, ("t1c", "t1n", "t2f", "t2w")),
    "brats2023-men": (1141, ("t1c", "t1n", "t2f", "t2w")),
    "ucsf-pdgm": (501, ("ADC", "DWI", "FLAIR", "T1", "T1c", "T2")),
    "ixi": (568, ("MRA", "PD", "T1", "T2")),
}
"""Cases and file tokens by dataset; one case of ucsf-pdgm has no ADC."""
FILES = 8
"""Different files that the cohort's names are hard links to."""


@dataclass(frozen=True)
class CatalogResult:
    """What was measured."""

    scans: int
    rounds: dict[str, Rounds]
    targets: list[Target]


def write_cohort(folder: Path, share: float = 1.0, write: Callable[[Path], None] | None = None) -> list[SourceConfig]:
    """Write files under the names of a share of BrainMVP-16k, and its lists of cases.

    write: writes one file; by default they are hard links to a few small volumes.
    """
    folder.mkdir(parents=True)
    write = write or _linker(folder)
    sources: list[SourceConfig] = []
    for dataset, (cases, tokens) in COMPOSITION.items():
        root = folder / dataset
        entries = [_write_case(root, dataset, number, tokens, write) for number in range(max(1, int(cases * share)))]
        (root / "dataset.json").write_text(json.dumps({"training": entries}))
        sources.append(DatalistSource(dataset=dataset, root=str(root)))
    return sources


def _linker(folder: Path) -> Callable[[Path], None]:
    rng = np.random.default_rng(0)
    bases = [folder / f"base-{number}.nii.gz" for number in range(FILES)]
    for path in bases:
        nib.save(nib.Nifti1Image(rng.integers(0, 900, (24, 24, 16)).astype(np.int16), np.eye(4)), path)
    return lambda path: os.link(bases[zlib.crc32(path.name.encode()) % FILES], path)


def _write_case(
    root: Path, dataset: str, number: int, tokens: tuple[str, ...], write: Callable[[Path], None]
) -> dict[str, list[str]]:
    case = f"{dataset}_{number:05d}"
    (root / case).mkdir(parents=True)
    used = [token for token in tokens if not (token == "ADC" and number == 0)]
    for token in used:
        write(root / case / f"{case}_{token}.nii.gz")
    return {"image": [f"{case}/{case}_{token}.nii.gz" for token in used]}


def measure(folder: Path, rounds: int, share: float = 1.0) -> CatalogResult:
    """Time a first catalog, one with nothing new, and the bare reading of the same files."""
    sources = write_cohort(folder / "sources", share)
    ws, kept = folder / "ws", folder / "kept"
    write_catalog(build_catalog(sources), str(kept))
    paths = [Path(scan.path) for scan in read_catalog(str(kept))]

    def build(target: Path) -> Callable[[], bool]:
        return lambda: write_catalog(build_catalog(sources), str(target))

    def read() -> None:
        for path in paths:
            with path.open("rb") as file:
                file.read(READ_BYTES)

    rivals = {OURS: build(ws), AGAIN: build(kept), FLOOR: read}
    results = race(rivals, rounds, before=lambda: shutil.rmtree(ws, ignore_errors=True))
    asked = Ratio(tuple(seconds / LIMIT_S for seconds in results[OURS].wall))
    title = f"catalog of {len(paths):,} scans"
    return CatalogResult(len(paths), results, [Target(f"{title} (seconds / {LIMIT_S:g})", asked, 1, at_least=False)])
