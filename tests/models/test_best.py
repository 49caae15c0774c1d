"""Best by validation: when it looks, what it keeps, that a kill changes nothing, and what is written down."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from training_phantoms import SPEC, make_training, write_blobs

from models.best import _assess
from models.checkpoint import CheckpointError, checkpoint_path, load_checkpoint
from models.config import ClassificationConfig, DataConfig, NetworkConfig, Region, SegmentationConfig, TrainingConfig
from models.data import CaseDataset
from models.distributed import World
from models.export import read_weights
from models.filling import learned_templates
from models.finished import read_training
from models.metrics import read_metrics
from models.objectives.classification import Classification
from models.objectives.segmentation import Segmentation, to_regions
from models.predict import load_objective, read_prediction
from models.predict_times import read_times
from models.records import SelectedCase
from models.schedule import is_due, plan_steps
from models.scoring import dice
from models.state import Stopped
from models.trainer import train

WORLD = World(0, 1, torch.device("cpu"))
REGIONS = (Region(name="TC", labels=(1, 3)), Region(name="WT", labels=(1, 2, 3)))
NETWORK = NetworkConfig(
    in_channels=4, embed_dims=(4, 8, 8, 16), depths=(1, 1, 1, 1), head_dim=8, mlp_ratio=1, decoder_dim=4
)
TUMOUR = SegmentationConfig(modalities=SPEC.modalities, regions=REGIONS, overlap=0.0)
CLASSES = ClassificationConfig(modalities=SPEC.modalities, classes=("control", "patient"))
STEPS, EPOCHS = 3, 3
"""Steps of an epoch (6 cases in batches of 2), and epochs."""


class Killed(BaseException):
    """Stands for kill -9: nothing may be saved after it."""


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[SelectedCase]]:
    url = str(tmp_path_factory.mktemp("best") / "blobs.zarr")
    return url, write_blobs(url)


def make(folder: Path, blobs: tuple[str, list[SelectedCase]], **changes: Any) -> TrainingConfig:
    data = DataConfig(store=blobs[0], selection=str(folder / "selection.parquet"), crop=(32, 32, 32), batch_size=2)
    values = {"network": NETWORK, "objective": TUMOUR, "data": data, "epochs": EPOCHS, "select_every": 1}
    more = {"validate_every": 0, "predict": True, "checkpoint_every": 2, "keep_checkpoints": 99}
    return make_training(folder, *blobs, **{**values, **more, **changes})


def scripted(monkeypatch: pytest.MonkeyPatch, *values: float | None) -> None:
    """Let the looks find these values, one after the other, however often a training is started again."""
    seen: dict[float, float | None] = {}
    script = iter(values)

    def summarise(self: Segmentation, assessed: list[list[float]]) -> float | None:
        key = weights_sum(self)
        return seen[key] if key in seen else seen.setdefault(key, next(script))

    monkeypatch.setattr(Segmentation, "assess", lambda *_: [0.0])
    monkeypatch.setattr(Segmentation, "summarise", summarise)


def weights_sum(objective: Segmentation) -> float:
    return float(next(objective.parameters()).detach().double().abs().sum())


def done(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "done.json").read_text())


def looks(folder: Path) -> list[tuple[int, dict[str, float]]]:
    return [(line["step"], line["metrics"]) for line in read_metrics(folder) if line["kind"] == "select"]


def test_it_looks_after_every_nth_epoch_and_at_the_end(tmp_path: Path, blobs: tuple[str, list[SelectedCase]]) -> None:
    plan = plan_steps(make(tmp_path / "a", blobs, epochs=7), cases=5, world_size=1)  # 2.5 steps an epoch
    assert plan.total_steps == 18
    assert [step for step in range(19) if is_due(plan, step, 2)] == [5, 10, 15, 18]
    assert [step for step in range(19) if is_due(plan, step, 1)] == [3, 5, 8, 10, 13, 15, 18]
    assert not any(is_due(plan, step, 0) for step in range(19))


@pytest.mark.parametrize(("values", "best"), [((0.2, 0.6, 0.4), 1), ((0.5, 0.1, 0.5), 0), ((0.1, 0.2, 0.3), 2)])
def test_the_best_weights_are_exported_and_predict(
    tmp_path: Path,
    blobs: tuple[str, list[SelectedCase]],
    monkeypatch: pytest.MonkeyPatch,
    values: tuple[float, ...],
    best: int,
) -> None:
    scripted(monkeypatch, *values)
    folder = tmp_path / "a"
    config = (make if best == 1 else quick)(folder, blobs, checkpoint_every=1)
    train(config, folder, WORLD)
    step = STEPS * (best + 1)
    assert done(folder)["weights_of"] == {
        "rule": "best mean_dice of the validation cases", "step": step, "value": values[best], "looks": 3, "cases": 1,
    }  # fmt: skip
    card = (folder / "model_card.md").read_text()
    chosen = f"the best mean_dice of the validation cases: {values[best]:.4f} (looks: 3, cases: 1)"
    assert f"- weights: of step {step}, {chosen}" in card
    tensors, _ = read_weights(folder)
    kept = load_checkpoint(checkpoint_path(folder, step))["model"]
    assert all(torch.equal(value, kept[name]) for name, value in tensors.items())
    assert [step for step, _ in looks(folder)] == [3, 6, 9]
    if not config.predict:
        return
    objective = load_objective(folder)
    case = blobs[1][-1]
    dataset = CaseDataset(blobs[0], [case], objective.sampler(), "test")
    found = objective.predict(dataset.info(0), dataset.reader(0))["regions"]
    np.testing.assert_array_equal(found, read_prediction(folder, f"{case.case}.npz")["regions"])
    times = read_times(folder)
    assert times is not None
    assert (times.cases, times.ranks) == (sum(one.role == "test" for one in blobs[1]), 1)


def quick(folder: Path, blobs: tuple[str, list[SelectedCase]], **changes: Any) -> TrainingConfig:
    """A training with crops of 16^3 that predicts nothing."""
    config = make(folder, blobs, predict=False, **changes)
    return config.replace(data=config.data.replace(crop=(16, 16, 16)))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let looks find a number that depends on the weights alone."""
    monkeypatch.setattr(Segmentation, "assess", lambda *_: [0.0])
    monkeypatch.setattr(Segmentation, "summarise", lambda self, _: weights_sum(self) * 1000 % 1)


