"""Following trainings: each metrics line once, signs of life of this launch only."""

from __future__ import annotations

import json
import os
from pathlib import Path

from models.heartbeat import beat, beating
from tasks.follow import MetricsFollower, Vital


def test_the_follower_hands_on_each_record_once_also_after_a_resume(tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    follower = MetricsFollower([tmp_path], lambda line: seen.append((line["training"], line["step"])))
    path = tmp_path / "metrics.jsonl"

    def line(step: int) -> str:
        return json.dumps({"kind": "train", "step": step}) + "\n"

    assert not follower.poll()
    path.write_text(line(1) + line(2) + line(3)[:5])
    assert follower.poll()
    assert not follower.poll(), "half a line is no progress"
    with path.open("a") as file:
        file.write(line(3)[5:])
    assert follower.poll()
    (tmp_path / "new").write_text(line(1) + line(2))
    (tmp_path / "new").replace(path)  # a resumed training drops the lines after its checkpoint
    assert not follower.poll()
    with path.open("a") as file:
        file.write(line(3) + line(4))
    assert follower.poll()
    assert seen == [(tmp_path.name, step) for step in (1, 2, 3, 4)]


def test_beats_of_any_rank_are_signs_of_life(tmp_path: Path) -> None:
    vital = Vital([tmp_path / "a", tmp_path / "b"])
    assert not vital.poll()
    with beating(tmp_path / "b", rank=1):
        beat("averaging images, case 1 of 9")
        assert vital.poll()
        assert not vital.poll()
        beat("averaging images, case 2 of 9")
        assert vital.poll()


def test_beats_of_an_earlier_launch_are_not_reported_and_others_are_not_disturbed(tmp_path: Path) -> None:
    with beating(tmp_path, rank=0):
        beat("computing", 5)
    assert Vital([tmp_path]).diagnose({os.getpid()}) == ""
    vital = Vital([tmp_path])
    with beating(tmp_path, rank=0):
        beat("computing", 6)
        # This process would die of the signal that asks for a stack; it is not among those below the launcher.
        text = vital.diagnose(set())
    assert text.startswith("; last sign of life of rank 0: computing in step 6, ")
