"""A local copy of the cases that a training reads, for stores on S3 or on slow shared disks.

    <stage_dir>/.claims/                                     what running trainings use, see models.stage_room
    <stage_dir>/<name of the store>-<digest of its URL>/     opened like the store itself
      zarr.json, cases.parquet, <dataset>/...                metadata and small arrays, copied at every start
      <dataset>/image/c/<row>/..., label/c/<row>/...         shards of the selected cases
      .staged/<dataset>/<row>.json                           written after a case was checked: its digest, its files

A case is checked by its digest, which is that of its decoded voxels and stands in the training's selection, so damage
on the way or in the source is found. Rows of a store are append-only: what was staged once stays right. Copies of
cases that the store has retired or forgotten are removed at the next start: a retired one when no running training uses
it, a forgotten one at once.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from infra import storage
from models.distributed import World, any_rank, barrier
from models.heartbeat import beat
from models.records import SelectedCase
from models.stage_room import (
    RECEIPTS,
    Sizes,
    StagingError,
    claimed,
    key_of,
    locked,
    make_room,
    receipt_path,
    remove_copy,
    running_claims,
)
from models.store import Store, StoredDataset, case_digest, open_store
from models.store_layout import CASES, SHARD_ARRAYS

STALE_SECONDS = 3600.0
"""A temporary file of this age is of a process that was killed; a younger one may be of another training."""
BATCH = 4
"""Cases that a rank copies before the ranks agree on going on."""


@dataclass
class Mirror:
    """The copy of one store in a staging folder."""

    store: Store
    folder: Path
    shards: dict[tuple[str, int], dict[str, int]] = field(default_factory=dict)
    """Bytes of the shards in the store by path, by dataset and row; of the datasets that were listed."""
    metadata: list[str] = field(default_factory=list)
    """Paths of all other files in the store."""
    _opened: dict[str, StoredDataset] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Store, stage_dir: Path, datasets: Sequence[str]) -> Mirror:
        """List the files of some datasets of a store."""
        url = store.url.rstrip("/")
        name = f"{url.rsplit('/', 1)[-1]}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
        mirror = cls(store, stage_dir / name, metadata=["zarr.json", CASES])
        for dataset in datasets:
            beat(f"listing {dataset}")
            for path, info in storage.find(storage.join(url, dataset)).items():
                mirror._add(dataset, path, int(info.get("size") or 0))
        return mirror

    def _add(self, dataset: str, path: str, size: int) -> None:
        parts = path.split("/")
        if parts[0] in SHARD_ARRAYS and parts[1] == "c":
            self.shards.setdefault((dataset, int(parts[2])), {})[f"{dataset}/{path}"] = size
        else:
            self.metadata.append(f"{dataset}/{path}")

    def copy_metadata(self) -> None:
        """Copy everything but shards and staging receipts."""
        (self.folder / RECEIPTS).mkdir(parents=True, exist_ok=True)
        for path in self.metadata:
            self._copy(path)

    def is_staged(self, case: SelectedCase) -> bool:
        """Say whether a case was copied and checked, and its files still have their sizes."""
        receipt = self._receipt(case)
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
            remove_copy(self.folder.parent, self.key(case.dataset, case.row))
            raise StagingError(
                f"case {case.dataset}/{case.case} (row {case.row}) of {self.store.url} was copied to {self.folder} and "
                f"has digest {found}, the selection says {case.digest}; run `brainloom store verify --deep`, then "
                "run preprocess with repair: true if the store is damaged, else start again"
            )
        storage.write_json(self._receipt(case), {"digest": case.digest, "files": files})

    def sizes(self, cases: Sequence[SelectedCase]) -> Sizes:
        """Return the bytes of the shards of some cases."""
        return {
            self.key(case.dataset, case.row): sum(self.shards.get((case.dataset, case.row), {}).values())
            for case in cases
        }

    def remove_gone(self, used: Set[str]) -> None:
        """Remove what a kill left half-written, and copies of cases that the store no longer holds as staged.

        used: cases of running trainings, which keep theirs unless the store has erased them.
        """
        for path in self.folder.rglob(".*.tmp"):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink(missing_ok=True)
        table = self.store.cases().select(["dataset", "row", "status", "digest"]).to_pylist()
        held = {(line["dataset"], line["row"]): line for line in table if line["status"] != "forgotten"}
        for receipt in (self.folder / RECEIPTS).glob("*/*.json"):
            dataset, said = receipt.parent.name, storage.read_json(receipt)
            line, key = held.get((dataset, int(receipt.stem))), self.key(dataset, receipt.stem)
            is_right = line is not None and line["status"] == "stored" and line["digest"] == said["digest"]
            if not is_right and not (line is not None and key in used):
                remove_copy(self.folder.parent, key)

    def key(self, dataset: str, row: int | str) -> str:
        """Return the name of a case in the staging folder."""
        return key_of(self.folder.name, dataset, row)

    def _digest(self, case: SelectedCase) -> str:
        if case.dataset not in self._opened:
            self._opened[case.dataset] = open_store(str(self.folder)).dataset(case.dataset)
        data = self._opened[case.dataset]
        info = data.case_info(case.row)
        image, label = data.read_case(case.row)
        beside = data.beside_bytes(case.row)
        return case_digest(image, label, np.array(info.present), info.affine, info.origin, beside)

    def _copy(self, path: str) -> None:
        data = storage.read_bytes(storage.join(self.store.url, path))
        storage.write_bytes(storage.join(str(self.folder), path), data)

    def _receipt(self, case: SelectedCase) -> Path:
        return receipt_path(self.folder.parent, self.key(case.dataset, case.row))


def stage_store(
    store: Store,
    cases: Sequence[SelectedCase],
    stage_dir: Path,
    limit_gib: float,
    world: World,
    stop: Callable[[], bool],
    held: ExitStack,
    training: str,
) -> Store | None:
    """Copy the selected cases of a store to a local folder and return the copy; every rank calls this.

    The ranks of a node share the work and the copy; a start after a kill copies only what is missing. Until `held` is
    closed no other training removes the copies; copies that no running training uses make room, the least recently
    used ones first. training: its name in messages. Returns None on all ranks when one was told to stop. Raises
    StagingError when the cases do not fit the limit or the disk, or when a copy is not what was selected.
    """
    mirror = Mirror.of(store, stage_dir, sorted({case.dataset for case in cases}))
    if world.local_rank == 0:
        wanted = mirror.sizes(cases)
        with locked(stage_dir):
            claims = running_claims(stage_dir)
            mirror.remove_gone({key for claim in claims for key in claim.cases})
            make_room(stage_dir, wanted, claims, limit_gib, f"{len(cases)} cases of {store.url}")
            held.enter_context(claimed(stage_dir, training, wanted))
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
