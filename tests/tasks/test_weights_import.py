"""Released weights become a finished training: strictly, reversibly, and without running what is in the file."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from objective_cases import NETWORK, SPEC, make_config
from released_files import (
    GRID,
    PAPER,
    TINY_UNET,
    TINY_UNET_TABLE,
    TINY_UNIFORMER_TABLE,
    random_state,
    unet_table,
    uniformer_table,
    write_released,
    write_untrained,
)

from models.config import MadeFrom, NetworkConfig, SegmentationConfig, UNet3DConfig
from models.encoder import load_encoder
from models.export import NotFinishedError, read_weights
from models.finished import read_training
from models.foreign import read_checkpoint
from models.networks.build import build_encoder
from models.objectives import build_objective
from models.recipes import TUMOUR_REGIONS
from models.released import WeightsError, layout_of
from models.selection import read_selection
from tasks import weights_import
from tasks.benchmarks import BENCHMARKS
from tasks.finetune import prepare
from tasks.report_content import Made, description
from tasks.rows import Run, training_rows
from tasks.weights_export import export_weights
from tasks.weights_import import SIDE_FILE, import_weights

State = dict[str, torch.Tensor]
KEY_TABLE_SHA256 = "d907686065cebb371d499c91e3d8e731c18410081f5d082adf43b71330ed721c"
"""Over `name shape` lines of the released file's 352 tensors, as counted in that file."""


@pytest.fixture(scope="module")
def like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained(tmp_path_factory.mktemp("like") / "uniformer")


@pytest.fixture(scope="module")
def like_unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained(tmp_path_factory.mktemp("like") / "unet", network=TINY_UNET)


def _lines(table: dict[str, Any]) -> list[str]:
    return [f"{name} {'x'.join(map(str, shape))}" for name, shape in table.items()]


def _same(ours: State, theirs: State) -> bool:
    assert list(ours) == list(theirs)
    assert [value.dtype for value in ours.values()] == [value.dtype for value in theirs.values()]
    return all(torch.equal(one, other) for one, other in zip(ours.values(), theirs.values(), strict=True))


# --- layouts


def test_the_layout_is_that_of_the_released_file() -> None:
    table = uniformer_table()
    assert (len(table), sum(math.prod(shape) for shape in table.values())) == (352, 105_744_016)
    assert hashlib.sha256("\n".join(_lines(table)).encode()).hexdigest() == KEY_TABLE_SHA256
    layout = layout_of(NetworkConfig(), (240, 240, 155))
    assert _lines({name: value.shape for name, value in layout.tensors.items()}) == _lines(table)
    unused = [layout.tensors[name].numel() for name in layout.unused]
    assert (len(unused), sum(unused)) == (16, 12_277_697 - 1_736_769)


def test_the_layout_of_unet3d_is_that_of_the_reference_module() -> None:
    layout = layout_of(UNet3DConfig(), (240, 240, 155))
    assert _lines({name: value.shape for name, value in layout.tensors.items()}) == _lines(unet_table())
    assert layout.unused == []
    assert sum(value.numel() for value in layout.tensors.values()) == 18_799_937 + 71_424_000


# --- there and back


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_released_file_comes_back_as_it_was(tmp_path: Path, like: Path, prefix: str, wrapped: bool) -> None:
    state = random_state(TINY_UNIFORMER_TABLE, prefix)
    file = write_released(tmp_path / "BrainMVP_uniformer.pt", state, wrapped)
    imported = import_weights(file, tmp_path / "trainings" / "released", like)
    origin = imported.done["origin"]
    assert (origin["prefix"], origin["wrapped"]) == (prefix, wrapped)
    assert origin["kept"] == ({"current_epoch": 1499, "val_best": 0.0} if wrapped else {})
    assert origin["left_behind"] == (["optimizer"] if wrapped else [])
    back = torch.load(export_weights(imported.folder, tmp_path / "back.pt", "brainmvp"), weights_only=True)
    assert _same(back["state_dict"] if wrapped else back, state)
    assert not wrapped or back["current_epoch"] == 1499


def test_a_released_unet_comes_back_as_it_was(tmp_path: Path, like_unet: Path) -> None:
    state = random_state(TINY_UNET_TABLE)
    imported = import_weights(write_released(tmp_path / "unet.pt", state), tmp_path / "a", like_unet)
    assert imported.done["origin"]["layout"] == "brainmvp-unet3d"
    assert not (imported.folder / SIDE_FILE).exists()
    back = torch.load(export_weights(imported.folder, tmp_path / "back.pt", "brainmvp"), weights_only=True)
    assert _same(back["state_dict"], state)


