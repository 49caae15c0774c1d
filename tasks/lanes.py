"""Running prepared fine-tunings: several at a time, each a process group of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tasks.finetune import Finetuning, read_json

Launch = Callable[..., Any]
"""tasks.launch.launch(run_dirs, world_size, on_progress)."""

POLL_SECONDS = 0.5


class LaneError(RuntimeError):
    """Raised inside a lane when another part of the evaluation has failed or was cancelled."""


def lanes(trainings: Sequence[Finetuning], count: int) -> list[list[Path]]:
    """Deal the folders of trainings to launch to `count` lanes, in turn; empty lanes are left out.

    These are the unfinished ones, and finished ones whose predictions are missing or damaged.
    """
    todo = [training.folder for training in trainings if training.to_launch]
    return [lane for lane in (todo[k::count] for k in range(count)) if lane]


def run_lanes(
    trainings: Sequence[Finetuning],
    count: int,
    launch: Launch,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> int:
    """Run the trainings that are to launch in `count` parallel single-process groups; return how many were run.

    When a lane fails the others are finished first: finished work stays. When the caller is interrupted, every lane is
    stopped at its next report.
    """
    parts = lanes(trainings, count)
    if not parts:
        return 0
    stop = threading.Event()
    lines: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def report(line: dict[str, Any]) -> None:
        if stop.is_set():
            raise LaneError("the evaluation was stopped; run it again to continue from the last checkpoints")
        lines.put(line)

    # The launching thread must outlive its ranks: PDEATHSIG fires when the thread that started them ends.
    with ThreadPoolExecutor(len(parts), thread_name_prefix="lane") as pool:
        futures = [pool.submit(launch, lane, world_size=1, on_progress=report) for lane in parts]
        try:
            _follow(futures, lines, on_progress)
        except BaseException:
            stop.set()
            raise
        for future in futures:
            future.result()
    if unfinished := [_why_unfinished(training) for training in trainings if training.to_launch]:
        raise RuntimeError(f"{len(unfinished)} trainings did not end as asked, first {unfinished[0]}")
    return sum(len(lane) for lane in parts)


def _why_unfinished(training: Finetuning) -> str:
    done = read_json(training.folder / "done.json")
    if done is None:
        return f"{training.folder.name!r}: it ended without done.json; see its log"
    if training.finished:
        return f"{training.folder.name!r}: it was predicted again, and still {training.damage}"
    return (
        f"{training.folder.name!r}: its done.json belongs to another config ({done.get('config_digest')}, asked for is "
        f"{training.config.content_digest()}); move the folder away and run again"
    )


def _follow(
    futures: Sequence[Future[Any]],
    lines: SimpleQueue[dict[str, Any]],
    on_progress: Callable[[dict[str, Any]], None] | None,
) -> None:
    """Hand the lanes' lines to the caller in the caller's own thread, which alone knows the running flow."""
    pending = set(futures)
    while pending:
        _, pending = wait(pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        while not lines.empty():
            line = lines.get()
            if on_progress is not None:
                on_progress(line)
