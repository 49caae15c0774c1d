"""Exports: BrainMVP's layout, a portable folder, MONAI bundles; the same features in a clean process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from objective_cases import NETWORK, RECOMMENDED
from released_files import TINY_UNET, TINY_UNIFORMER_TABLE, random_state, write_released, write_untrained

from models.bundle import network_of
from models.config import ClassificationConfig, MaskedCropsConfig, ObjectiveConfig, SegmentationConfig
from models.encoder import load_encoder
from models.export import NotFinishedError
from models.finished import read_training
from models.recipes import TUMOUR_REGIONS
from models.released import WeightsError
from tasks.weights_export import FORMATS, export_weights
from tasks.weights_import import SIDE_FILE, import_weights
from tasks.weights_info import weights_info

IMAGE = torch.rand(1, 1, 32, 16, 32, generator=torch.Generator().manual_seed(5))
SEGMENTATION = SegmentationConfig(modalities=("t1",), regions=TUMOUR_REGIONS)
CLASSIFICATION = ClassificationConfig(modalities=("t1",), classes=("control", "patient"))


def _in_clean_process(code: str, folder: Path, *arguments: object) -> torch.Tensor:
    """Run code that leaves `found` with the image as `image`; return it."""
    torch.save(IMAGE, folder / "image.pt")
    program = (
        f"import sys, torch\nimage = torch.load(r'{folder}/image.pt')\n"
        f"with torch.no_grad():\n    {code}\ntorch.save(found, r'{folder}/found.pt')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "found.pt")


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untrained(tmp_path_factory.mktemp("trainings") / "paper")


def test_the_released_layout_takes_a_training_of_the_paper_preset(paper: Path, tmp_path: Path) -> None:
    first = torch.load(export_weights(paper, tmp_path / "a.pt", "brainmvp"), weights_only=True)
    second = torch.load(export_weights(paper, tmp_path / "b.pt", "brainmvp"), weights_only=True)
    state = first["state_dict"]
    assert [(name, tuple(value.shape)) for name, value in state.items()] == list(TINY_UNIFORMER_TABLE.items())
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in state.items())
    drawn = [state[f"decoder.decoder{level}.conv_block.conv1.conv.weight"].flatten()[:8] for level in (5, 4)]
    assert all(values.abs().min() > 0 for values in drawn)
    assert not torch.equal(*drawn)
    again = import_weights(tmp_path / "a.pt", tmp_path / "again", like=paper)
    ours, theirs = read_training(paper).tensors, read_training(again.folder).tensors
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            RECOMMENDED.replace(template_init="zero", template_gain=True),
            r"6 tensors have no place in it \(decoder\.out_1.*presets `paper` and `code` have its structure",
        ),
        (SEGMENTATION, "it is a segmentation, not a pre-training"),
        (MaskedCropsConfig(mask_block=8), "it is our baseline mae, of which nobody released weights"),
    ],
)
def test_what_the_released_layout_cannot_hold_is_said(tmp_path: Path, settings: ObjectiveConfig, message: str) -> None:
    training = write_untrained(tmp_path / "a", settings)
    with pytest.raises(WeightsError, match=rf"training {training} cannot be written in .* layout: {message}"):
        export_weights(training, tmp_path / "a.pt", "brainmvp")
    assert weights_info(training)["formats"]["brainmvp"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_portable_folder_is_a_finished_training_without_local_paths(tmp_path: Path) -> None:
    training = write_untrained(tmp_path / "secret" / "a", store="/secret/place/s.zarr", selection="/secret/sel.parquet")
    folder = export_weights(training, tmp_path / "out", "safetensors")
    assert not any(b"secret" in path.read_bytes() for path in folder.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "done.json", "model_card.md", "weights.safetensors",
    ]  # fmt: skip
    ours, theirs = load_encoder(training)(IMAGE)[4], load_encoder(folder)(IMAGE)[4]
    assert torch.equal(ours, theirs)


def test_a_portable_folder_of_imported_weights_still_comes_back(paper: Path, tmp_path: Path) -> None:
    state = random_state(TINY_UNIFORMER_TABLE, "module.")
    imported = import_weights(write_released(tmp_path / "w.pt", state, wrapped=False), tmp_path / "a", like=paper)
    folder = export_weights(imported.folder, tmp_path / "out", "safetensors")
    assert (folder / SIDE_FILE).exists()
    back = torch.load(export_weights(folder, tmp_path / "back.pt", "brainmvp"), weights_only=True)
    assert list(back) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in back.items())


@pytest.mark.parametrize("network", [NETWORK, TINY_UNET], ids=["uniformer", "unet3d"])
def test_a_clean_process_gives_the_same_features(tmp_path: Path, network: object) -> None:
    training = write_untrained(tmp_path / "a", network=network)
    code = "import brainloom; found = brainloom.load_encoder(sys.argv[1])(image)[4]"
    with torch.no_grad():
        assert torch.equal(_in_clean_process(code, tmp_path, training), load_encoder(training)(IMAGE)[4])


def test_bundles_give_the_same_outputs_in_a_clean_process(tmp_path: Path) -> None:
    expected = []
    for name, settings in (("encoder", None), ("segmentation", SEGMENTATION), ("classification", CLASSIFICATION)):
        training = write_untrained(tmp_path / name, settings) if settings else write_untrained(tmp_path / name)
        export_weights(training, tmp_path / "bundles" / name, "monai-bundle")
        network, _ = network_of(read_training(training).config)
        tensors = read_training(training).tensors
        network.load_state_dict(
            {n.removeprefix("encoder.") if settings is None else n: tensors[n if settings else f"encoder.{n}"]
             for n in network.state_dict()}
        )  # fmt: skip
        outputs = network.eval()(IMAGE)
        expected.append(outputs if isinstance(outputs, torch.Tensor) else outputs[0 if settings else 4])
    code = (
        "from monai.bundle import load; names = ('encoder', 'segmentation', 'classification'); found = [];\n"
        "    for name in names:\n"
        "        out = load(name, bundle_dir=sys.argv[1], workflow_type='inference', device='cpu').eval()(image)\n"
        "        found.append(out if torch.is_tensor(out) else out[4 if name == 'encoder' else 0])"
    )
    found = _in_clean_process(code, tmp_path, tmp_path / "bundles")
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_bundle_names_what_it_needs(paper: Path, tmp_path: Path) -> None:
    from monai.bundle import ConfigWorkflow

    bundle = export_weights(paper, tmp_path / "b", "monai-bundle")
    meta = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert "brainloom" in meta["required_packages_version"]
    assert meta["network_data_format"]["inputs"]["image"]["num_channels"] == 1
    assert meta["weights_digest"] == json.loads((paper / "done.json").read_text())["weights_digest"]
    assert "monai.bundle import load" in (bundle / "docs" / "README.md").read_text()
    settings = str(bundle / "configs" / "inference.json")
    workflow = ConfigWorkflow(settings, workflow_type="inference", logging_file=False, bundle_root=str(bundle))
    workflow.initialize()
    network = workflow.parser.get_parsed_content("network")
    assert torch.equal(network(IMAGE)[4], load_encoder(paper)(IMAGE)[4])
    assert (workflow.version, workflow.monai_version) == (meta["version"], meta["monai_version"])


def test_nothing_is_overwritten_and_unfinished_trainings_are_refused(paper: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for form in FORMATS:
        with pytest.raises(FileExistsError, match=r"out exists; give another --out, or move it away"):
            export_weights(paper, tmp_path / "out", form)
    with pytest.raises(NotFinishedError, match="it is not finished; run it to its end"):
        export_weights(tmp_path, tmp_path / "new", "safetensors")
    with pytest.raises(WeightsError, match="unknown format 'onnx'; known: brainmvp, anatcl, safetensors, monai-bundle"):
        export_weights(paper, tmp_path / "new", "onnx")


def test_info_counts_the_parts(paper: Path) -> None:
    found = weights_info(paper)
    assert found["network"] == "uniformer"
    assert found["origin"] == "trained here from random weights"
    assert set(found["parts"]) == {"encoder", "decoder", "template"}
    others = {name: why for name, why in found["formats"].items() if why}
    assert others == {"anatcl": "it was pre-trained with BrainMVP"}
    assert sum(tensors for tensors, _ in found["parts"].values()) == len(read_training(paper).tensors)
