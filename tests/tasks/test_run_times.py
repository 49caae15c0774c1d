"""The shares of predicting and scoring in a report: from what trainings and kept scores recorded."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pandas as pd

from models.config import TrainingConfig
from models.predict_times import PredictTimes, read_times, write_times
from tasks.finetune import Finetuning
from tasks.run_times import time_shares
from tasks.scores import COLUMNS, RowKey, score_path, write_scores


def test_seconds_are_summed_over_the_trainings_that_recorded_both(tmp_path: Path) -> None:
    trainings = []
    for row in ("pre-trained", "scratch", "older"):
        folder = tmp_path / row
        folder.mkdir()
        trainings.append(Finetuning("b", row, 0, folder, cast("TrainingConfig", None)))
        if row != "older":
            write_times(folder, PredictTimes(seconds=45, cases=10, ranks=1))
        path = score_path(tmp_path / "scores", RowKey("b", row, 0))
        write_scores(pd.DataFrame(columns=list(COLUMNS)), path, "x", seconds=5)
    assert time_shares(trainings, tmp_path / "scores") == [
        ("time of predicting", "90.0 s for 20 test cases of 2 trainings, one after the other"),
        ("time of scoring", "10.0 s, 10.0% of both"),
    ]
    assert read_times(tmp_path / "older") is None
    assert time_shares(trainings[2:], tmp_path / "scores") == []
