"""Files as BrainMVP's reference code would save them: its key tables stated again, filled with random numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from objective_cases import NETWORK, SPEC, make_config

from models.config import BrainMVPConfig, ObjectiveConfig, UNet3DConfig
from models.export import write_text_whole, write_weights
from models.objectives import build_objective

Table = dict[str, tuple[int, ...]]

TINY_UNET = UNet3DConfig(widths=(8, 8, 16, 16), blocks=(1, 2, 2, 4))
PAPER = BrainMVPConfig()
GRID = SPEC.grid


def uniformer_table(
    dims: tuple[int, int, int, int] = (64, 128, 320, 512),
    depths: tuple[int, int, int, int] = (3, 4, 8, 3),
    decoder_dim: int = 64,
    grid: tuple[int, int, int] = (240, 240, 155),
) -> Table:
    """The state_dict of the reference's UniFormer pre-training, in its order."""
    table: Table = {"rep_template": (8, *grid)}
    for stage, (before, dim) in enumerate(zip((1, *dims[:3]), dims, strict=True), start=1):
        stem = f"encoder.uniformer.patch_embed{stage}"
        table |= {f"{stem}.proj.weight": (dim, before, 2, 2, 2), f"{stem}.proj.bias": (dim,)}
        table |= {f"{stem}.norm.weight": (dim,), f"{stem}.norm.bias": (dim,)}
    for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True), start=1):
        for block in range(depth):
            rows = _convolution_block(dim) if stage <= 2 else _attention_block(dim)
            table |= {f"encoder.uniformer.blocks{stage}.{block}.{name}": shape for name, shape in rows.items()}
    table |= {f"encoder.uniformer.norm.{name}": shape for name, shape in _batch_norm(dims[3]).items()}
    levels = ((5, dims[3], dims[2]), (4, dims[2], dims[1]), (3, dims[1], dims[0]), (2, dims[0], decoder_dim))
    for level, before, dim in levels:
        up = f"decoder.decoder{level}"
        table[f"{up}.transp_conv.conv.weight"] = (before, dim, 2, 2, 2)
        table[f"{up}.conv_block.conv1.conv.weight"] = (dim, 2 * dim, 3, 3, 3)
        table[f"{up}.conv_block.conv2.conv.weight"] = (dim, dim, 3, 3, 3)
        table[f"{up}.conv_block.conv3.conv.weight"] = (dim, 2 * dim, 1, 1, 1)
    table |= {"decoder.proj1.proj.weight": (decoder_dim, 1, 3, 3, 3), "decoder.proj1.proj.bias": (decoder_dim,)}
    table |= {"decoder.proj1.norm.weight": (decoder_dim,), "decoder.proj1.norm.bias": (decoder_dim,)}
    return table | {"decoder.out_1.conv.conv.weight": (1, decoder_dim, 1, 1, 1), "decoder.out_1.conv.conv.bias": (1,)}


def _batch_norm(dim: int) -> Table:
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {**dict.fromkeys(vectors, (dim,)), "num_batches_tracked": ()}


def _layer(name: str, shape: tuple[int, ...]) -> Table:
    return {f"{name}.weight": shape, f"{name}.bias": (shape[0],)}


def _convolution_block(dim: int) -> Table:
    norms = [{f"norm{k}.{name}": shape for name, shape in _batch_norm(dim).items()} for k in (1, 2)]
    point = (dim, dim, 1, 1, 1)
    return (
        _layer("pos_embed", (dim, 1, 3, 3, 3)) | norms[0] | _layer("conv1", point) | _layer("conv2", point)
        | _layer("attn", (dim, 1, 5, 5, 5)) | norms[1]
        | _layer("mlp.fc1", (4 * dim, dim, 1, 1, 1)) | _layer("mlp.fc2", (dim, 4 * dim, 1, 1, 1))
    )  # fmt: skip


def _attention_block(dim: int) -> Table:
    return (
        _layer("pos_embed", (dim, 1, 3, 3, 3)) | _layer("norm1", (dim,))
        | _layer("attn.qkv", (3 * dim, dim)) | _layer("attn.proj", (dim, dim)) | _layer("norm2", (dim,))
        | _layer("mlp.fc1", (4 * dim, dim)) | _layer("mlp.fc2", (dim, 4 * dim))
    )  # fmt: skip


def unet_table(
    widths: tuple[int, int, int, int] = (32, 64, 128, 256), grid: tuple[int, int, int] = (240, 240, 155)
) -> Table:
    """The state_dict of the reference's UNET3D pre-training, in its order."""
    one, two, three, four = widths
    table: Table = {"rep_template": (8, *grid), **_layer("conv1a", (one, 1, 3, 3, 3)), **_residual("conv1b", one)}
    for level, before, dim, letters in ((2, one, two, "ab"), (3, two, three, "ab"), (4, three, four, "abcd")):
        table |= _layer(f"ds{level - 1}", (dim, before, 3, 3, 3))
        for letter in letters:
            table |= _residual(f"conv{level}{letter}", dim)
    for level, before, dim in ((4, four, three), (3, three, two), (2, two, one)):
        table |= _layer(f"up{level}conva", (dim, before, 1, 1, 1)) | _residual(f"up{level}convb", dim)
    return table | _layer("up1conv", (1, one, 1, 1, 1))


def _residual(name: str, dim: int) -> Table:
    parts = [_layer(f"{name}.gn{k}", (dim,)) | _layer(f"{name}.conv{k}", (dim, dim, 3, 3, 3)) for k in (1, 2)]
    return parts[0] | parts[1]


TINY_UNIFORMER_TABLE = uniformer_table(NETWORK.embed_dims, NETWORK.depths, NETWORK.decoder_dim, GRID)
TINY_UNET_TABLE = unet_table(TINY_UNET.widths, GRID)


def random_state(table: Table, prefix: str = "", seed: int = 0) -> dict[str, torch.Tensor]:
    """Return float32 tensors; the counters of batch norms are int64 scalars, as torch saves them."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in table.items():
        value = torch.randn(shape, generator=generator) / math.sqrt(max(1, math.prod(shape[1:])))
        if name.endswith("running_var"):
            value = value.abs() + 0.5
        state[prefix + name] = torch.tensor(7) if name.endswith("num_batches_tracked") else value
    return state


def write_released(path: Path, state: dict[str, torch.Tensor], wrapped: bool = True) -> Path:
    """Save a state as the reference's training does, with its optimiser, or bare."""
    optimiser = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 3e-4}]}
    content: Any = {"current_epoch": 1499, "state_dict": state, "optimizer": optimiser, "val_best": 0.0}
    torch.save(content if wrapped else state, path)
    return path


def write_untrained(folder: Path, settings: ObjectiveConfig = PAPER, network: Any = NETWORK, **data: Any) -> Path:
    """Write a finished training whose weights are those it would start with."""
    torch.manual_seed(3)
    config = make_config(settings, network, **data).replace(name=folder.name)
    folder.mkdir(parents=True)
    digest = write_weights(folder, build_objective(config, SPEC).exports())
    content = f'{{"training": {config.model_dump_json()}, "spec": {SPEC.model_dump_json()}}}'
    write_text_whole(folder / "config.json", content)
    write_text_whole(folder / "run.json", config.model_dump_json())
    write_text_whole(folder / "model_card.md", f"# {folder.name}\n")
    write_text_whole(folder / "done.json", f'{{"training": "{folder.name}", "weights_digest": "{digest}"}}')
    return folder
