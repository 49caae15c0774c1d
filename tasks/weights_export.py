"""Export a finished training: in a released layout, as a portable folder of safetensors, or as a MONAI bundle."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.bundle import write_bundle
from models.config import TrainingConfig
from models.export import DONE, write_text_whole, write_weights
from models.finished import FinishedTraining, read_training, write_settings
from models.foreign import STATE
from models.released import Layout, WeightsError, layout_of
from tasks.weights_import import SIDE_FILE

EXAMPLES = 3
"""Tensors that an error names."""


def export_weights(training: Path, out: Path, form: str) -> Path:
    """Write the weights of a finished training in one of `FORMATS` and return where.

    Nothing is overwritten. Raises NotFinishedError for a training that is not finished, WeightsError for a format that
    cannot hold it, FileExistsError.
    """
    if form not in FORMATS:
        raise WeightsError(f"unknown format {form!r}; known: {', '.join(FORMATS)}")
    if out.exists():
        raise FileExistsError(f"{out} exists; give another --out, or move it away")
    finished = read_training(training)
    unfinished = out.with_name(f".{out.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    FORMATS[form](finished, unfinished)
    unfinished.rename(out)
    return out


def formats_of(finished: FinishedTraining) -> dict[str, str]:
    """Return each format with an empty string, or why it cannot hold the training."""
    return {form: _why_not_released(finished, form) if form in RELEASED else "" for form in FORMATS}


RELEASED = {"brainmvp": "BrainMVP", "anatcl": "AnatCL"}
"""Methods by the format and the kind of their objective."""
OURS = ("mae", "simclr_crops")
"""Kinds of pre-training that have no released layout."""
LEFT_OUT = ("descriptor_mean", "descriptor_std")
"""What our trainings keep and the released files of AnatCL do not: the scale of the descriptors."""


def _write_released(finished: FinishedTraining, path: Path, form: str) -> None:
    if why := _why_not_released(finished, form):
        raise WeightsError(f"training {finished.folder} cannot be written in {RELEASED[form]}'s released layout: {why}")
    layout = _layout(finished)
    unused = _unused(finished, layout)
    origin = finished.done.get("origin", {})
    prefix = origin.get("prefix", "")
    state = {
        prefix + name: finished.tensors[layout.ours[name]] if name in layout.ours else unused[name]
        for name in layout.tensors
    }
    own, epoch = (STATE, "current_epoch") if form == "brainmvp" else ("model", "epoch")
    others = origin["kept"] if origin else {epoch: finished.config.epochs - 1}
    key = origin.get("key", own) if origin.get("wrapped", True) else ""
    torch.save({**others, key: state} if key else state, path)


def _layout(finished: FinishedTraining) -> Layout:
    settings = finished.config.objective
    head = settings.head_dim if settings.kind == "anatcl" else 0
    return layout_of(finished.config.network, finished.spec.grid, head)


def _why_not_released(finished: FinishedTraining, form: str) -> str:
    kind = finished.config.objective.kind
    if kind != form:
        if kind in RELEASED:
            return f"it was pre-trained with {RELEASED[kind]}"
        if kind == "cinp":
            return "it was pre-trained with CINP, which released no weights; use `safetensors` or `monai-bundle`"
        if kind in OURS:
            return f"it is our baseline {kind}, of which nobody released weights; use `safetensors` or `monai-bundle`"
        return f"it is a {kind.replace('age_', '')}, not a pre-training"
    layout = _layout(finished)
    shapes = {mine: layout.tensors[name].shape for name, mine in layout.ours.items()}
    others = [n for n, value in finished.tensors.items() if shapes.get(n) != value.shape and n not in LEFT_OUT]
    if not others:
        return ""
    return (
        f"{len(others)} tensors have no place in it ({', '.join(others[:EXAMPLES])}); the presets `paper` and `code` "
        "have its structure"
    )


def _unused(finished: FinishedTraining, layout: Layout) -> dict[str, Tensor]:
    """Return the tensors that nothing uses: those of the imported file, or fresh ones.

    Fresh ones are drawn as torch draws new layers, from the digest of the weights, so that an export is repeatable:
    the reference's fine-tuning code takes these blocks over and zeros would stay zeros.
    """
    if not layout.unused:
        return {}
    if (finished.folder / SIDE_FILE).exists():
        return load_file(finished.folder / SIDE_FILE)
    generator = torch.Generator().manual_seed(int(str(finished.done["weights_digest"])[:15], 16))
    return {name: _fresh(name, layout.tensors[name].shape, generator) for name in layout.unused}


def _fresh(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("norm.weight") else torch.zeros(shape)
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _write_folder(finished: FinishedTraining, folder: Path) -> None:
    """Write a folder that is a finished training for `load_encoder` and `init_from`, without paths and subjects."""
    folder.mkdir()
    write_weights(folder, finished.tensors)
    if (finished.folder / SIDE_FILE).exists():
        shutil.copyfile(finished.folder / SIDE_FILE, folder / SIDE_FILE)
    write_settings(folder, _portable(finished.config), finished.spec)
    write_text_whole(folder / "model_card.md", (finished.folder / "model_card.md").read_text(encoding="utf-8"))
    write_text_whole(folder / DONE, json.dumps(finished.done, indent=1) + "\n")


def _portable(config: TrainingConfig) -> TrainingConfig:
    """Return a config in which paths are names: what is local tells nobody anything."""
    data = config.data.replace(store=Path(config.data.store).name, selection="")
    return config.replace(data=data, init_from=Path(config.init_from).name)


FORMATS: dict[str, Callable[[FinishedTraining, Path], None]] = {
    "brainmvp": partial(_write_released, form="brainmvp"),
    "anatcl": partial(_write_released, form="anatcl"),
    "safetensors": _write_folder,
    "monai-bundle": write_bundle,
}
"""How to write a training: to a file `.pt` (brainmvp, anatcl) or into a new folder."""
