"""The loop: exact resume, finite checks, accumulation, validation apart from training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_phantoms import make_training, write_blobs

from models import trainer
from models.checkpoint import CheckpointError, checkpoint_path, list_checkpoints
from models.distributed import World
from models.export import NotFinishedError, read_weights, weights_digest
from models.metrics import append_metrics, parse_lines, read_metrics, truncate_after
from models.objectives.brainmvp import BrainMVP
from models.records import SelectedCase
from models.selection import SelectionError
from models.state import Stopped, start_training
from models.trainer import NotFiniteError, train
from models.validate import merge_sums

WORLD = World(0, 1, torch.device("cpu"))


class Killed(BaseException):
    """Stands for kill -9: nothing may be saved after it."""


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[SelectedCase]]:
    url = str(tmp_path_factory.mktemp("trainer") / "blobs.zarr")
    return url, write_blobs(url)


@pytest.fixture(scope="module")
def undisturbed(blobs: tuple[str, list[SelectedCase]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "a"
    train(make_training(folder, *blobs), folder, WORLD)
    return folder


def done(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "done.json").read_text())


def kill_at(step: int) -> Any:
    calls = iter(range(1000))

    def stop() -> bool:
        if next(calls) == step:
            raise Killed
        return False

    return stop


def train_losses(folder: Path) -> list[tuple[int, dict[str, float]]]:
    return [(line["step"], line["losses"]) for line in read_metrics(folder) if line["kind"] == "train"]


# Checkpoints are at 3, 6, 9, 12; 4 and 8 are validated. The stop flag is asked once a step and once a validation batch.
@pytest.mark.parametrize("asked", [0, 2, 3, 4, 5, 9, 12, 14])
def test_a_killed_training_ends_with_the_same_bits(
    blobs: tuple[str, list[SelectedCase]], undisturbed: Path, tmp_path: Path, asked: int
) -> None:
    folder = tmp_path / "a"
    config = make_training(folder, *blobs)
    with pytest.raises(Killed):
        train(config, folder, WORLD, kill_at(asked))
    torch.rand(7)  # another process would have other random numbers by now
    assert not (folder / "done.json").exists()
    train(config, folder, WORLD)
    assert done(folder)["weights_digest"] == done(undisturbed)["weights_digest"]
    assert done(folder)["metrics"] == done(undisturbed)["metrics"]
    assert train_losses(folder) == train_losses(undisturbed)
    steps = [line["step"] for line in read_metrics(folder) if line["kind"] == "val"]
    assert steps == [4, 8, 12]


def test_everything_that_decides_the_future_is_in_the_checkpoint(
    blobs: tuple[str, list[SelectedCase]], undisturbed: Path
) -> None:
    content = torch.load(list_checkpoints(undisturbed)[0], weights_only=True)
    assert content["model"]["template.bank"].any()
    assert content["optimiser"]["state"], "Adam's moments are needed for an exact resume"
    assert content["sampler"] == {"seed": 0, "place": 24}
    assert len(content["rng"]["cpu"]) == 1
    assert content["schedule"]["total_steps"] == 12


@pytest.mark.parametrize(("asked", "step"), [(0, 1), (4, 4), (5, 5)])
def test_told_to_stop_it_writes_a_checkpoint_of_that_very_step(
    blobs: tuple[str, list[SelectedCase]], undisturbed: Path, tmp_path: Path, asked: int, step: int
) -> None:
    folder = tmp_path / "a"
    config = make_training(folder, *blobs)
    answers = iter([False] * asked + [True])
    with pytest.raises(Stopped, match=f"was stopped at step {step} of 12"):
        train(config, folder, WORLD, lambda: next(answers))
    assert checkpoint_path(folder, step).exists()
    train(config, folder, WORLD)
    assert done(folder)["weights_digest"] == done(undisturbed)["weights_digest"]
    assert done(folder)["metrics"] == done(undisturbed)["metrics"]
    assert [line["step"] for line in read_metrics(folder) if line["kind"] == "val"] == [4, 8, 12]


def test_a_resume_with_other_loader_processes_costs_no_bits(
    blobs: tuple[str, list[SelectedCase]], undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    config = make_training(folder, *blobs)
    with pytest.raises(Killed):
        train(config, folder, WORLD, kill_at(5))  # in the middle of the second epoch
    other = config.replace(data=config.data.replace(workers=1), running={"rank_limit": 1.0})
    assert other.content_digest() == config.content_digest()
    train(other, folder, WORLD)
    assert done(folder)["weights_digest"] == done(undisturbed)["weights_digest"]
    assert train_losses(folder) == train_losses(undisturbed)


def test_a_resume_restores_the_random_numbers(blobs: tuple[str, list[SelectedCase]], tmp_path: Path) -> None:
    """The objectives of today draw from generators of their own; dropout would not."""
    folder = tmp_path / "a"
    config = make_training(folder, *blobs, checkpoint_every=1)
    with pytest.raises(Killed):
        train(config, folder, WORLD, kill_at(1))
    torch.rand(7)
    start_training(config, folder, WORLD)
    saved = torch.load(list_checkpoints(folder)[0], weights_only=True)["rng"]["cpu"]
    assert torch.equal(torch.get_rng_state(), saved[0])


def test_a_truncated_newest_checkpoint_costs_steps_and_no_bits(
    blobs: tuple[str, list[SelectedCase]], undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    config = make_training(folder, *blobs)
    with pytest.raises(Killed):
        train(config, folder, WORLD, kill_at(9))
    newest = list_checkpoints(folder)[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    train(config, folder, WORLD)
    assert done(folder)["weights_digest"] == done(undisturbed)["weights_digest"]


def test_a_retired_case_refuses_the_resume_by_name(blobs: tuple[str, list[SelectedCase]], tmp_path: Path) -> None:
    folder = tmp_path / "a"
    changed = [case.replace(digest="was-other") if case.row == 1 else case for case in blobs[1]]
    config = make_training(folder, blobs[0], changed)
    with pytest.raises(SelectionError, match=r"blobs/case-1 \(row 1\): its digest has changed"):
        train(config, folder, WORLD)


def test_a_folder_with_checkpoints_of_another_config_is_refused(
    blobs: tuple[str, list[SelectedCase]], tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    config = make_training(folder, *blobs)
    with pytest.raises(Killed):
        train(config, folder, WORLD, kill_at(4))
    with pytest.raises(CheckpointError, match="another config: seed: 0 -> 1"):
        train(config.replace(seed=1), folder, WORLD)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_named_and_changes_nothing(
    blobs: tuple[str, list[SelectedCase]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    folder = tmp_path / "a"
    config = make_training(folder, *blobs)
    forward = BrainMVP.forward

    def poisoned(self: BrainMVP, batch: dict[str, Any], clock: Any) -> dict[str, torch.Tensor]:
        losses = forward(self, batch, clock)
        if clock.step == 4:
            weight = self.decoder.parameters().__next__().sum()
            bad = weight * float("nan") if where == "loss" else (weight - weight.detach()).sqrt()
            losses = {**losses, "loss": losses["loss"] + bad}
        return losses

    monkeypatch.setattr(BrainMVP, "forward", poisoned)
    with pytest.raises(NotFiniteError, match=r"not finite at step 4 \(epoch 1\).* on rank 0; its cases: case-"):
        train(config, folder, WORLD)
    assert [path.name for path in list_checkpoints(folder)] == ["step-000003.pt"]


def test_accumulated_micro_batches_give_the_step_of_one_large_batch(
    blobs: tuple[str, list[SelectedCase]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BrainMVP, "train", lambda self, mode=True: self)
    weights = {}
    for name, batch_size, accumulation in (("large", 4, 1), ("small", 2, 2)):
        folder = tmp_path / name
        config = make_training(folder, *blobs, accumulation=accumulation, epochs=1)
        # Without contrast (negatives differ) and in evaluation mode (batch norm differs) the sums are the same.
        objective = config.objective.model_dump() | {"weight_contrast": 0.0, "weight_reconstruction": 0.0}
        data = config.data.replace(batch_size=batch_size)
        state = start_training(config.replace(objective=objective, data=data), folder, WORLD)
        assert state.plan.samples_per_step == 4
        torch.nn.Module.train(state.model, False)
        trainer.train_step(state, lambda: False)
        weights[name] = torch.cat([p.detach().flatten() for p in state.objective.parameters()])
        assert state.step == 1
    torch.testing.assert_close(weights["large"], weights["small"], rtol=1e-4, atol=1e-6)


def test_validation_leaves_training_untouched(
    blobs: tuple[str, list[SelectedCase]], undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    train(make_training(folder, *blobs, validate_every=1), folder, WORLD)
    assert done(folder)["weights_digest"] == done(undisturbed)["weights_digest"]
    assert len([line for line in read_metrics(folder) if line["kind"] == "val"]) == 12


def test_the_result_does_not_depend_on_the_threads_of_the_caller_or_on_trainings_before(
    blobs: tuple[str, list[SelectedCase]], undisturbed: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(99)
    folder = tmp_path / "a"
    train(make_training(folder, *blobs), folder, WORLD)
    assert torch.get_num_threads() == 1
    assert done(folder)["weights_digest"] == done(undisturbed)["weights_digest"]


def test_a_finished_training_leaves_weights_card_pictures_and_done_last(undisturbed: Path) -> None:
    tensors, digest = read_weights(undisturbed)
    assert digest == done(undisturbed)["weights_digest"] == weights_digest(tensors)
    assert any(name.startswith("encoder.") for name in tensors)
    card = (undisturbed / "model_card.md").read_text()
    assert "not for clinical use" in card
    assert done(undisturbed)["selection_digest"] in card
    assert "| blobs | train | 6 |" in card
    assert "## Licence and data" in card
    assert json.loads((undisturbed / "config.json").read_text())["spec"]["name"] == "blobs"
    pictures = {path.name for path in (undisturbed / "pictures").iterdir()}
    assert pictures == {"reconstruction.png", "templates.png"}
    last = (undisturbed / "done.json").stat().st_mtime_ns
    assert all(path.stat().st_mtime_ns <= last for path in undisturbed.rglob("*") if path.is_file())


def test_time_in_steps_and_the_share_of_waiting_are_reported_over_all_resumes(
    blobs: tuple[str, list[SelectedCase]], undisturbed: Path, tmp_path: Path
) -> None:
    steps = [line for line in read_metrics(undisturbed) if line["kind"] == "train"]
    timing = done(undisturbed)["timing"]
    assert timing["step_seconds"] == pytest.approx(sum(line["seconds"] for line in steps), abs=0.01)
    assert timing["data_wait_seconds"] == pytest.approx(sum(line["data_wait_seconds"] for line in steps), abs=0.01)
    share = timing["data_wait_seconds"] / timing["step_seconds"]
    assert timing["data_wait_share"] == pytest.approx(share, abs=0.01)
    assert f"{timing['data_wait_share']:.1%} of it waiting for data" in (undisturbed / "model_card.md").read_text()
    folder = tmp_path / "a"
    config = make_training(folder, *blobs)
    with pytest.raises(Killed):
        train(config, folder, WORLD, kill_at(7))
    before = torch.load(list_checkpoints(folder)[0], weights_only=True)["timing"]["seconds"]
    assert start_training(config, folder, WORLD).timing.seconds == before > 0


def test_weights_that_were_changed_after_the_end_are_refused(
    blobs: tuple[str, list[SelectedCase]], undisturbed: Path, tmp_path: Path
) -> None:
    (tmp_path / "weights.safetensors").write_bytes((undisturbed / "weights.safetensors").read_bytes())
    with pytest.raises(NotFinishedError, match="it is not finished; run it to its end"):
        read_weights(tmp_path)
    (tmp_path / "done.json").write_text('{"weights_digest": "0"}')
    with pytest.raises(NotFinishedError, match="says 0; the file was changed"):
        read_weights(tmp_path)


def test_a_training_starts_from_the_weights_of_another(
    blobs: tuple[str, list[SelectedCase]], undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    config = make_training(folder, *blobs, init_from=str(undisturbed))
    state = start_training(config, folder, WORLD)
    first, _ = read_weights(undisturbed)
    assert weights_digest(state.objective.encoder.state_dict()) == weights_digest(
        {name.removeprefix("encoder."): value for name, value in first.items() if name.startswith("encoder.")}
    )
    assert state.init_digest == done(undisturbed)["weights_digest"]


def test_metrics_of_steps_after_the_checkpoint_and_half_lines_are_dropped(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        append_metrics(tmp_path, {"kind": "train", "step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    truncate_after(tmp_path, 2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert parse_lines(['{"a": 1}\n', '{"b"']) == [{"a": 1}]
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_metrics(tmp_path, {"loss": float("nan")})


def test_metrics_are_means_over_cases_not_over_ranks() -> None:
    parts = [({"dice": (3.0, 4.0), "empty": (0.0, 0.0)}, False), ({"dice": (0.0, 1.0)}, False)]
    assert merge_sums(parts) == ({"dice": 0.6}, False)
    assert merge_sums([({}, False), ({}, True)]) == ({}, True)
