"""Progress of one stage, in the terminal (rich on a TTY, lines else) and as a Prefect progress artifact."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectHTTPStatusError
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from flows.artifacts import artifact_key, in_run
from infra import gauges
from infra.log_lines import doing, is_asked_for, json_line

ARTIFACT_EVERY_S = 2.0
LINE_EVERY_S = 10.0
_log = logging.getLogger(__name__)


class Progress:
    """Context manager of one stage: `with Progress("preprocess", 300, "cases") as progress: progress.update(12)`.

    `unit` is a plural noun. Rate and ETA are measured from the first update on, so what was found finished when the
    stage began (a resume) does not count as speed.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        unit: str,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done = 0
        self.quarantined = 0
        self.note = ""
        self._console = console or Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._clock = clock
        self._began = self._artifact_at = self._line_at = 0.0
        self._first: tuple[float, int] | None = None
        self._artifact: UUID | None = None
        self._context = ExitStack()
        self._bar: RichProgress | None = None
        self._task: Any = None

    def __enter__(self) -> Self:
        gauges.serve_if_asked()
        self._context.enter_context(doing(stage=self.stage))
        self._began = self._clock()
        self._line_at = self._began
        if self._console.is_terminal and not is_asked_for():
            columns = (TextColumn("{task.description:<12}"), BarColumn(None), TextColumn("{task.fields[line]}"))
            self._bar = RichProgress(*columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task(self.stage, total=max(self.total, 1), line=self.line())
        self._publish()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.note = f"stopped by {kind.__name__}"
        self._show()
        if self._bar:
            self._bar.stop()
        seconds = self._clock() - self._began
        self._say(f"{self.stage}: {self.line()} ({duration(seconds)} in all)")
        self._publish()
        self._context.close()

    def update(self, done: int, quarantined: int = 0, note: str = "") -> None:
        """Set how many are done in all, how many of those are in quarantine, and a short note."""
        now = self._clock()
        self.done, self.quarantined, self.note = done, quarantined, note
        if self._first is None:
            self._first = (now, done)
        self._show()
        if not self._bar and now - self._line_at >= LINE_EVERY_S:
            self._line_at = now
            self._say(f"{self.stage}: {self.line()}")
        if now - self._artifact_at >= ARTIFACT_EVERY_S:
            self._publish()

    def rate(self) -> float:
        """Return units per second since the first update; 0 while unknown."""
        if self._first is None:
            return 0.0
        began, before = self._first
        seconds = self._clock() - began
        return (self.done - before) / seconds if seconds > 0 else 0.0

    def line(self) -> str:
        """Return done, quarantined, left, rate and ETA in one line."""
        left = max(0, self.total - self.done)
        parts = [f"{self.done}/{self.total} {self.unit}"]
        if self.quarantined:
            parts.append(f"{self.quarantined} quarantined")
        if left and (rate := self.rate()) > 0:
            parts += [f"{left} left", f"{rate:.3g} {self.unit}/s", f"ETA {duration(left / rate)}"]
        if self.note:
            parts.append(self.note)
        return ", ".join(parts)

    def _say(self, text: str) -> None:
        if is_asked_for():
            print(json_line(__name__, text), file=self._console.file, flush=True)
        else:
            self._console.print(text, markup=False)

    def _show(self) -> None:
        told = {"done": self.done, "total": self.total, "quarantined": self.quarantined, "per_second": self.rate()}
        for name, value in told.items():
            gauges.tell(f"brainloom_{name}", self.stage, value)
        if self._bar:
            self._bar.update(self._task, completed=self.done if self.total else 1, line=self.line())

    def _publish(self) -> None:
        if not in_run():
            return
        self._artifact_at = self._clock()
        percent = 100.0 * min(1.0, self.done / self.total) if self.total else 100.0
        text = f"**{self.stage}**: {self.line()}"
        try:
            if self._artifact is None:
                self._artifact = _created(percent, f"progress-{self.stage}", text)
            else:
                update_progress_artifact(self._artifact, percent, description=text)
        except (PrefectHTTPStatusError, httpx.HTTPError) as error:
            _log.warning("progress not published: %s: %s", type(error).__name__, error)


def duration(seconds: float) -> str:
    """Return seconds as `42 s`, `3 min 05 s` or `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _created(percent: float, key: str, text: str) -> UUID:
    created: Any = create_progress_artifact(percent, key=artifact_key(key), description=text)
    return UUID(str(created))
