"""The end of a training: last validation, weights, model card, predictions, and done.json as the last file."""

from __future__ import annotations

import json
from typing import Any

from models.best import look, use_best
from models.distributed import any_rank, barrier
from models.export import DONE, model_card, write_text_whole, write_weights
from models.finished import write_settings
from models.metrics import read_metrics
from models.monitor_probe import probe
from models.predict import predict_cases
from models.state import Stop, Stopped, TrainingState
from models.validate import validate


def finish_training(state: TrainingState, stop: Stop) -> None:
    """Write all that a finished training leaves; every rank calls this. Doing it again writes the same files.

    Raises Stopped when told to stop: the last checkpoint exists already, so the next start ends up here again.
    """
    stopped = f"training {state.config.name} was stopped before its results were written"
    if look(state, stop):
        raise Stopped(stopped)
    chosen = use_best(state)
    if validate(state, stop, force=True) or probe(state, stop) or any_rank([stop()], state.world)[0]:
        raise Stopped(stopped)
    predicted = predict_cases(state, stop) if state.config.predict else 0
    barrier(state.world)
    if state.world.is_main:
        _write_results(state, predicted, chosen)
    barrier(state.world)


def _write_results(state: TrainingState, predicted: int, chosen: dict[str, Any]) -> None:
    digest = write_weights(state.folder, state.objective.exports())
    facts: dict[str, Any] = {
        "training": state.config.name,
        "weights_digest": digest,
        "config_digest": state.config.content_digest(),
        "selection_digest": state.selection_digest,
        "init_digest": state.init_digest,
        "world_sizes": state.world_sizes,
        "step": state.step,
        "weights_of": chosen,
        "predictions": predicted,
        "metrics": _last(state, "val").get("metrics", {}),
        "probe": _last(state, "probe"),
        "timing": _timing(state),
    }
    write_settings(state.folder, state.config, state.store.spec)
    write_text_whole(state.folder / "model_card.md", model_card(state.config, state.selection, facts, facts["metrics"]))
    write_text_whole(state.folder / DONE, json.dumps(facts, indent=1, allow_nan=False) + "\n")


def _last(state: TrainingState, kind: str) -> dict[str, Any]:
    return next((line for line in reversed(read_metrics(state.folder)) if line["kind"] == kind), {})


def _timing(state: TrainingState) -> dict[str, float]:
    timing = state.timing
    return {
        "step_seconds": round(timing.seconds, 3),
        "data_wait_seconds": round(timing.data_wait_seconds, 3),
        "data_wait_share": round(timing.data_wait_share, 4),
    }
