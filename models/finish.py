"""The end of a training: last validation, weights, model card, predictions, and done.json as the last file."""

from __future__ import annotations

import json
from typing import Any

from models.distributed import any_rank, barrier, broadcast_buffers
from models.export import DONE, model_card, write_text_whole, write_weights
from models.metrics import read_metrics
from models.predict import predict_cases
from models.state import Stop, Stopped, TrainingState
from models.validate import validate


def finish_training(state: TrainingState, stop: Stop) -> None:
    """Write all that a finished training leaves; every rank calls this. Doing it again writes the same files.

    Raises Stopped when told to stop: the last checkpoint exists already, so the next start ends up here again.
    """
    if validate(state, stop, force=True) or any_rank([stop()], state.world)[0]:
        raise Stopped(f"training {state.config.name} was stopped before its results were written")
    broadcast_buffers(state.objective, state.world)
    state.model.eval()
    predicted = predict_cases(state, stop) if state.config.predict else 0
    barrier(state.world)
    if state.world.is_main:
        _write_results(state, predicted)
    barrier(state.world)


def _write_results(state: TrainingState, predicted: int) -> None:
    digest = write_weights(state.folder, state.objective.exports())
    facts: dict[str, Any] = {
        "training": state.config.name,
        "weights_digest": digest,
        "config_digest": state.config.content_digest(),
        "selection_digest": state.selection_digest,
        "init_digest": state.init_digest,
        "world_sizes": state.world_sizes,
        "step": state.step,
        "predictions": predicted,
        "metrics": _last_metrics(state),
    }
    config = {"training": state.config.model_dump(mode="json"), "spec": state.store.spec.model_dump(mode="json")}
    write_text_whole(state.folder / "config.json", json.dumps(config, indent=1) + "\n")
    write_text_whole(state.folder / "model_card.md", model_card(state.config, state.selection, facts, facts["metrics"]))
    write_text_whole(state.folder / DONE, json.dumps(facts, indent=1, allow_nan=False) + "\n")


def _last_metrics(state: TrainingState) -> dict[str, float]:
    lines = [line for line in read_metrics(state.folder) if line["kind"] == "val"]
    return lines[-1]["metrics"] if lines else {}