@pytest.mark.full
def test_a_file_of_the_released_size_comes_back_as_it_was(tmp_path: Path) -> None:
    state = random_state(uniformer_table())
    file = write_released(tmp_path / "BrainMVP_uniformer.pt", state)
    imported = import_weights(file, tmp_path / "released")
    config = read_training(imported.folder).config
    assert (config.network, config.recipe, config.epochs) == (NetworkConfig(), "imported", 1499)
    card = (imported.folder / "model_card.md").read_text()
    assert "No licence of these weights is known" in card
    assert "no independent test subjects" in card
    assert "336 used; 16 kept in `unused.safetensors` (10,540,928 entries" in card
    back = torch.load(export_weights(imported.folder, tmp_path / "back.pt", "brainmvp"), weights_only=True, mmap=True)
    assert _same(back["state_dict"], state)


# --- a training like any other


def test_every_tensor_is_used_or_named(tmp_path: Path, like: Path) -> None:
    state = random_state(TINY_UNIFORMER_TABLE)
    folder = import_weights(write_released(tmp_path / "w.pt", state), tmp_path / "released", like).folder
    tensors, digest = read_weights(folder)
    unused = read_training(folder).done["origin"]["unused"]
    assert len(tensors) + len(unused) == len(state)
    assert set(unused.values()) == {"the reference's forward pass never uses it, so it was never trained"}
    assert all(".conv_block." in name or ".proj1." in name for name in unused)
    card = (folder / "model_card.md").read_text()
    for text in (
        digest,
        "not for clinical use",
        "not trained here",
        "on which subjects these weights were trained: ask",
        "w.pt",
    ):
        assert text in card


def test_an_imported_training_starts_another(tmp_path: Path, like: Path) -> None:
    state = random_state(TINY_UNIFORMER_TABLE)
    folder = import_weights(write_released(tmp_path / "w.pt", state), tmp_path / "released", like).folder
    tensors, _ = read_weights(folder)
    pretraining = build_objective(make_config(PAPER), SPEC)
    assert sorted(pretraining.load_pretrained(tensors)) == sorted(tensors)
    assert torch.equal(pretraining.state_dict()["template.bank"], state["rep_template"])
    settings = SegmentationConfig(modalities=("t1", "t2"), regions=TUMOUR_REGIONS)
    segmentation = build_objective(make_config(settings, NETWORK.replace(in_channels=2)), SPEC)
    segmentation.load_pretrained(tensors)
    name = "blocks4.0.attn.qkv.weight"
    assert torch.equal(segmentation.encoder.state_dict()[name], state[f"encoder.uniformer.{name}"])


def test_an_imported_training_is_fine_tuned_with_its_own_network(tmp_path: Path, like_unet: Path) -> None:
    state = random_state(TINY_UNET_TABLE)
    folder = import_weights(write_released(tmp_path / "w.pt", state), tmp_path / "released", like_unet).folder
    benchmark = BENCHMARKS["phantom-tumour"]
    trainings = prepare(benchmark, [], "s.zarr", tmp_path / "trainings", training_rows([Run("a", folder)]), seeds=1)
    assert [one.config.network for one in trainings] == [TINY_UNET.replace(in_channels=len(benchmark.modalities))] * 2


def test_features_are_those_of_the_file(tmp_path: Path, like: Path) -> None:
    state = random_state(TINY_UNIFORMER_TABLE)
    folder = import_weights(write_released(tmp_path / "w.pt", state), tmp_path / "released", like).folder
    encoder = build_encoder(NETWORK).eval()
    start = "encoder.uniformer."
    encoder.load_state_dict({n.removeprefix(start): value for n, value in state.items() if n.startswith(start)})
    image = torch.rand(1, 1, 32, 32, 16)
    with torch.no_grad():
        assert torch.equal(load_encoder(folder)(image)[4], encoder(image)[4])


# --- refusals


def _without(name: str) -> Callable[[State], None]:
    return lambda state: state.pop(name)  # type: ignore[return-value]


def _with(name: str, value: torch.Tensor) -> Callable[[State], None]:
    return lambda state: state.update({name: value})


