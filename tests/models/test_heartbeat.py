"""Signs of life: written in place, read back by rank, silent when nobody listens."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from models.heartbeat import FOLDER, WIDTH, beat, beating, read_beats


def test_the_last_beat_of_each_rank_is_read_back(tmp_path: Path) -> None:
    before = time.time()
    with beating(tmp_path, rank=1):
        beat("validating batch 1 of 3", 7)
        beat("reading data")
        with beating(tmp_path, rank=0):
            beat("computing", 8)
        beat("saving a checkpoint")
    first, second = read_beats(tmp_path)
    assert (first["rank"], first["doing"], first["step"]) == (0, "computing", 8)
    assert (second["rank"], second["doing"], second["step"]) == (1, "saving a checkpoint", 7)
    assert (second["pid"], second["host"]) == (os.getpid(), socket.gethostname()[:64])
    assert read_beats(tmp_path, since=before) == [first, second]
    assert read_beats(tmp_path, since=time.time() + 60) == [], "beats of an earlier launch say nothing"


def test_a_beat_overwrites_the_one_before_and_long_words_are_cut(tmp_path: Path) -> None:
    with beating(tmp_path, rank=0):
        beat("staging " + "x" * 2000)
        beat("done")
    path = tmp_path / FOLDER / "rank-0.json"
    assert path.stat().st_size == WIDTH
    assert read_beats(tmp_path)[0]["doing"] == "done"


def test_outside_of_a_training_nothing_is_written_and_half_a_beat_is_left_out(tmp_path: Path) -> None:
    beat("reading data", 3)
    assert read_beats(tmp_path) == []
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "rank-0.json").write_text('{"rank": 0, "doi')
    assert read_beats(tmp_path) == []
