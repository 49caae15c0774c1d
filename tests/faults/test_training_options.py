"""Staging, loader processes, TensorBoard and probes together, on two ranks, one of which is killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_phantoms import make_training, write_blobs
from training_processes import done, killer, losses

from models.heartbeat import read_beats
from models.metrics import read_metrics
from tasks.launch import launch

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
EPOCHS = 12
"""18 steps on two ranks; every fourth epoch ends in steps 6, 12 and 18."""


def test_all_options_on_two_ranks_survive_a_kill_and_change_no_bit(tmp_path: Path) -> None:
    url = str(tmp_path / "blobs.zarr")
    cases = write_blobs(url)
    plain, full = tmp_path / "plain", tmp_path / "full"
    make_training(plain, url, cases, world_size=2, epochs=EPOCHS)
    launch([plain], 2)
    running = {"stage_dir": str(tmp_path / "cache"), "tensorboard": True, "probe_every": 4}
    config = make_training(full, url, cases, world_size=2, epochs=EPOCHS, running=running)
    (full / "run.json").write_text(config.replace(data=config.data.replace(workers=1)).model_dump_json())
    launch([full], 2, killer("1", step=7), restarts=1)
    assert "exitcode  : -9" in (full / "train.log").read_text()
    assert done(full)["weights_digest"] == done(plain)["weights_digest"]
    assert losses(full) == losses(plain)
    probes = [line for line in read_metrics(full) if line["kind"] == "probe"]
    assert [(line["step"], line["n_train"], line["n_val"]) for line in probes] == [(6, 6, 1), (12, 6, 1), (18, 6, 1)]
    events = EventAccumulator(str(full / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 19))
    assert [event.step for event in events.Scalars("probe/probe_knn")] == [6, 12, 18]
    receipts = list((tmp_path / "cache").glob("*/.staged/blobs/*.json"))
    assert {json.loads(path.read_text())["digest"] for path in receipts} == {case.digest for case in cases}
    assert not list((tmp_path / "cache").glob(".claims/*.json")), "nobody trains any more"
    assert [beat["rank"] for beat in read_beats(full)] == [0, 1]