STEM = "encoder.uniformer.patch_embed1.proj.weight"
WRONG: dict[str, tuple[Callable[[State], None], str]] = {
    "a tensor is missing": (_without(STEM), f"1 missing: {STEM}"),
    "the templates are missing": (_without("rep_template"), "1 missing: rep_template"),
    "an unknown tensor": (_with("head.weight", torch.zeros(2)), "1 unknown: head.weight"),
    "another shape": (
        _with(STEM, torch.zeros(4, 4, 2, 2, 2)),
        rf"{STEM} \(float32 4x4x2x2x2 in the file, float32 4x1x2x2x2 expected\)",
    ),
    "another type": (_with(STEM, torch.zeros(4, 1, 2, 2, 2).half()), r"\(float16 4x1x2x2x2 in the file"),
    "sparse": (_with(STEM, torch.zeros(4, 1, 2, 2, 2).to_sparse()), r"\(float32 4x1x2x2x2 sparse in the file"),
    "not finite": (_with(STEM, torch.full((4, 1, 2, 2, 2), torch.nan)), f"{STEM} holds values that are not finite"),
    "a prefix on some names": (
        _with("module.x", torch.zeros(1)),
        r"some names begin with `module.` \(module.x\) and some do not \(rep_template\)",
    ),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_what_is_not_exactly_the_layout_is_refused_by_name(tmp_path: Path, like: Path, what: str) -> None:
    change, message = WRONG[what]
    state = random_state(TINY_UNIFORMER_TABLE)
    change(state)
    file = write_released(tmp_path / "w.pt", state)
    with pytest.raises(WeightsError, match=rf"w\.pt is not imported: .*{message}"):
        import_weights(file, tmp_path / "a", like)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_another_architecture_is_refused(tmp_path: Path, like: Path) -> None:
    resnet = write_released(tmp_path / "r.pt", {"encoder.conv1.weight": torch.zeros(2), "head.0.bias": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"holds neither BrainMVP's UniFormer .* it begins with encoder"):
        import_weights(resnet, tmp_path / "a")
    small = write_released(tmp_path / "s.pt", random_state(TINY_UNIFORMER_TABLE))
    with pytest.raises(WeightsError, match=r"not the layout of BrainMVP's UniFormer \(352 tensors\); \d+ missing: "):
        import_weights(small, tmp_path / "a")
    unet = write_released(tmp_path / "u.pt", random_state(TINY_UNET_TABLE))
    with pytest.raises(WeightsError, match=r"\d+ missing: encoder\.uniformer\..*, \.\.\.; \d+ unknown: conv1a"):
        import_weights(unet, tmp_path / "a", like)


CONTENTS: dict[str, tuple[Any, str]] = {
    "a list": ([torch.zeros(1)], "holds a list; a state_dict or a dict with `state_dict` or `model` is needed"),
    "an empty state": ({"state_dict": {}}, "`state_dict` must be a dict of tensors with at least one"),
    "a state that is none": ({"state_dict": torch.zeros(1)}, "`state_dict` must be a dict of tensors .* got Tensor"),
    "a number among tensors": ({"conv1a.weight": 3}, "'conv1a.weight' is a int; a state_dict holds tensors by name"),
}


@pytest.mark.parametrize("what", list(CONTENTS))
def test_what_is_no_state_is_refused(tmp_path: Path, what: str) -> None:
    content, message = CONTENTS[what]
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=message):
        import_weights(tmp_path / "w.pt", tmp_path / "a")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, like: Path, share: float) -> None:
    file = write_released(tmp_path / "w.pt", random_state(TINY_UNIFORMER_TABLE))
    os.truncate(file, int(file.stat().st_size * share))
    with pytest.raises(WeightsError, match=r"w\.pt is not a whole zip archive .* truncated, damaged"):
        import_weights(file, tmp_path / "a", like)


def test_a_damaged_file_is_refused(tmp_path: Path, like: Path) -> None:
    file = write_released(tmp_path / "w.pt", random_state(TINY_UNIFORMER_TABLE))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=r"the checksum of its part .*data/\d+ is wrong: the file is damaged"):
        import_weights(file, tmp_path / "a", like)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_a_hostile_pickle_is_never_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    torch.save({"state_dict": {STEM: Hostile(marker)}}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Hostile(marker)))
    with pytest.raises(WeightsError, match=r"zip\.pt cannot be read as plain tensors and was not unpickled"):
        import_weights(tmp_path / "zip.pt", tmp_path / "a")
    with pytest.raises(WeightsError, match=r"plain\.pt is not a whole zip archive"):
        import_weights(tmp_path / "plain.pt", tmp_path / "a")
    assert not marker.exists()


