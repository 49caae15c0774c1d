"""Staging: a checked local copy of the selected cases, with a limit, shared, resumable."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from training_phantoms import make_training, write_blobs

from infra import storage
from models import stage_room, staging
from models.distributed import World
from models.records import SelectedCase
from models.stage_room import GIB, StagingError, claimed, list_copies, locked
from models.staging import stage_store
from models.state import Stopped
from models.store import open_store
from models.trainer import train

WORLD = World(0, 1, torch.device("cpu"))
Blobs = tuple[str, list[SelectedCase]]


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Blobs:
    url = str(tmp_path_factory.mktemp("staging") / "blobs.zarr")
    return url, write_blobs(url, cases=6)


@pytest.fixture
def damaged(blobs: Blobs, tmp_path: Path) -> Blobs:
    """Return a copy of the store that a test may change."""
    shutil.copytree(blobs[0], tmp_path / "source.zarr")
    return str(tmp_path / "source.zarr"), blobs[1]


@pytest.fixture
def running() -> Iterator[ExitStack]:
    """Hold what trainings hold until their end."""
    with ExitStack() as held:
        yield held


def stage(
    blobs: Blobs,
    folder: Path,
    stop: Callable[[], bool] = never,
    limit_gib: float = 1.0,
    held: ExitStack | None = None,
    name: str = "a",
) -> Any:
    """Stage as a training does, which ends at once unless `held` is given."""
    with ExitStack() as stack:
        copy = stage_store(open_store(blobs[0]), blobs[1], folder, limit_gib, WORLD, stop, stack, name)
        if held is not None:
            held.push(stack.pop_all())
    return copy


def rows(folder: Path) -> set[str]:
    """Return the copied cases as <dataset>/<row>."""
    return {key.split("/", 1)[1] for key in list_copies(folder)[0]}


def room(blobs: Blobs, folder: Path, *numbers: int) -> float:
    """Return the GiB of these rows and of what is not shards in the folder."""
    sizes = staging.Mirror.of(open_store(blobs[0]), folder, ["blobs"]).sizes(blobs[1])
    return (sum(list(sizes.values())[row] for row in numbers) + sum(list_copies(folder)[1].values())) / GIB


def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the path of every file that is read from now on."""
    read: list[str] = []
    original = storage.read_bytes

    def remembered(url: Any) -> bytes:
        read.append(str(url))
        return original(url)

    monkeypatch.setattr(staging.storage, "read_bytes", remembered)
    return read


def shards(paths: list[str]) -> list[str]:
    return [path for path in paths if "/c/" in path and ("/image/" in path or "/label/" in path)]


def test_the_copy_reads_like_the_store_and_holds_the_selected_rows_only(blobs: Blobs, tmp_path: Path) -> None:
    chosen = [case for case in blobs[1] if case.row != 2]
    copy = stage((blobs[0], chosen), tmp_path)
    assert Path(copy.url).parent == tmp_path
    here, there = copy.dataset("blobs"), open_store(blobs[0]).dataset("blobs")
    for case in chosen:
        for mine, origin in zip(here.read_case(case.row), there.read_case(case.row), strict=True):
            assert np.array_equal(mine, origin)
        assert here.case_info(case.row).digest == case.digest
    rows = {path.name for path in (Path(copy.url) / "blobs" / "image" / "c").iterdir()}
    assert rows == {"0", "1", "3", "4", "5"}


