"""What an evaluation's time went into: predicting the test cases, or scoring what was predicted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models.predict_times import read_times
from tasks.finetune import Finetuning
from tasks.scores import RowKey, score_path, scoring_seconds


def time_shares(trainings: Sequence[Finetuning], scores: Path) -> list[tuple[str, str]]:
    """Return the seconds of predicting and of scoring, by the clock, summed over the trainings that recorded both.

    scores: folder of the kept scores. Scores of baselines are not among them. Empty when no training recorded both.
    """
    predicting = scoring = 0.0
    cases = known = 0
    for one in trainings:
        times = read_times(one.folder)
        scored = scoring_seconds(score_path(scores, RowKey(one.benchmark, one.row, one.seed)))
        if times is None or scored is None:
            continue
        predicting, scoring = predicting + times.seconds, scoring + scored
        cases, known = cases + times.cases, known + 1
    if not known:
        return []
    share = scoring / max(predicting + scoring, 1e-9)
    return [
        ("time of predicting", f"{predicting:.1f} s for {cases} test cases of {known} trainings, one after the other"),
        ("time of scoring", f"{scoring:.1f} s, {share:.1%} of both"),
    ]
