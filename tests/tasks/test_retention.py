from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from models.stage_room import claimed, key_of, receipt_path
from tasks.retention import (
    DAY_S,
    Removal,
    finished_checkpoints,
    leftovers,
    remove,
    staged_copies,
    unfinished_trainings,
)


def aged(path: Path, days: float, text: str = "x") -> Path:
    """Write a file so many days ago, with all folders around it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    then = time.time() - days * DAY_S
    for one in (path, *path.parents):
        if "ws" in one.parts or "stage" in one.parts:
            os.utime(one, (then, then))
    return path


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Return a workspace with a finished, an abandoned and a young training, a store, tables and leftovers."""
    ws = tmp_path / "ws"
    aged(ws / "tables/versions/phenotypes-0123.parquet", 400)
    aged(ws / "tables/.report.md.0123.tmp", 40)
    aged(ws / "store.zarr/toy/image/c/0/0/0/0/0.partial", 400)
    aged(ws / "trainings/young/run.json", 0)
    for name in ("done", "abandoned"):
        for file in ("run.json", "checkpoints/step-000010.pt"):
            aged(ws / "trainings" / name / file, 30)
    aged(ws / "trainings/done/done.json", 30)
    aged(ws / "trainings/done/weights.safetensors", 30)
    aged(ws / "trainings/abandoned/checkpoints/step-000020.pt.partial", 30)
    return ws


def names(found: list[Removal], below: Path) -> list[str]:
    return sorted(str(one.path.relative_to(below)) for one in found)


def test_half_written_files_outside_of_stores_are_found(workspace: Path) -> None:
    partial = "trainings/abandoned/checkpoints/step-000020.pt.partial"
    assert names(leftovers(workspace, 7), workspace) == ["tables/.report.md.0123.tmp", partial]
    assert names(leftovers(workspace, 35), workspace) == ["tables/.report.md.0123.tmp"]


def test_only_what_never_finished_and_only_checkpoints_of_what_did(workspace: Path) -> None:
    assert names(unfinished_trainings(workspace, 7), workspace) == ["trainings/abandoned"]
    assert names(finished_checkpoints(workspace, 7), workspace) == ["trainings/done/checkpoints"]
    (one,) = finished_checkpoints(workspace, 7)
    assert remove(one, 7) is True
    assert remove(one, 7) is False
    kept = sorted(path.name for path in (workspace / "trainings/done").iterdir())
    assert kept == ["done.json", "run.json", "weights.safetensors"]


def test_a_training_that_went_on_since_it_was_found_stays(workspace: Path) -> None:
    (found,) = unfinished_trainings(workspace, 7)
    (workspace / "trainings/abandoned/metrics.jsonl").write_text("{}")
    assert remove(found, 7) is False
    assert (workspace / "trainings/abandoned/run.json").exists()
    assert unfinished_trainings(workspace, 7) == []


@pytest.mark.parametrize("find", [unfinished_trainings, finished_checkpoints, leftovers, staged_copies])
def test_a_workspace_that_is_not_there_has_nothing(
    find: Callable[[Path, float], list[Removal]], tmp_path: Path
) -> None:
    assert find(tmp_path / "absent", 1) == []
    assert list(tmp_path.iterdir()) == []


def test_a_link_out_of_the_workspace_is_left_alone(workspace: Path, tmp_path: Path) -> None:
    elsewhere = aged(tmp_path / "ws-2/run.json", 0).parent
    os.utime(elsewhere / "run.json", (0, 0))
    os.utime(elsewhere, (0, 0))
    (workspace / "trainings/link").symlink_to(elsewhere)
    assert names(unfinished_trainings(workspace, 7), workspace) == ["trainings/abandoned"]


def test_idle_staged_copies_go_and_claimed_ones_stay(tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    keys = [key_of("s.zarr-01", "toy", row) for row in range(3)]
    for row, key in enumerate(keys):
        aged(stage / f"s.zarr-01/toy/image/c/{row}/0/0/0/0", 50, "voxels")
        aged(receipt_path(stage, key), 50 if row else 2, json.dumps({}))
    found = staged_copies(stage, 30)
    assert [(one.key, one.size) for one in found] == [(keys[1], 6), (keys[2], 6)]
    with claimed(stage, "now", {keys[1]: 6}):
        assert [one.key for one in staged_copies(stage, 30)] == [keys[2]]
        assert [remove(one, 30) for one in found] == [False, True]
    assert sorted(path.name for path in (stage / "s.zarr-01/toy/image/c").iterdir()) == ["0", "1"]
