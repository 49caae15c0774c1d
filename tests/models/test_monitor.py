"""An early look at collapse, and probes of a phenotype, at validations of a pre-training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_phantoms import make_training, write_blobs

from models.distributed import World
from models.metrics import read_metrics
from models.monitor import collapse_warning, feature_metrics, pooled_features, split_views
from models.monitor_probe import plan_probe, probe_scores
from models.records import SelectedCase
from models.state import Stopped, start_training
from models.trainer import train
from models.validate import validate

WORLD = World(0, 1, torch.device("cpu"))
Blobs = tuple[str, list[SelectedCase]]


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Blobs:
    """Return a store of 12 cases: 7 train, 4 validate, one is left out by its role."""
    url = str(tmp_path_factory.mktemp("monitor") / "blobs.zarr")
    cases = write_blobs(url, cases=12)
    return url, [case.replace(role="val") if 7 <= case.row <= 10 else case for case in cases]


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder) if line["kind"] == kind]


def test_features_that_coincide_have_rank_one_and_spread_ones_more() -> None:
    same = torch.ones(6, 5)
    collapsed = feature_metrics([(same[:4], same[:4]), (same[4:], same[4:])])
    assert collapsed["feature_rank"] == pytest.approx(1.0, abs=1e-3)
    assert collapsed["feature_uniformity"] == pytest.approx(0.0, abs=1e-4)
    assert collapsed["feature_alignment"] == pytest.approx(0.0)
    spread = feature_metrics([(torch.eye(6, 8) * 3, torch.eye(6, 8))])
    assert spread["feature_rank"] == pytest.approx(6.0, abs=1e-3), "lengths do not count"
    assert spread["feature_uniformity"] == pytest.approx(-4.0, abs=1e-3)


def test_all_batches_and_ranks_count_together() -> None:
    one, two = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    whole = feature_metrics([(one, two)])
    assert feature_metrics([(one[:2], two[:2]), (one[2:], two[2:])]) == pytest.approx(whole)
    assert feature_metrics([(one[:1], two[:1])]) == {}, "one case says nothing"
    assert feature_metrics([]) == {}


def test_people_are_warned_below_the_limit_with_the_numbers() -> None:
    text = collapse_warning({"feature_rank": 1.204}, 8, limit=1.5)
    assert text.startswith("features may have collapsed: the effective rank over 8 validation cases is 1.20, below")
    assert "rank_limit 1.5; look at feature_uniformity" in text
    assert collapse_warning({"feature_rank": 1.6}, 8, limit=1.5) == ""
    assert collapse_warning({"feature_rank": 1.0}, 3, limit=1.5) == "", "too few cases"
    assert collapse_warning({}, 8, limit=1.5) == ""


def test_pooled_features_are_those_of_the_last_stage_and_both_views() -> None:
    encoder = nn.Module()
    encoder.forward = lambda x: (x, x * 2)  # type: ignore[method-assign]
    x = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 2, 2, 2)
    with pooled_features(encoder) as together:
        encoder(x)
    with pooled_features(encoder) as in_turn:
        encoder(x[:2]), encoder(x[2:])
    encoder(x)
    assert len(together) == 1, "nothing is kept outside of the block"
    for pooled in (together, in_turn):
        one, two = split_views(pooled)
        assert one[:, 0].tolist() == [0.0, 2.0]
        assert two[:, 0].tolist() == [4.0, 6.0]
        assert one.shape == (2, 3)


def test_a_validation_logs_features_over_all_its_cases(blobs: Blobs, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    state = start_training(make_training(folder, *blobs), folder, WORLD)
    assert not validate(state, lambda: False, force=True)
    metrics = lines(folder, "val")[0]["metrics"]
    assert 1.0 < metrics["feature_rank"] <= 4.0
    assert {"feature_alignment", "feature_uniformity", "embedding_rank", "psnr_model"} <= metrics.keys()


def test_a_collapsed_encoder_is_warned_of_in_the_log_and_the_line(
    blobs: Blobs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "a"
    state = start_training(make_training(folder, *blobs), folder, WORLD)
    with torch.no_grad():
        state.objective.encoder.norm.weight.zero_()
        state.objective.encoder.norm.bias.fill_(1.0)
    with caplog.at_level(logging.WARNING):
        validate(state, lambda: False, force=True)
    line = lines(folder, "val")[0]
    assert line["metrics"]["feature_rank"] == pytest.approx(1.0, abs=1e-3)
    assert "the effective rank over 4 validation cases is 1.00, below rank_limit 1.5" in line["warning"]
    assert "training a, step 0: features may have collapsed" in caplog.text


PROBED = {"running": {"probe_every": 2}, "epochs": 4}
"""7 training cases and 2 a step: epochs end in steps 4, 7, 11 and 14; every second is probed."""


@pytest.fixture(scope="module")
def undisturbed(blobs: Blobs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probed") / "a"
    train(make_training(folder, *blobs, **PROBED), folder, WORLD)
    return folder


def test_probes_come_every_few_epochs_and_at_the_end(undisturbed: Path) -> None:
    found = lines(undisturbed, "probe")
    assert [line["step"] for line in found] == [7, 14]
    assert all((line["n_train"], line["n_val"]) == (7, 4) for line in found)
    assert found[0]["measure"] == "balanced accuracy"
    assert found[0]["metrics"].keys() == {"probe_knn", "probe_linear", "probe_chance"}
    assert found[0]["metrics"]["probe_chance"] == 0.5
    done = json.loads((undisturbed / "done.json").read_text())
    assert done["probe"] == found[-1]
    card = (undisturbed / "model_card.md").read_text()
    assert "Probe of the phenotype at step 14" in card
    assert "fitted on 7 training cases, scored on 4 validation cases" in card


def test_probes_change_no_bit_of_the_training(blobs: Blobs, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    train(make_training(folder, *blobs, epochs=4), folder, WORLD)
    digests = {json.loads((f / "done.json").read_text())["weights_digest"] for f in (folder, undisturbed)}
    assert len(digests) == 1
    assert lines(folder, "probe") == []


def test_a_probe_that_is_stopped_is_made_by_the_continued_training(
    blobs: Blobs, undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    config = make_training(folder, *blobs, validate_every=0, **PROBED)
    asked = iter([False] * 7 + [True])  # once a step, then by the probe of step 7
    with pytest.raises(Stopped, match="was stopped at step 7 of 14"):
        train(config, folder, WORLD, lambda: next(asked))
    assert lines(folder, "probe") == []
    train(config, folder, WORLD)
    assert lines(folder, "probe") == lines(undisturbed, "probe")


def test_without_targets_there_is_one_word_and_no_probe(
    blobs: Blobs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "a"
    config = make_training(
        folder, blobs[0], [case.replace(target="") for case in blobs[1]], epochs=1, running={"probe_every": 1}
    )
    with caplog.at_level(logging.WARNING):
        train(config, folder, WORLD)
    assert "two or more different targets and a validation case with one; choose another phenotype" in caplog.text
    assert lines(folder, "probe") == []


def test_the_modality_that_most_cases_have_is_probed(blobs: Blobs, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    state = start_training(make_training(folder, *blobs), folder, WORLD)
    datasets = {"train": state.dataset("train"), "val": state.dataset("val")}
    plan = plan_probe(datasets, ("bold", "t1c", "t1", "t2"))
    assert plan is not None
    # Every third case lacks the third channel; the first one has no template.
    assert plan.channel == 1
    assert len(plan.cases) == 11
    lacking = plan_probe(datasets, ("bold", "gm", "t1", "bold"))
    assert lacking is not None
    assert [(role, i) for role, i in lacking.cases if role == "val"] == [("val", 0), ("val", 1), ("val", 3)]
    assert plan_probe(datasets, ("bold", "gm", "bold", "gm")) is None


def test_probes_find_what_features_hold_and_nothing_in_noise() -> None:
    rng = np.random.default_rng(0)
    targets = ["control", "patient"] * 30
    signal = np.array([[3.0 * (t == "patient"), 0.0] for t in targets]) + rng.normal(size=(60, 2))
    noise = rng.normal(size=(60, 2))
    measure, good = probe_scores(signal[:40], targets[:40], signal[40:], targets[40:])
    assert measure == "balanced accuracy"
    assert min(good["probe_knn"], good["probe_linear"]) > 0.8
    _, bad = probe_scores(noise[:40], targets[:40], noise[40:], targets[40:])
    assert max(bad["probe_knn"], bad["probe_linear"]) < 0.8


def test_numbers_are_regressed() -> None:
    rng = np.random.default_rng(0)
    ages = rng.uniform(20, 80, 60)
    features = F.normalize(torch.from_numpy(np.stack([ages, 80 - ages, np.full(60, 50.0)], axis=1))).numpy()
    words = [f"{age:g}" for age in ages]
    measure, scores = probe_scores(features[:40], words[:40], features[40:], words[40:])
    assert measure == "R2"
    assert min(scores["probe_knn"], scores["probe_linear"]) > 0.9
    assert scores["probe_chance"] == 0.0
    assert probe_scores(features[:40], words[:40], features[40:41], words[40:41])[1]["probe_knn"] == 0.0
    few = [str(k % 3) for k in range(60)]
    assert probe_scores(features[:40], few[:40], features[40:], few[40:])[0] == "balanced accuracy"


def test_a_class_that_no_training_case_has_counts_as_missed() -> None:
    features = np.array([[0.0], [0.1], [5.0], [5.1]])
    _, scores = probe_scores(features, ["a", "a", "b", "b"], np.array([[0.0], [5.0]]), ["a", "c"])
    assert scores["probe_linear"] == pytest.approx(0.5)
