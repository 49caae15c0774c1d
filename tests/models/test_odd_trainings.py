"""Small and strange selections: more ranks than cases, one case, crops larger than the volume, no usable modality."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training_phantoms import EXTENT, SPEC, make_training, write_blobs

from models.config import BrainMVPConfig
from models.distributed import World
from models.metrics import read_metrics
from models.records import SelectedCase
from models.spec import PreprocessSpec
from models.state import start_training
from models.trainer import is_logged_step, train, train_step

WORLD = World(0, 1, torch.device("cpu"))
Blobs = tuple[str, list[SelectedCase]]


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Blobs:
    url = str(tmp_path_factory.mktemp("odd") / "blobs.zarr")
    return url, write_blobs(url)


def finished(folder: Path) -> dict:
    return json.loads((folder / "done.json").read_text())


def test_one_case_trains_and_meets_itself_without_becoming_its_own_negative(blobs: Blobs, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    train(make_training(folder, blobs[0], blobs[1][:1], epochs=4), folder, WORLD)
    assert finished(folder)["step"] == 2, "four epochs of one case are two steps of two"
    assert finished(folder)["metrics"] == {}, "there is no validation case"
    train_lines = [line for line in read_metrics(folder) if line["kind"] == "train"]
    assert all(line["losses"]["loss_contrast"] == 0 for line in train_lines)
    assert all(line["losses"]["loss_reconstruction"] > 0 for line in train_lines)


def test_more_ranks_than_cases_take_several_epochs_a_step(blobs: Blobs, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    config = make_training(folder, blobs[0], blobs[1][:3], epochs=4, world_size=4)
    state = start_training(config, folder, WORLD)
    assert (state.plan.samples_per_step, state.plan.total_steps) == (8, 2)
    seen = [case for _ in range(state.plan.accumulation) for case in next(state.batches)["case"]]
    assert sorted(seen[:3]) == sorted(seen[3:6]) == ["case-0", "case-1", "case-2"]


def test_a_crop_larger_than_case_and_template_is_filled_with_zeros(blobs: Blobs, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    config = make_training(folder, *blobs)
    assert all(edge < 64 for edge in (*EXTENT, *SPEC.grid))
    config = config.replace(data=config.data.replace(crop=(64, 64, 64), batch_size=1), accumulation=1)
    config = config.replace(objective=BrainMVPConfig(weight_contrast=0.0, template_init="mean"))
    state = start_training(config, folder, WORLD)
    image = next(state.batches)["image"]
    inside = torch.nonzero(image[0, 0]).amax(0) - torch.nonzero(image[0, 0]).amin(0) + 1
    assert all(n <= edge for n, edge in zip(inside.tolist(), EXTENT, strict=True))
    report = train_step(state, lambda: False)
    assert report.losses["loss"] > 0


def test_cases_without_a_usable_modality_are_refused_before_the_first_step(tmp_path: Path) -> None:
    spec: PreprocessSpec = SPEC.replace(modalities=("bold", "gm"), reference_order=("bold", "gm"))
    url = str(tmp_path / "bold.zarr")
    cases = write_blobs(url, cases=3, spec=spec)
    config = make_training(tmp_path / "a", url, cases)
    with pytest.raises(ValueError, match=r"case blobs/case-0 has no modality with a template \(flair, t1, .*leave it"):
        start_training(config, tmp_path / "a", WORLD)
    assert not (tmp_path / "a" / "metrics.jsonl").exists()


def test_the_first_and_last_steps_are_always_logged() -> None:
    logged = [step for step in range(1, 5002) if is_logged_step(step, 5001)]
    assert logged[:10] == list(range(1, 11))
    assert logged[-1] == 5001
    assert 2000 < len(logged) < 4000
    assert all(is_logged_step(step, 3999) for step in range(1, 4000))
