"""A finished training as a MONAI bundle: `configs/`, `models/model.pt` and `docs/`, read by `monai.bundle.load`.

The network is built by the installed brainloom, so the bundle needs that package beside MONAI.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.config import SegmentationConfig, SupervisedConfig, TrainingConfig
from models.config_anatcl import WholeMapConfig
from models.export import write_text_whole
from models.finished import ENCODER, FinishedTraining
from models.networks.build import build_encoder
from models.networks.classification import ClassificationNet
from models.networks.segmentation import SegmentationNet

VERSION = "0.1.0"
"""Of the bundle's layout."""
PACKAGES = ("torch", "monai", "numpy")


def write_bundle(finished: FinishedTraining, folder: Path) -> None:
    """Write a bundle into a new folder.

    A pre-training gives its encoder, which returns the input and four stages; a segmentation gives logits of full, 1/2
    and 1/4 resolution (SwinUNETR: of full resolution); a classification gives logits. Raises RuntimeError naming the
    first key when config and weights do not belong together.
    """
    config = finished.config
    network, definition = network_of(config)
    state = _state_of(finished)
    network.load_state_dict(state)
    for name in ("configs", "models", "docs"):
        (folder / name).mkdir(parents=True)
    torch.save(state, folder / "models" / "model.pt")
    _write_json(folder / "configs" / "metadata.json", _metadata(finished))
    _write_json(
        folder / "configs" / "inference.json",
        {
            "imports": ["$import torch"],
            "bundle_root": ".",
            "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
            "checkpoint": "$@bundle_root + '/models/model.pt'",
            "network_def": definition,
            "state": "$torch.load(@checkpoint, map_location='cpu', weights_only=True)",
            "network": "$(@network_def.load_state_dict(@state), @network_def.to(@device).eval())[1]",
        },
    )
    write_text_whole(folder / "docs" / "README.md", _readme(finished))


def network_of(config: TrainingConfig) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of a training, with random weights, and how a MONAI config builds it."""
    settings = config.objective
    values: dict[str, int] = {}
    build: Callable[..., nn.Module] = build_encoder
    if settings.kind == "segmentation":
        build, values = SegmentationNet, {"regions": len(settings.regions)}
    elif settings.kind == "classification":
        build, values = ClassificationNet, {"classes": len(settings.classes)}
    sizes = {"_target_": _path(type(config.network)), **config.network.model_dump(mode="json")}
    return build(config.network, **values), {"_target_": _path(build), "config": sizes, **values}


def _path(target: Callable[..., Any]) -> str:
    return f"{target.__module__}.{target.__name__}"


def _state_of(finished: FinishedTraining) -> dict[str, Tensor]:
    settings = finished.config.objective
    if not isinstance(settings, SupervisedConfig):
        return finished.part(ENCODER)
    parts = (ENCODER, "decoder." if isinstance(settings, SegmentationConfig) else "head.")
    return {name: value for name, value in finished.tensors.items() if name.startswith(parts)}


def _metadata(finished: FinishedTraining) -> dict[str, Any]:
    config, spec = finished.config, finished.spec
    step = config.network.edge_multiple
    versions = {name: metadata.version(name).partition("+")[0] for name in (*PACKAGES, "brainloom")}
    image = {
        "type": "image",
        "format": "magnitude",
        "modality": "MR",
        "num_channels": config.network.in_channels,
        "spatial_shape": ["*" if step == 1 else f"{step}*n"] * 3,
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": True,
        "channel_def": {str(k): name for k, name in enumerate(_channels(config))},
    }
    return {
        "version": VERSION,
        "changelog": {VERSION: "exported by brainloom"},
        "monai_version": versions["monai"],
        "pytorch_version": versions["torch"],
        "numpy_version": versions["numpy"],
        "required_packages_version": {"brainloom": versions["brainloom"]},
        "name": config.name,
        "task": f"brain MRI, {config.objective.kind}",
        "description": f"3D {config.network.kind} of the training {config.name}; see docs/README.md",
        "intended_use": "Research only: not for clinical use",
        "data_type": "nifti",
        "preprocessing_spec": spec.model_dump(mode="json"),
        "weights_digest": finished.done["weights_digest"],
        "network_data_format": {"inputs": {"image": image}, "outputs": {"pred": _prediction(config)}},
    }


def _channels(config: TrainingConfig) -> tuple[str, ...]:
    settings = config.objective
    if isinstance(settings, SupervisedConfig):
        return settings.modalities
    return (settings.modality,) if isinstance(settings, WholeMapConfig) else ("any modality",)


def _prediction(config: TrainingConfig) -> dict[str, Any]:
    settings = config.objective
    if settings.kind == "segmentation":
        names, form = [region.name for region in settings.regions], "segmentation"
    elif settings.kind == "classification":
        names, form = list(settings.classes), "classification"
    else:
        names, form = [], "features"
    return {
        "type": "image" if form != "classification" else "probabilities",
        "format": form,
        "num_channels": len(names) or config.network.feature_dim,
        "dtype": "float32",
        "value_range": [],
        "is_patch_data": form != "classification",
        "channel_def": {str(k): name for k, name in enumerate(names)},
    }


def _readme(finished: FinishedTraining) -> str:
    card = (finished.folder / "model_card.md").read_text(encoding="utf-8")
    step = finished.config.network.edge_multiple
    edges = "of any length" if step == 1 else f"multiples of {step}"
    return (
        f"{card}\n## Use as a MONAI bundle\n\n"
        "```python\nfrom monai.bundle import load\n\n"
        f'network = load("{finished.config.name}", bundle_dir="<its folder>", workflow_type="inference").eval()\n'
        "```\n\nThe package brainloom must be installed: it builds the network. Inputs are (B, C, X, Y, Z), RAS, as "
        f"`preprocessing_spec` in `configs/metadata.json` says, edges {edges}.\n"
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text_whole(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
