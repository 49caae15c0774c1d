"""A local copy of the cases that a training reads, for stores on S3 or on slow shared disks.

    <stage_dir>/<name of the store>-<digest of its URL>/     opened like the store itself
      zarr.json, cases.parquet, <dataset>/...                metadata and small arrays, copied at every start
      <dataset>/image/c/<row>/..., label/c/<row>/...         shards of the selected cases
      .staged/<dataset>/<row>.json                           written after a case was checked: its digest, its files

A case is checked by its digest, which is that of its decoded voxels and stands in the training's selection, so damage
on the way or in the source is found. Rows of a store are append-only: what was staged once stays right. Copies of
cases that the store has retired or forgotten are removed at the next start.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from infra import storage
from models.distributed import World, any_rank, barrier
from models.heartbeat import beat
from models.records import SelectedCase
from models.store import Store, StoredDataset, case_digest, open_store
from models.store_layout import CASES

GIB = 2**30
RECEIPTS = ".staged"
STALE_SECONDS = 3600.0
"""A temporary file of this age is of a process that was killed; a younger one may be of another training."""
BATCH = 4
"""Cases that a rank copies before the ranks agree on going on."""

Sizes = dict[str, int]
"""Bytes of files by their path in the store."""


class StagingError(ValueError):
    """Cases cannot be staged; the message has the numbers and what to do."""


@dataclass
class Mirror:
    """The copy of one store in a staging folder."""

    store: Store
    folder: Path
    shards: dict[tuple[str, int], Sizes] = field(default_factory=dict)
    """In the store, by dataset and row; of the datasets that were listed."""
    metadata: Sizes = field(default_factory=dict)
    _opened: dict[str, StoredDataset] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Store, stage_dir: Path, datasets: Sequence[str]) -> Mirror:
        """List the files of some datasets of a store."""
        url = store.url.rstrip("/")
        name = f"{url.rsplit('/', 1)[-1]}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
        mirror = cls(store, stage_dir / name, metadata={"zarr.json": 0, CASES: 0})
        for dataset in datasets:
            beat(f"listing {dataset}")
            for path, info in storage.find(storage.join(url, dataset)).items():
                mirror._add(dataset, path, int(info.get("size") or 0))
        return mirror

    def _add(self, dataset: str, path: str, size: int) -> None:
        parts = path.split("/")
        if parts[0] in {"image", "label"} and parts[1] == "c":
            self.shards.setdefault((dataset, int(parts[2])), {})[f"{dataset}/{path}"] = size
        else:
            self.metadata[f"{dataset}/{path}"] = size

    def copy_metadata(self) -> None:
        """Copy everything but shards and staging receipts."""
        for path in self.metadata:
            self._copy(path)

    def is_staged(self, case: SelectedCase) -> bool:
        """Say whether a case was copied and checked, and its files still have their sizes."""
        receipt = self._receipt(case.dataset, case.row)
        if not receipt.exists():
            return False
        said: dict[str, Any] = storage.read_json(receipt)
        files = {self.folder / path: size for path, size in said["files"].items()}
        return said["digest"] == case.digest and all(p.exists() and p.stat().st_size == n for p, n in files.items())

    def stage(self, case: SelectedCase) -> None:
        """Copy a case and check it; raises StagingError when its voxels are not those that were selected."""
        files = self.shards.get((case.dataset, case.row), {})
        for path in files:
            self._copy(path)
        if (found := self._digest(case)) != case.digest:
            self._remove(case.dataset, case.row, list(files))
            raise StagingError(
                f"case {case.dataset}/{case.case} (row {case.row}) of {self.store.url} was copied to {self.folder} and "
                f"has digest {found}, the selection says {case.digest}; run `brainloom store verify --deep`, then "
                "run preprocess with repair: true if the store is damaged, else start again"
            )
        storage.write_json(self._receipt(case.dataset, case.row), {"digest": case.digest, "files": files})

    def remove_gone(self) -> None:
        """Remove what a kill left half-written, and copies of cases that the store no longer holds as staged."""
        for path in self.folder.rglob(".*.tmp"):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink(missing_ok=True)
        table = self.store.cases().select(["dataset", "row", "status", "digest"]).to_pylist()
        held = {(line["dataset"], line["row"]): line["digest"] for line in table if line["status"] == "stored"}
        for receipt in (self.folder / RECEIPTS).glob("*/*.json"):
            dataset, row, said = receipt.parent.name, int(receipt.stem), storage.read_json(receipt)
            if held.get((dataset, row)) != said["digest"]:
                self._remove(dataset, row, said["files"])

    def _digest(self, case: SelectedCase) -> str:
        if case.dataset not in self._opened:
            self._opened[case.dataset] = open_store(str(self.folder)).dataset(case.dataset)
        data = self._opened[case.dataset]
        info = data.case_info(case.row)
        image, label = data.read_case(case.row)
        return case_digest(image, label, np.array(info.present), info.affine, info.origin)

    def _copy(self, path: str) -> None:
        data = storage.read_bytes(storage.join(self.store.url, path))
        storage.write_bytes(storage.join(str(self.folder), path), data)

    def _remove(self, dataset: str, row: int, files: Sequence[str]) -> None:
        self._receipt(dataset, row).unlink(missing_ok=True)
        for path in files:
            (self.folder / path).unlink(missing_ok=True)

    def _receipt(self, dataset: str, row: int) -> Path:
        return self.folder / RECEIPTS / dataset / f"{row}.json"


def stage_store(
    store: Store,
    cases: Sequence[SelectedCase],
    stage_dir: Path,
    limit_gib: float,
    world: World,
    stop: Callable[[], bool],
) -> Store | None:
    """Copy the selected cases of a store to a local folder and return the copy; every rank calls this.

    The ranks of a node share the work and the copy; a start after a kill copies only what is missing. Returns None on
    all ranks when one was told to stop. Raises StagingError when the cases do not fit the limit or the disk, or when
    a copy is not what was selected.
    """
    mirror = Mirror.of(store, stage_dir, sorted({case.dataset for case in cases}))
    if world.local_rank == 0:
        mirror.remove_gone()
        check_room(mirror, [case for case in cases if not mirror.is_staged(case)], stage_dir, limit_gib)
        mirror.copy_metadata()
    barrier(world)
    waiting = [case for case in cases[world.local_rank :: world.local_size] if not mirror.is_staged(case)]
    while True:
        batch, waiting = waiting[:BATCH], waiting[BATCH:]
        for case in batch:
            beat(f"staging {case.dataset}/{case.case}, then {len(waiting)} more")
            mirror.stage(case)
        working, stopping = any_rank([bool(waiting), stop()], world)
        if stopping:
            return None
        if not working:
            return open_store(str(mirror.folder))


def check_room(mirror: Mirror, missing: Sequence[SelectedCase], stage_dir: Path, limit_gib: float) -> None:
    """Refuse cases that do not fit below the limit, or on the disk; raises StagingError with the numbers."""
    wanted = sum(sum(mirror.shards.get((case.dataset, case.row), {}).values()) for case in missing)
    stage_dir.mkdir(parents=True, exist_ok=True)
    held = {child.name: _bytes_below(child) for child in sorted(stage_dir.iterdir()) if child.is_dir()}
    advice = "raise stage_gib, delete copies that no training needs, or leave stage_dir empty to read the store itself"
    what = f"staging {len(missing)} cases of {mirror.store.url} needs {wanted / GIB:.3f} GiB"
    if wanted + sum(held.values()) > limit_gib * GIB:
        copies = ", ".join(f"{name} {size / GIB:.3f} GiB" for name, size in held.items()) or "nothing"
        raise StagingError(f"{what}; {stage_dir} may hold stage_gib {limit_gib:g} and holds: {copies}; {advice}")
    if wanted > (free := shutil.disk_usage(stage_dir).free):
        raise StagingError(f"{what}; the disk of {stage_dir} has {free / GIB:.3f} GiB free; {advice}")


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
