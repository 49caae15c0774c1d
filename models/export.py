"""What a finished training leaves behind: weights, config, model card, and done.json as the last file of all."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.config import TrainingConfig
from models.records import SelectedCase

WEIGHTS = "weights.safetensors"
DONE = "done.json"
CONFIG = "config.json"


class NotFinishedError(ValueError):
    """A training folder is used as finished, and is not."""


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the XXH3-128 (hex) over names, types, shapes and bytes of all tensors, in the order of their names."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_text_whole(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # ranks may write the same file
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_weights(folder: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write weights.safetensors and return the digest of the tensors."""
    # A channels-last tensor or a view into a larger one cannot be stored as it lies.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    partial = folder / f"{WEIGHTS}.partial"
    save_file(plain, partial)
    partial.replace(folder / WEIGHTS)
    return weights_digest(plain)


def read_weights(folder: Path) -> tuple[dict[str, Tensor], str]:
    """Return the weights of a finished training and their digest.

    Raises NotFinishedError when the training has no done.json, or when the file is not the one that done.json names.
    """
    done = read_done(folder)
    if done is None:
        raise NotFinishedError(
            f"training {folder} has no {DONE}: it is not finished; run it to its end before using it"
        )
    tensors = load_file(folder / WEIGHTS)
    if (found := weights_digest(tensors)) != done["weights_digest"]:
        raise NotFinishedError(
            f"{folder / WEIGHTS} has digest {found}, {DONE} says {done['weights_digest']}; the file was changed: "
            f"delete {DONE} and run the training again"
        )
    return tensors, found


def read_done(folder: Path) -> dict[str, Any] | None:
    """Return done.json of a training folder, or None while it is not finished."""
    path = folder / DONE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def is_finished(folder: Path, config: TrainingConfig, selection_digest: str) -> bool:
    """Return whether this very training was finished: same config, same selection."""
    done = read_done(folder)
    expected = {"config_digest": config.content_digest(), "selection_digest": selection_digest}
    return done is not None and all(done.get(key) == value for key, value in expected.items())


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write uint8 (H, W) or (H, W, 3) as PNG."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    Image.fromarray(np.ascontiguousarray(picture)).save(partial, format="PNG")
    partial.replace(path)


def model_card(
    config: TrainingConfig, selection: Sequence[SelectedCase], facts: Mapping[str, Any], metrics: Mapping[str, float]
) -> str:
    """Return the text of model_card.md. `facts`: digests, store digest, world sizes, steps."""
    counts = Counter((case.dataset, case.role) for case in selection)
    data = "\n".join(f"| {dataset} | {role} | {count} |" for (dataset, role), count in sorted(counts.items()))
    numbers = "\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(metrics.items())) or "| none | |"
    origin = f"weights of `{Path(config.init_from).name}` ({facts['init_digest']})" if config.init_from else "random"
    return (
        f"# {config.name}\n\n"
        f"A 3D brain-MRI network, trained with the recipe `{config.recipe}` (preset `{config.preset}`, objective "
        f"`{config.objective.kind}`) of brainloom. **Research only: not for clinical use.**\n\n"
        f"- start: {origin}\n"
        f"- steps: {facts['step']}, epochs: {config.epochs}, seed: {config.seed}\n"
        f"- weights: {_choice(facts['weights_of'])}\n"
        f"- ranks: {_ranks(facts['world_sizes'])}\n"
        f"- time: {_time(facts['timing'])}\n"
        f"- data digest (selection): `{facts['selection_digest']}`\n"
        f"- config digest: `{facts['config_digest']}`\n"
        f"- weights digest: `{facts['weights_digest']}`\n\n"
        f"## Data\n\n| dataset | role | cases |\n|---|---|---|\n{data}\n\n"
        f"## Validation at the end\n\n| metric | value |\n|---|---|\n{numbers}\n\n{_probe(facts['probe'])}"
        "## Limits\n\nTrained on the cases above alone; other scanners, populations and preprocessing are untested. "
        "Inputs must come from a store with the same preprocessing spec. `config.json` holds every setting.\n\n"
        f"## Licence and data\n\n{_licence(config)}\n"
    )


def _licence(config: TrainingConfig) -> str:
    """Return what whoever hands the weights on must look at; the licence of our code says nothing of weights."""
    start = Path(config.init_from).name
    return (
        "brainloom gives these weights no licence. They were made from the datasets above, whose terms of use decide "
        "whether, how and to whom they may be passed on: read them first."
        + (f" They started from `{start}`, whose model card says what holds for it." if start else "")
    )


def _ranks(world_sizes: Sequence[int]) -> str:
    if len(set(world_sizes)) == 1:
        return f"{world_sizes[0]} throughout (bit-identical to an undisturbed training on the CPU)"
    chain = " then ".join(str(size) for size in world_sizes)
    return f"{chain}: the number changed on resume, so the weights differ in rounding from an undisturbed training"


def _time(timing: Mapping[str, float]) -> str:
    """Return how long the steps took, and how much of it the ranks waited for data."""
    return f"{timing['step_seconds']:.1f} s in optimiser steps, {timing['data_wait_share']:.1%} of it waiting for data"


def _probe(line: Mapping[str, Any]) -> str:
    """Return the section on the last probe of the frozen features, or nothing when there was none."""
    if not line:
        return ""
    rows = "\n".join(f"| {name.removeprefix('probe_')} | {value:.4f} |" for name, value in line["metrics"].items())
    return (
        f"## Probe of the phenotype at step {line['step']}\n\n{line['measure']}, fitted on {line['n_train']} training "
        f"cases, scored on {line['n_val']} validation cases.\n\n| probe | value |\n|---|---|\n{rows}\n\n"
    )


def _choice(chosen: Mapping[str, Any]) -> str:
    """Return which step's weights these are, and why."""
    if "value" not in chosen:
        return f"of step {chosen['step']}, the last ({chosen['why']})"
    return (
        f"of step {chosen['step']}, the {chosen['rule']}: {chosen['value']:.4f} (looks: {chosen['looks']}, cases: "
        f"{chosen['cases']})"
    )
