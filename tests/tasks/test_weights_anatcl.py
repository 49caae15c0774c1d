"""Released weights of AnatCL in and out: the names and shapes of tests/golden/anatcl_keys.json, strictly."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from released_files import TINY_UNIFORMER_TABLE, random_state, write_released, write_untrained
from typer.testing import CliRunner

from brainloom.cli import app
from models.config import AnatCLConfig, ResNet3DConfig
from models.encoder import load_encoder
from models.finished import read_training
from models.foreign import read_checkpoint
from models.networks.build import pool
from models.released import WeightsError, detect_network, layout_of
from models.selection import read_selection
from tasks.weights_export import export_weights
from tasks.weights_import import import_weights
from tasks.weights_info import weights_info

KEYS = {
    name: tuple(shape)
    for name, shape in json.loads((Path(__file__).parents[1] / "golden" / "anatcl_keys.json").read_text()).items()
}

SMALL = ResNet3DConfig(blocks=(1, 1, 1, 1), widths=(4, 4, 4, 8))


def write_file(path: Path, state: dict[str, torch.Tensor], settings: Any = None) -> Path:
    """Save a state as the code behind AnatCL does, with its settings and optimiser."""
    torch.save({"opts": settings or {}, "model": state, "optimizer": {"state": {}}, "epoch": 299}, path)
    return path


SETTINGS = argparse.Namespace(lr=1e-4, kernel="rbf")


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small training whose network files may have instead of the released one."""
    objective = AnatCLConfig(modality="t1", head_dim=6)
    return write_untrained(tmp_path_factory.mktemp("like") / "small", objective, SMALL)


@pytest.fixture(scope="module")
def table() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a small file."""
    return {name: tuple(value.shape) for name, value in layout_of(SMALL, (2, 2, 2), 6).tensors.items()}


def test_a_file_of_another_size_comes_back_as_it_was(like: Path, table: dict[str, Any], tmp_path: Path) -> None:
    state = random_state(table, "module.")
    file = write_file(tmp_path / "small.pth", state, SETTINGS)
    imported = import_weights(file, tmp_path / "a", like, "local", 1)
    assert imported.done["origin"]["left_behind"] == ["opts", "optimizer"]
    config = read_training(imported.folder).config
    assert (config.objective.variant, config.objective.head_dim, config.network) == ("local", 6, SMALL)
    back = torch.load(export_weights(imported.folder, tmp_path / "back.pt", "anatcl"), weights_only=True)["model"]
    assert list(back) == list(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    ours = torch.load(export_weights(like, tmp_path / "ours.pt", "anatcl"), weights_only=True)
    assert list(ours["model"]) == list(table), "the scale of the descriptors stays at home"
    assert export_weights(like, tmp_path / "bundle", "monai-bundle").is_dir()


def test_the_layout_is_that_of_the_released_files() -> None:
    layout = layout_of(ResNet3DConfig(), (121, 128, 121))
    assert {name: tuple(value.shape) for name, value in layout.tensors.items()} == KEYS
    assert list(layout.tensors) == list(KEYS)
    assert layout.unused == []
    assert detect_network(KEYS) == ResNet3DConfig(mirror_x=True), "CAT12's files have x from right to left"


@pytest.mark.full
def test_a_file_of_the_released_size_is_imported_and_comes_back_as_it_was(tmp_path: Path) -> None:
    """134 MB."""
    released = write_file(tmp_path / "fold2.pth", random_state(KEYS), SETTINGS)
    folder = tmp_path / "trainings" / "anatcl_local_fold2"
    done = CliRunner().invoke(
        app, ["weights", "import", str(released), "--to", str(folder), "--variant", "local", "--fold", "2"]
    )
    assert done.exit_code == 0, done.output
    assert "anatcl-resnet3d, weights digest" in done.output
    assert "left behind in the file: opts, optimizer" in done.output
    finished = read_training(folder)
    origin = finished.done["origin"]
    assert (origin["variant"], origin["fold"], origin["key"], origin["kept"]) == ("local", 2, "model", {"epoch": 299})
    assert (finished.config.objective.variant, finished.config.network) == ("local", ResNet3DConfig(mirror_x=True))
    assert (finished.spec.name, finished.config.data.crop, finished.config.epochs) == ("vbm_128", (0, 0, 0), 299)
    assert read_selection(folder / "selection.parquet") == []
    card = (folder / "model_card.md").read_text()
    for text in ("variant: local, fold 2", "controls of ABIDE I are among them", "MIT licence", "not for clinical use"):
        assert text in card
    state = read_checkpoint(released, 10**10).state
    back = torch.load(export_weights(folder, tmp_path / "back.pt", "anatcl"), weights_only=True)
    assert list(back["model"]) == list(state)
    assert all(torch.equal(back["model"][name], value) for name, value in state.items())
    assert back["epoch"] == 299
    formats = weights_info(folder)["formats"]
    assert formats == {
        "brainmvp": "it was pre-trained with AnatCL",
        "anatcl": "",
        "safetensors": "",
        "monai-bundle": "",
    }
    with torch.inference_mode():
        embedding = pool(load_encoder(folder)(torch.rand(1, 1, 40, 42, 40)))
    assert embedding.shape == (1, 512)


@pytest.mark.full
def test_the_variant_must_be_said(tmp_path: Path) -> None:
    released = write_file(tmp_path / "fold2.pth", random_state(KEYS))
    with pytest.raises(WeightsError, match=r"fold2\.pth is not imported: it does not say which variant it is of; give"):
        import_weights(released, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head.2.bias"), r"AnatCL's 3D ResNet \(\d+ tensors\); 1 missing: head.2.bias"),
        (lambda state: state.update({"fc.weight": torch.zeros(1)}), "1 unknown: fc.weight"),
        (lambda state: state.update({"head.2.bias": torch.zeros(5)}), "float32 5 in the file, float32 6 expected"),
        (lambda state: state.update({"head.2.bias": torch.full((6,), torch.nan)}), "head.2.bias holds values that"),
    ],
)
def test_what_is_not_exactly_the_layout_is_refused(
    change: Any, message: str, like: Path, table: dict[str, Any], tmp_path: Path
) -> None:
    state = random_state(table)
    change(state)
    with pytest.raises(WeightsError, match=rf"w\.pt is not imported: .*{message}"):
        import_weights(write_file(tmp_path / "w.pt", state), tmp_path / "a", like)


def test_variant_and_fold_are_of_anatcl_alone(tmp_path: Path) -> None:
    file = write_released(tmp_path / "w.pt", random_state(TINY_UNIFORMER_TABLE))
    with pytest.raises(WeightsError, match="variant and fold are of AnatCL's files; this one is of brainmvp"):
        import_weights(file, tmp_path / "a", write_untrained(tmp_path / "like"), fold=1)