def test_sizes_are_checked_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_released(tmp_path / "w.pt", random_state({"conv1a.weight": (64, 64)}))
    with pytest.raises(WeightsError, match=r"w\.pt has \d+ bytes; .* at most 1000: it is something else"):
        read_checkpoint(file, max_bytes=1000)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", b"\0" * 10**6)
    with pytest.raises(WeightsError, match=r"part w/data\.pkl is compressed, which torch\.save never does"):
        read_checkpoint(tmp_path / "bomb.pt", max_bytes=10**9)
    with zipfile.ZipFile(tmp_path / "empty.pt", "w") as archive:
        archive.writestr("w/version", b"3")
    with pytest.raises(WeightsError, match=r"has 0 parts data\.pkl"):
        read_checkpoint(tmp_path / "empty.pt", max_bytes=10**9)
    monkeypatch.setattr("models.foreign.MAX_PICKLE_BYTES", 10)
    with pytest.raises(WeightsError, match=r"data\.pkl has \d+ bytes; at most 10 are read"):
        read_checkpoint(file, max_bytes=10**9)
    with pytest.raises(FileNotFoundError, match=r"none\.pt is not a file; give the checkpoint to import"):
        read_checkpoint(tmp_path / "none.pt", max_bytes=10**9)


# --- the folder


def test_doing_it_again_does_nothing_and_other_folders_are_left_alone(tmp_path: Path, like: Path) -> None:
    file = write_released(tmp_path / "w.pt", random_state(TINY_UNIFORMER_TABLE))
    first = import_weights(file, tmp_path / "a", like)
    again = import_weights(file, tmp_path / "a", like)
    assert (first.fresh, again.fresh) == (True, False)
    assert again.done == first.done
    other = write_released(tmp_path / "other.pt", random_state(TINY_UNIFORMER_TABLE, seed=1))
    with pytest.raises(WeightsError, match=r"a exists and was not made from other\.pt; give another folder"):
        import_weights(other, tmp_path / "a", like)
    with pytest.raises(WeightsError, match="exists and was not made from"):
        import_weights(file, like, like)


def test_a_kill_leaves_no_half_folder(tmp_path: Path, like: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_released(tmp_path / "w.pt", random_state(TINY_UNIFORMER_TABLE))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights_import, "write_text_whole", killed)
        with pytest.raises(KeyboardInterrupt):
            import_weights(file, tmp_path / "a", like)
    assert not (tmp_path / "a").exists()
    assert import_weights(file, tmp_path / "a", like).fresh
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "w.pt"]


def test_the_bank_belongs_to_the_grid(tmp_path: Path, like: Path) -> None:
    table = {**TINY_UNIFORMER_TABLE, "rep_template": (8, GRID[0] + 1, *GRID[1:])}
    file = write_released(tmp_path / "w.pt", random_state(table))
    with pytest.raises(WeightsError, match=r"rep_template \(float32 8x41x44x36 in the file, float32 8x40x44x36 expec"):
        import_weights(file, tmp_path / "a", like)


def test_what_cannot_stand_for_the_network_is_refused(tmp_path: Path) -> None:
    file = write_released(tmp_path / "w.pt", random_state(TINY_UNIFORMER_TABLE))
    with pytest.raises(NotFinishedError, match=r"nothing has no config\.json: it is not the folder of a finished"):
        import_weights(file, tmp_path / "a", like=tmp_path / "nothing")


def test_a_report_says_that_the_encoder_was_imported(tmp_path: Path, like: Path) -> None:
    file = write_released(tmp_path / "w.pt", random_state(TINY_UNIFORMER_TABLE))
    folder = import_weights(file, tmp_path / "trainings" / "released", like).folder
    assert read_selection(folder / "selection.parquet") == []
    made = Made(tmp_path, SimpleNamespace(spec=SPEC), pd.DataFrame(), pd.DataFrame(), MadeFrom(), (Run("a", folder),))  # type: ignore[arg-type]
    text = description(made)
    assert "The encoder was imported from the file “w.pt” (it may have seen test subjects" in text
    assert "outside the test role" not in text