# The stop flag is asked once a step, once a looked-at case and at the end: 3 steps, a look, 3 steps, a look, ...
@pytest.mark.parametrize("asked", [3, 5, 7, 13])
def test_a_killed_training_chooses_the_same_weights(
    blobs: tuple[str, list[SelectedCase]], tmp_path: Path, drawn: None, asked: int
) -> None:
    calls = iter(range(1000))

    def stop() -> bool:
        if next(calls) == asked:
            raise Killed
        return False

    train(quick(tmp_path / "a", blobs), tmp_path / "a", WORLD)
    config = quick(tmp_path / "b" / "a", blobs)
    with pytest.raises(Killed):
        train(config, tmp_path / "b" / "a", WORLD, stop)
    train(config, tmp_path / "b" / "a", WORLD)
    undisturbed, killed = done(tmp_path / "a"), done(tmp_path / "b" / "a")
    for key in ("weights_digest", "weights_of", "metrics"):
        assert killed[key] == undisturbed[key]
    assert looks(tmp_path / "b" / "a") == looks(tmp_path / "a")


@pytest.mark.parametrize("asked", [3, 6], ids=["while looking", "after a look"])
def test_the_best_so_far_survives_a_kill_after_it(
    blobs: tuple[str, list[SelectedCase]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    scripted(monkeypatch, 0.9, 0.1, 0.2)
    folder = tmp_path / "a"
    config = quick(folder, blobs)
    answers = iter([False] * asked + [True])
    with pytest.raises(Stopped):
        train(config, folder, WORLD, lambda: next(answers))
    train(config, folder, WORLD)
    assert done(folder)["weights_of"]["step"] == 3
    assert done(folder)["weights_of"]["looks"] == 3


@pytest.mark.parametrize(
    ("changes", "roles", "why"),
    [
        ({"select_every": 0}, {}, "select_every is 0"),
        ({}, {"val": "train"}, "the selection has no validation case"),
        ({"objective": CLASSES}, {}, "auroc is undefined on the validation cases (a class is absent)"),
    ],
)
def test_otherwise_the_last_weights_are_taken_and_the_card_says_why(
    blobs: tuple[str, list[SelectedCase]],
    tmp_path: Path,
    changes: dict[str, Any],
    roles: dict[str, str],
    why: str,
) -> None:
    """The reference needs validation and test lists even where there are none."""
    folder = tmp_path / "a"
    selection = [case.replace(role=roles.get(case.role, case.role)) for case in blobs[1]]
    train(quick(folder, (blobs[0], selection), epochs=1, **changes), folder, WORLD)
    last = done(folder)["step"]
    assert done(folder)["weights_of"] == {"rule": "last step", "step": last, "why": why}
    assert f"- weights: of step {last}, the last ({why})" in (folder / "model_card.md").read_text()


def test_a_training_without_test_cases_ends_well(blobs: tuple[str, list[SelectedCase]], tmp_path: Path) -> None:
    folder = tmp_path / "a"
    selection = [case for case in blobs[1] if case.role == "train"]
    train(make(folder, (blobs[0], selection), epochs=1), folder, WORLD)
    assert done(folder)["predictions"] == 0


def test_a_look_sees_whole_validation_cases(blobs: tuple[str, list[SelectedCase]], tmp_path: Path) -> None:
    folder = tmp_path / "a"
    train(make(folder, blobs, epochs=1), folder, WORLD)
    case = next(case for case in blobs[1] if case.role == "val")
    objective = load_objective(folder)
    dataset = CaseDataset(blobs[0], [case], objective.sampler(), "val")
    found = objective.predict(dataset.info(0), dataset.reader(0))["regions"].astype(bool)
    truth = to_regions(dataset.reader(0).read_label((0, 0, 0), dataset.info(0).extent), REGIONS).astype(bool)
    expected = np.mean(dice(found, truth))
    assert done(folder)["weights_of"]["value"] == pytest.approx(expected)
    assert found.shape == truth.shape


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_ranks_share_the_cases(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("models.state.broadcast_buffers", lambda *_: None)

    class Cases(list[int]):
        info = reader = list.__getitem__

    def assess(rank: int) -> tuple[list[tuple[int, list[float]]], bool]:
        objective = SimpleNamespace(assess=lambda case, _: [float(case)])
        model = SimpleNamespace(eval=lambda: None, train=lambda: None)
        world = SimpleNamespace(rank=rank, size=size)
        return _assess(
            SimpleNamespace(world=world, objective=objective, model=model, step=1, dataset=lambda _: Cases(range(5))),
            lambda: False,
        )

    found = [item for rank in range(size) for item in assess(rank)[0]]
    assert sorted(found) == [(k, [float(k)]) for k in range(5)]


def test_dice_of_empty_masks_follows_the_scores() -> None:
    none, some = np.zeros((2, 2, 2), bool), np.ones((2, 2, 2), bool)
    pairs = [(none, none), (some, none), (none, some), (some, some)]
    assert [dice(one[None], other[None])[0] for one, other in pairs] == [1, 0, 0, 1]


def test_the_auroc_is_that_of_the_scores(blobs: tuple[str, list[SelectedCase]], tmp_path: Path) -> None:
    from classifications import sklearn_metrics

    from models.objectives import build_objective

    rng = np.random.default_rng(0)
    for classes in (("a", "b"), ("a", "b", "c")):
        config = make(tmp_path / f"{len(classes)}", blobs, objective=CLASSES.replace(classes=classes))
        objective = build_objective(config, SPEC)
        assert isinstance(objective, Classification)
        target, probabilities = rng.integers(0, len(classes), 30), rng.dirichlet(np.ones(len(classes)), 30)
        assessed = [[float(t), *p] for t, p in zip(target, probabilities.tolist(), strict=True)]
        expected = sklearn_metrics(target, probabilities)["auroc"]
        assert objective.summarise(assessed) == pytest.approx(expected)
        assert objective.summarise(assessed[:0]) is None


@pytest.fixture(scope="module")
def pretrained(blobs: tuple[str, list[SelectedCase]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretraining") / "p"
    train(make_training(folder, *blobs, epochs=1, validate_every=0), folder, WORLD)
    return folder


def test_a_mixed_fine_tuning_takes_the_templates_of_its_pre_training_and_resumes_exactly(
    blobs: tuple[str, list[SelectedCase]], pretrained: Path, tmp_path: Path
) -> None:
    settings = TUMOUR.replace(template_mix=3, missing="template")
    changes = {"objective": settings, "init_from": str(pretrained), "epochs": 2, "select_every": 0}
    for name in ("whole", "stopped"):
        folder = tmp_path / name
        config = quick(folder, blobs, **changes)
        if name == "stopped":
            answers = iter([False] * 2 + [True])
            with pytest.raises(Stopped):
                train(config, folder, WORLD, lambda answers=answers: next(answers))
        train(config, folder, WORLD)
    assert done(tmp_path / "whole")["weights_digest"] == done(tmp_path / "stopped")["weights_digest"]
    lines = [line["losses"] for line in read_metrics(tmp_path / "whole") if line["kind"] == "train"]
    assert all(line["loss_consistency"] > 0 for line in lines)
    expected = learned_templates(read_training(pretrained), SPEC.modalities, SPEC)
    found = load_objective(tmp_path / "whole").templates
    assert found is not None
    np.testing.assert_array_equal(found.images, expected.images)


def test_a_pre_training_that_changed_refuses_the_resume(
    blobs: tuple[str, list[SelectedCase]], pretrained: Path, tmp_path: Path
) -> None:
    origin = tmp_path / "p"
    origin.mkdir()
    for name in ("done.json", "weights.safetensors", "config.json"):
        (origin / name).write_bytes((pretrained / name).read_bytes())
    folder = tmp_path / "a"
    config = quick(folder, blobs, init_from=str(origin))
    with pytest.raises(Stopped):
        train(config, folder, WORLD, lambda: True)
    other = tmp_path / "other"
    train(make_training(other, *blobs, epochs=1, validate_every=0, seed=5), other, WORLD)
    for name in ("done.json", "weights.safetensors"):
        (origin / name).write_bytes((other / name).read_bytes())
    with pytest.raises(
        CheckpointError, match=r"training a was started from weights \w{12}, .* now holds \w{12}; start"
    ):
        train(config, folder, WORLD)


def test_a_pre_training_without_templates_is_refused_by_name(
    blobs: tuple[str, list[SelectedCase]], tmp_path: Path
) -> None:
    origin, folder = tmp_path / "o", tmp_path / "a"
    train(quick(origin, blobs, epochs=1, select_every=0), origin, WORLD)
    config = quick(folder, blobs, objective=TUMOUR.replace(template_mix=3), init_from=str(origin))
    with pytest.raises(ValueError, match=f"{origin} has no template bank"):
        train(config, folder, WORLD)


def test_a_pre_training_predicts_nothing(pretrained: Path) -> None:
    with pytest.raises(TypeError, match="training p: objective 'brainmvp' predicts nothing"):
        load_objective(pretrained)