def test_a_second_start_copies_no_shard_and_what_is_lost_is_copied_again(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = stage(blobs, tmp_path)
    read = copied(monkeypatch)
    stage(blobs, tmp_path)
    assert shards(read) == []
    lost = next((Path(copy.url) / "blobs" / "image" / "c" / "3").rglob("0/0/0/0"))
    lost.write_bytes(lost.read_bytes()[:-7])
    stage(blobs, tmp_path)
    assert len(shards(read)) == 2, "image and label of the damaged case"
    assert all("/c/3/" in path for path in shards(read))


def test_two_stores_of_one_name_are_kept_apart(blobs: Blobs, damaged: Blobs, tmp_path: Path) -> None:
    one, two = stage(blobs, tmp_path / "cache"), stage(damaged, tmp_path / "cache")
    assert one.url != two.url
    assert len(list((tmp_path / "cache").glob("*.zarr-*"))) == 2


def test_a_case_that_is_not_what_was_selected_is_refused_and_not_kept(damaged: Blobs, tmp_path: Path) -> None:
    shard = next((Path(damaged[0]) / "blobs" / "label" / "c" / "1").rglob("0/0/0"))
    other = next((Path(damaged[0]) / "blobs" / "label" / "c" / "4").rglob("0/0/0"))
    shard.write_bytes(other.read_bytes())
    with pytest.raises(StagingError, match=r"case blobs/case-1 \(row 1\) of .*source.zarr was copied to .* has digest"):
        stage(damaged, tmp_path / "cache")
    left = [path.name for path in (tmp_path / "cache").glob("*/.staged/blobs/*.json")]
    assert "1.json" not in left
    assert not any(path.is_file() for path in (tmp_path / "cache").glob("*/blobs/label/c/1/**/*"))


def test_cases_that_do_not_fit_are_refused_with_the_numbers(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = r"may hold stage_gib 1e-06, of which trainings that run now \(none\) use 0\.000 GiB"
    with pytest.raises(
        StagingError, match=rf"staging 6 cases of .* needs 0\.\d+ GiB; .* {limits}; .*; raise stage_gib,"
    ):
        stage(blobs, tmp_path / "new", limit_gib=1e-6)
    assert not rows(tmp_path / "new")
    stage((blobs[0], blobs[1][:3]), tmp_path / "old")
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(stage_room.shutil, "disk_usage", lambda _: full)
    with pytest.raises(
        StagingError, match=r"has 0\.000 GiB free and copies of 0\.000 GiB that nobody uses; raise .* or leave"
    ):
        stage(blobs, tmp_path / "old")
    assert len(rows(tmp_path / "old")) == 3, "nothing is removed in vain"


def test_the_least_recently_used_copies_make_room(blobs: Blobs, tmp_path: Path) -> None:
    url, cases = blobs
    for name, chosen in (("a", cases[:2]), ("b", cases[2:4]), ("again", cases[:2])):
        copy = stage((url, chosen), tmp_path, name=name)
    stage((url, cases[4:]), tmp_path, limit_gib=room(blobs, tmp_path, 0, 1, 4, 5), name="c")
    assert rows(tmp_path) == {"blobs/0", "blobs/1", "blobs/4", "blobs/5"}, "those of b were used before those of a"
    assert not list(Path(copy.url).glob(".staged/blobs/[23].json"))
    assert stage((url, cases[2:4]), tmp_path, name="b").dataset("blobs").read_case(3)[0].any(), "copied anew"


def test_only_as_much_as_needed_is_removed_and_a_torn_copy_first(blobs: Blobs, tmp_path: Path) -> None:
    copy = Path(stage((blobs[0], blobs[1][:3]), tmp_path).url)
    (copy / ".staged/blobs/1.json").unlink()
    stage((blobs[0], blobs[1][3:4]), tmp_path, limit_gib=room(blobs, tmp_path, 0, 2, 3))
    assert rows(tmp_path) == {"blobs/0", "blobs/2", "blobs/3"}


def test_what_a_running_training_uses_is_never_removed(blobs: Blobs, tmp_path: Path, running: ExitStack) -> None:
    url, cases = blobs
    stage((url, cases[:2]), tmp_path, held=running, name="first")
    stage((url, cases[2:4]), tmp_path, name="second")
    with pytest.raises(StagingError, match=r"trainings that run now \(first\) use 0\.000 GiB"):
        stage((url, cases[3:]), tmp_path, limit_gib=room(blobs, tmp_path, 0, 1, 3, 4))
    assert len(rows(tmp_path)) == 4
    stage((url, cases[4:]), tmp_path, limit_gib=room(blobs, tmp_path, 0, 1, 4, 5))
    assert rows(tmp_path) == {"blobs/0", "blobs/1", "blobs/4", "blobs/5"}
    running.close()
    stage((url, cases[2:4]), tmp_path, limit_gib=room(blobs, tmp_path, 0, 1, 2, 3))
    assert rows(tmp_path) == {"blobs/0", "blobs/1", "blobs/2", "blobs/3"}, "the end of a training counts as use"


def test_room_for_what_others_have_still_to_copy_is_kept(blobs: Blobs, tmp_path: Path, running: ExitStack) -> None:
    """Both find the folder empty; the second one must not take the room of the first."""
    url, cases = blobs
    mirror = staging.Mirror.of(open_store(url), tmp_path, ["blobs"])
    with locked(tmp_path):
        running.enter_context(claimed(tmp_path, "first", mirror.sizes(cases[:4])))
    limit = room(blobs, tmp_path, *range(6))
    with pytest.raises(StagingError, match=r"trainings that run now \(first\) use 0\.001 GiB"):
        stage((url, cases[4:]), tmp_path, limit_gib=limit - 1 / GIB)
    stage((url, cases[4:]), tmp_path, limit_gib=limit)


def test_a_killed_training_holds_nothing(blobs: Blobs, tmp_path: Path) -> None:
    """Its claim is still there, but nobody holds the lock."""
    stage((blobs[0], blobs[1][:3]), tmp_path)
    key = next(iter(list_copies(tmp_path)[0]))
    (tmp_path / ".claims" / "dead.json").write_text(json.dumps({"training": "dead", "cases": {key: 1}}))
    stage((blobs[0], blobs[1][3:]), tmp_path, limit_gib=room(blobs, tmp_path, 3, 4, 5))
    assert rows(tmp_path) == {"blobs/3", "blobs/4", "blobs/5"}
    assert not list(tmp_path.glob(".claims/*.json"))


def test_stores_that_nobody_reads_any_more_go_whole_and_foreign_folders_stay(
    blobs: Blobs, damaged: Blobs, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(blobs[0], cache / "other.zarr")
    old = Path(stage(damaged, cache).url)
    new = Path(stage(blobs, cache, limit_gib=room(blobs, tmp_path, *range(6))).url)
    assert not old.exists()
    assert len(rows(cache)) == 6
    assert open_store(str(cache / "other.zarr")).dataset("blobs").read_case(0)[0].any(), "a store that lies there, too"
    assert sorted(path.name for path in cache.iterdir()) == sorted([".claims", new.name, "other.zarr"])


def test_told_to_stop_it_keeps_what_is_staged(blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stage(blobs, tmp_path, stop=lambda: True) is None
    read = copied(monkeypatch)
    assert stage(blobs, tmp_path) is not None
    assert len(shards(read)) == 2 * (6 - staging.BATCH)


def set_status(url: str, row: int, status: str) -> None:
    path = Path(url) / "cases.parquet"
    table = pq.read_table(path)
    column = [status if line["row"] == row else line["status"] for line in table.select(["row", "status"]).to_pylist()]
    pq.write_table(table.set_column(table.column_names.index("status"), "status", [column]), path)


def test_copies_of_cases_that_the_store_no_longer_holds_and_torn_files_are_removed(
    damaged: Blobs, tmp_path: Path
) -> None:
    copy = stage(damaged, tmp_path / "cache")
    set_status(damaged[0], row=5, status="retired")
    torn, young = (Path(copy.url) / f".shard.{name}.tmp" for name in ("torn", "young"))
    torn.touch()
    young.touch()
    os.utime(torn, (0, 0))
    assert stage((damaged[0], damaged[1][:5]), tmp_path / "cache").url == copy.url
    assert young.exists()
    assert not torn.exists()
    files = [path for path in Path(copy.url).rglob("*") if path.is_file()]
    assert not [path for path in files if "/c/5/" in str(path) or path.name == "5.json"]
    assert [path for path in files if "/c/4/" in str(path)]


@pytest.mark.parametrize(("status", "kept"), [("retired", True), ("forgotten", False)])
def test_a_running_training_keeps_retired_cases_and_loses_forgotten_ones(
    damaged: Blobs, tmp_path: Path, running: ExitStack, status: str, kept: bool
) -> None:
    stage(damaged, tmp_path / "cache", held=running)
    set_status(damaged[0], row=5, status=status)
    stage((damaged[0], damaged[1][:5]), tmp_path / "cache")
    assert ("blobs/5" in rows(tmp_path / "cache")) == kept


def test_the_ranks_of_a_node_share_the_work(
    blobs: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: ExitStack
) -> None:
    monkeypatch.setattr(staging, "barrier", lambda world: None)
    monkeypatch.setattr(staging, "any_rank", lambda flags, world: list(flags))
    store, ranks = open_store(blobs[0]), [World(r, 2, torch.device("cpu"), r, 2) for r in range(2)]
    read = copied(monkeypatch)
    for world in ranks:
        assert stage_store(store, blobs[1], tmp_path, 1.0, world, never, running, "a") is not None
    assert len(list(tmp_path.glob(".claims/*.json"))) == 1, "one of the node"
    assert len(shards(read)) == len(set(shards(read))) == 12, "nothing twice, nothing left out"


def test_a_staged_training_ends_with_the_same_bits_and_survives_a_stop_while_staging(
    blobs: Blobs, tmp_path: Path
) -> None:
    where = {"stage_dir": str(tmp_path / "cache"), "stage_gib": 1.0}
    config = make_training(tmp_path / "b", *blobs, epochs=2, running=where)
    with pytest.raises(Stopped, match="training b was stopped while its cases were staged; what is staged stays"):
        train(config, tmp_path / "b", WORLD, lambda: True)
    claims = tmp_path / "cache" / ".claims"
    assert not list(claims.glob("*.json"))
    seen: list[int] = []
    train(config, tmp_path / "b", WORLD, lambda: seen.append(len(list(claims.glob("*.json")))) or False)
    assert set(seen) == {1}, "claimed while it runs"
    assert not list(claims.glob("*.json"))
    train(make_training(tmp_path / "a", *blobs, epochs=2), tmp_path / "a", WORLD)
    digests = {json.loads((tmp_path / n / "done.json").read_text())["weights_digest"] for n in ("a", "b")}
    assert len(digests) == 1


@pytest.mark.full
def test_a_store_on_s3_is_staged_and_read_from_disk(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{s3_url}/blobs.zarr"
    cases = write_blobs(url, cases=6)
    config = make_training(tmp_path / "a", url, cases, epochs=2, running={"stage_dir": str(tmp_path / "cache")})
    read = copied(monkeypatch)
    with caplog.at_level(logging.WARNING):
        train(config, tmp_path / "a", WORLD)
    assert len([path for path in shards(read) if path.startswith("s3://")]) == 12, "each shard once"
    done = json.loads((tmp_path / "a" / "done.json").read_text())
    local = str(tmp_path / "blobs.zarr")
    train(make_training(tmp_path / "b", local, write_blobs(local, cases=6), epochs=2), tmp_path / "b", WORLD)
    assert json.loads((tmp_path / "b" / "done.json").read_text())["weights_digest"] == done["weights_digest"]
