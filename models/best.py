"""Best by validation: whole validation cases are looked at every few epochs, and the best weights so far are kept.

The metric is that of the scores (mean Dice over cases and regions, or AUROC), not the loss on crops. Its best value
and weights are part of every checkpoint, so a killed training chooses as an undisturbed one. Of equal values the
earlier step wins. Test cases are never looked at.
"""

from __future__ import annotations

import logging
from typing import Any

from models.distributed import gather_objects
from models.heartbeat import beat
from models.schedule import is_due
from models.selection import of_role
from models.state import Stop, TrainingState, evaluating
from models.validate import is_logged

log = logging.getLogger(__name__)

Assessed = list[tuple[int, list[float]]]
"""Place of a case among the validation cases, and what the objective says of it."""


def look(state: TrainingState, stop: Stop) -> bool:
    """Look at the validation cases when the current step is due and was not looked at; every rank calls this.

    Leaves training untouched. When any rank is told to stop it gives up and returns True on all ranks; the continued
    training then looks at that step.
    """
    if not is_due(state.plan, state.step, state.config.select_every) or state.best.looked == state.step:
        return False
    cases = of_role(state.selection, "val")
    if not cases:
        return False
    assessed, stopped = _assess(state, stop)
    parts = gather_objects((assessed, stopped), state.world)
    if any(gave_up for _, gave_up in parts):
        return True
    everything = sorted(item for found, _ in parts for item in found)
    _take(state, state.objective.summarise([values for _, values in everything]))
    return False


def _assess(state: TrainingState, stop: Stop) -> tuple[Assessed, bool]:
    """Return what this rank found: cases r, r + world, ...; and whether it gave up."""
    dataset = state.dataset("val")
    found: Assessed = []
    with evaluating(state):
        for index in range(state.world.rank, len(dataset), state.world.size):
            beat(f"looking at validation case {index + 1} of {len(dataset)}", state.step)
            if stop():
                return found, True
            found.append((index, state.objective.assess(dataset.info(index), dataset.reader(index))))
    return found, False


def _take(state: TrainingState, value: float | None) -> None:
    best, metric = state.best, state.objective.selection_metric
    best.metric, best.looked, best.looks = metric, state.step, best.looks + 1
    if value is None:
        if state.world.is_main:
            log.warning("training %s: %s is undefined on the validation cases", state.config.name, metric)
        return
    if best.value is None or value > best.value:
        best.step, best.value = state.step, value
        best.weights = {name: tensor.detach().cpu().clone() for name, tensor in state.objective.state_dict().items()}
    if not is_logged(state, "select"):
        record = {"kind": "select", "step": state.step, "epoch": state.finished_epoch, "metrics": {metric: value}}
        state.log(record)


def use_best(state: TrainingState) -> dict[str, Any]:
    """Load the best weights, if any were chosen, and return what done.json says of the choice."""
    best = state.best
    if best.value is None:
        return {"rule": "last step", "step": state.step, "why": _why_last(state)}
    state.objective.load_state_dict(best.weights)
    chosen = {"rule": f"best {best.metric} of the validation cases", "step": best.step, "value": best.value}
    return {**chosen, "looks": best.looks, "cases": len(of_role(state.selection, "val"))}


def _why_last(state: TrainingState) -> str:
    if not state.config.select_every:
        return "select_every is 0"
    if not of_role(state.selection, "val"):
        return "the selection has no validation case"
    return f"{state.best.metric} is undefined on the validation cases (a class is absent)"
