"""Entry of every training: `python -m torch.distributed.run ... -m models.train --config A/run.json [--config ...]`.

The trainings run one after another in the same ranks; each finished one is skipped. SIGTERM finishes the current step,
writes a checkpoint and exits with 143.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import fcntl
import json
import logging
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from models.config import TrainingConfig
from models.distributed import World, any_rank, open_world
from models.exhausted import exhausted
from models.export import is_finished, write_text_whole
from models.predict import predict_again
from models.prediction_files import damage
from models.selection import read_selection, selection_digest
from models.state import Stop, Stopped
from models.trainer import train

log = logging.getLogger("models.train")

EXIT_STOPPED = 143
FAILURE = "failure.json"
"""Says why a training failed for a reason of its own, so that nobody restarts it in vain."""
LOCK = ".lock"
LOCK_WAIT_SECONDS = 60.0
"""For ranks of an earlier launch that are writing their last checkpoint."""
LOCK_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1


class FolderBusyError(ValueError):
    """Another process trains in the same folder."""


class StopFlag:
    """Set by SIGTERM and SIGINT; the loop asks it after each step."""

    def __init__(self) -> None:
        self.is_set = False

    def __call__(self) -> bool:
        """Return whether this process was told to stop."""
        return self.is_set

    def install(self) -> None:
        """Catch the signals in this process."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._catch)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True


def die_with_parent() -> None:
    """Ask Linux for a SIGTERM when the parent (torchrun's agent, or the launcher) dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the given trainings; return the exit code."""
    parser = argparse.ArgumentParser(prog="models.train", description=__doc__)
    parser.add_argument("--config", action="append", required=True, type=Path, help="run.json of a training folder")
    paths: list[Path] = parser.parse_args(arguments).config
    die_with_parent()
    # A launcher that sees no progress asks for the stack before it ends a hanging rank.
    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__ or sys.stderr, all_threads=False)
    # A depth-wise weight has one input channel, whose stride means nothing; DDP warns that it differs.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    stop = StopFlag()
    stop.install()
    with open_world() as world:
        logging.basicConfig(
            stream=sys.stdout,
            level=logging.INFO if world.is_main else logging.WARNING,
            format=f"%(asctime)s rank {world.rank} %(levelname)s %(message)s",
        )
        try:
            for path in paths:
                run_training(path, world, stop)
        except Stopped as order:
            log.warning("%s", order)
            return EXIT_STOPPED
    return 0


@contextmanager
def held_folder(folder: Path, world: World, stop: Stop) -> Iterator[None]:
    """Hold `<folder>/.lock` on rank 0; every rank calls this and goes on when rank 0 has it.

    The ranks hold it, not their launcher, so that those that outlive a killed launcher still keep others out. It ends
    with the process. Raises FolderBusyError on all ranks after LOCK_WAIT_SECONDS, Stopped when told to stop meanwhile.
    """
    if not world.is_main:
        _agree_on_lock(folder, world, True, stop)
        yield
        return
    with (folder / LOCK).open("ab") as file:
        _agree_on_lock(folder, world, _wait_for_lock(file.fileno(), folder, stop), stop)
        try:
            yield
        finally:
            # Closing is not enough: forked loader workers have the same open file.
            fcntl.flock(file, fcntl.LOCK_UN)


def _wait_for_lock(descriptor: int, folder: Path, stop: Stop) -> bool:
    deadline, told = time.monotonic() + LOCK_WAIT_SECONDS, False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if stop() or time.monotonic() >= deadline:
                return False
        if not told:
            log.info("another process trains in %s; waiting for up to %g s", folder, LOCK_WAIT_SECONDS)
            told = True
        time.sleep(LOCK_POLL_SECONDS)


def _agree_on_lock(folder: Path, world: World, has_lock: bool, stop: Stop) -> None:
    missing, stopping = any_rank([not has_lock, stop()], world)
    if missing and stopping:
        raise Stopped(f"training {folder.name} was stopped while another process held {folder / LOCK}")
    if missing:
        raise FolderBusyError(
            f"training folder {folder} is in use: another process has held {folder / LOCK} for {LOCK_WAIT_SECONDS:g} s "
            "and only one may train in a folder; wait for it or end it, then launch again"
        )


def run_training(path: Path, world: World, stop: StopFlag) -> None:
    """Run the training of one run.json, or skip it when it is finished.

    A failure of the training itself (not of the machine) is also written to failure.json beside the config, and so is
    a disk without room or a device without memory, which are raised as FullDiskError and NoMemoryError.
    """
    folder = path.resolve().parent
    try:
        config = TrainingConfig.model_validate_json(path.read_text(encoding="utf-8"))
        with held_folder(folder, world, stop):
            # Asked under the lock: the process that we waited for may have finished it.
            if is_finished(folder, config, selection_digest(read_selection(config.data.selection))):
                _mend_predictions(config, folder, world, stop)
                log.info("training %s is finished already", config.name)
                return
            if stop():
                raise Stopped(f"training {config.name} was stopped before its first step")
            train(config, folder, world, stop)
            log.info("training %s is finished", config.name)
    except (ValueError, ArithmeticError, TypeError, KeyError) as error:
        _tell_failure(folder, error, world)
        raise
    except Exception as error:
        if told := exhausted(folder, error):
            _tell_failure(folder, told, world)
            raise told from error
        raise


def _tell_failure(folder: Path, error: Exception, world: World) -> None:
    reason = {"type": type(error).__name__, "message": str(error), "rank": world.rank}
    with suppress(OSError):  # the disk may be the reason; the log has it, too
        write_text_whole(folder / FAILURE, json.dumps(reason) + "\n")


def _mend_predictions(config: TrainingConfig, folder: Path, world: World, stop: StopFlag) -> None:
    """Predict again from the weights of a finished training where its predictions are missing or damaged."""
    lost = damage(folder, config)
    # Agreed on by all ranks: one may look while another has begun to write.
    if any_rank([bool(lost)], world)[0]:
        log.warning("training %s is finished, but %s; predicting again", config.name, lost or "a rank misses a file")
        predict_again(config, folder, world, stop)


if __name__ == "__main__":
    sys.exit(main())
