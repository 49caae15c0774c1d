"""The benchmark of predicting and scoring runs through on tiny cases and says what it measured. No time is asserted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import scoring
from bench.inputs import centred
from models.recipes import TINY_NETWORK
from models.spec import PreprocessSpec

GRID = (48, 52, 44)


def test_shares_are_those_of_both() -> None:
    measured = scoring.Measured(
        cases=4, predicting=90.0, scoring={1: 10.0, 2: 30.0}, threads=2, chosen=1, cpu=(99.0, 1.0)
    )
    assert (measured.share(1), measured.share(2)) == (0.1, 0.25)
    text = scoring.report(measured)
    assert "| predicting, 2 threads | 90.0 | 22.50 |" in text
    assert "Share of scoring: 10.0% (1 worker), 25.0% (2 workers); bounded by inference with the 1 that an" in text
    assert "takes: met; 4 cases stand for 40" in text
    assert "Processor seconds of both, one worker: 99.0 and 1.0 s, 1.0%." in text


@pytest.mark.full
def test_what_is_predicted_is_scored(tmp_path: Path) -> None:
    x, y, z = np.meshgrid(*(np.linspace(-1.1, 1.1, n) for n in (40, 44, 36)), indexing="ij")
    brain = np.where(x**2 + y**2 + z**2 < 1, 0.5 + 0.3 * x + 0.1 * y * z, 0).astype(np.float32)
    spec = PreprocessSpec(name="bench", grid=GRID)
    measured = scoring.measure(tmp_path, centred(brain, GRID), spec, TINY_NETWORK.replace(in_channels=4), 16, 2)
    assert measured.predicting > 0
    assert all(seconds > 0 for seconds in measured.scoring.values())
