"""Where the time of preprocessing goes: every second in one step, and none counted twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from nifti_files import SMALL
from store_builds import ingest, three_subjects

from infra import storage
from models import stopwatch
from models.stopwatch import measuring, step
from models.store import open_writer, store_digest
from tasks.plan import read_plans
from tasks.preprocess import preprocess_case
from tasks.timings import STEPS, largest_steps, timings_of, timings_rows, timings_url, write_timings


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(stopwatch, "time", made)
    return made


def test_a_second_counts_once_in_the_innermost_step(clock: Clock) -> None:
    @step("read")
    def read() -> None:
        clock.now += 2

    with measuring() as seconds:
        clock.now += 1
        with step("decode"):
            read()
            clock.now += 5
            read()
        clock.now += 3
    assert seconds == {"read": 4, "decode": 5, "other": 4}
    read()
    assert sum(seconds.values()) == clock.now - 2, "nothing is kept where nobody measures"


def test_what_raised_is_counted_as_well(clock: Clock) -> None:
    seconds: dict[str, float] = {}

    @step("decode")
    def cut() -> None:
        clock.now += 7
        raise ValueError("cut")

    with pytest.raises(ValueError, match="cut"), measuring(seconds):
        cut()
    assert seconds == {"decode": 7, "other": 0}


def test_the_steps_of_a_case_are_known_ones_and_its_digest_stays(tmp_path: Path) -> None:
    url = str(tmp_path / "s.zarr")
    ingest(url, three_subjects(tmp_path))
    before = store_digest(url)
    with measuring() as seconds:
        preprocess_case(read_plans(url)[0], SMALL, open_writer(url))
    assert set(seconds) <= set(STEPS)
    assert {"read", "decode", "resample", "scale", "quality", "encode", "write", "digest"} <= set(seconds)
    write_timings(url, timings_of(seconds, 1, 2.0, 1))
    assert storage.read_json(timings_url(url))["cases_per_second"] == 0.5
    assert store_digest(url) == before


def test_the_table_and_the_line_of_progress() -> None:
    timings = timings_of({"write": 1.0, "odd": 0.5, "read": 2.5}, cases=10, wall_seconds=5, workers=2)
    assert timings["seconds"] == {"read": 2.5, "write": 1.0, "odd": 0.5}
    first, *_, last = timings_rows(timings)
    assert first == {"step": "read", "what": STEPS["read"], "seconds": 2.5, "ms a case": 250.0, "share": "62.5%"}
    assert last["step"] == "odd"
    assert largest_steps(timings["seconds"], 2) == "read 62 %, write 25 %"
    assert largest_steps({}) == ""
    assert timings_of({}, 0, 0.0, 1)["cases_per_second"] == 0.0
