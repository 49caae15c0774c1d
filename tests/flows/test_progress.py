from __future__ import annotations

import io
import json
from uuid import UUID, uuid4

import pytest
from rich.console import Console

from flows import progress as module
from flows.progress import Progress, duration
from infra.log_lines import log_environment


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


def plain(out: io.StringIO) -> Console:
    return Console(file=out, force_terminal=False, width=200, soft_wrap=True, highlight=False)


def test_plain_lines_are_rare_and_tell_rate_and_eta(clock: Clock, out: io.StringIO) -> None:
    with Progress("preprocess", 100, "cases", console=plain(out), clock=clock) as progress:
        progress.update(20)  # found finished: no speed
        for step in range(1, 41):
            clock.now = step * 0.5
            progress.update(20 + step, quarantined=2)
        clock.now = 40.0
        progress.update(100, quarantined=2, note="finalised")
    assert out.getvalue().splitlines() == [
        "preprocess: 40/100 cases, 2 quarantined, 60 left, 2 cases/s, ETA 30 s",
        "preprocess: 60/100 cases, 2 quarantined, 40 left, 2 cases/s, ETA 20 s",
        "preprocess: 100/100 cases, 2 quarantined, finalised",
        "preprocess: 100/100 cases, 2 quarantined, finalised (40 s in all)",
    ]


def test_lines_are_json_objects_when_asked_for(clock: Clock, out: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in log_environment("json").items():
        monkeypatch.setenv(name, value)
    console = Console(file=out, force_terminal=True, width=40)  # no bar: it is no line
    with Progress("preprocess", 40, "cases", console=console, clock=clock) as progress:
        clock.now = 10.0
        progress.update(20, note=":warning: [a]\nand more")
        clock.now = 11.0
    lines = [json.loads(text) for text in out.getvalue().splitlines()]
    line = "preprocess: 20/40 cases, :warning: [a]\nand more"
    assert [one["message"] for one in lines] == [line, f"{line} (11 s in all)"]
    assert {(one["level"], one["logger"], one["stage"]) for one in lines} == {("INFO", "flows.progress", "preprocess")}


def test_an_error_is_named_and_passes(clock: Clock, out: io.StringIO) -> None:
    def work() -> None:
        with Progress("train", 10, "steps", console=plain(out), clock=clock) as progress:
            progress.update(3)
            raise KeyError("lost case")

    with pytest.raises(KeyError, match="lost case"):
        work()
    assert out.getvalue() == "train: 3/10 steps, stopped by KeyError (0 s in all)\n"


def test_nothing_to_do(clock: Clock, out: io.StringIO) -> None:
    with Progress("catalog", 0, "scans", console=plain(out), clock=clock):
        pass
    assert out.getvalue() == "catalog: 0/0 scans (0 s in all)\n"


def test_a_terminal_gets_a_bar(clock: Clock, out: io.StringIO) -> None:
    console = Console(file=out, force_terminal=True, width=120)
    with Progress("catalog", 4, "scans", console=console, clock=clock) as progress:
        progress.update(4)
    assert "━" in out.getvalue()
    assert "4/4 scans" in out.getvalue()


def test_the_artifact_is_throttled(monkeypatch: pytest.MonkeyPatch, clock: Clock, out: io.StringIO) -> None:
    calls: list[float] = []

    def create(percent: float, key: str, description: str) -> UUID:
        assert key == "progress-pre-training"
        calls.append(percent)
        return uuid4()

    monkeypatch.setattr(module, "in_run", lambda: True)
    monkeypatch.setattr(module, "create_progress_artifact", create)
    monkeypatch.setattr(module, "update_progress_artifact", lambda _, percent, description: calls.append(percent))
    with Progress("pre-training", 100, "steps", console=plain(out), clock=clock) as progress:
        for step in range(1, 101):
            clock.now = step / 20
            progress.update(step)
    # At the beginning, after 2 s, after 4 s, at the end.
    assert calls == [0.0, 40.0, 80.0, 100.0]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
