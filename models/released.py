"""The layouts of released weights: which tensor of the file is which of ours, with its shape.

Source: the references' modules. `BrainMVP_uniformer.pt` was counted (352 tensors, 105,744,016 entries); the names of
`BrainMVP_unet.pt` are those of the reference's UNET3D module; a file of AnatCL has 124 tensors. Axes and values are the
same on both sides, only names differ, so a file that was imported can be written again bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import AnyNetwork, NetworkConfig, ResNet3DConfig, UNet3DConfig, ViT3DConfig
from models.config_scratch import ScratchNetwork
from models.finished import BANK
from models.networks.build import build_encoder, build_pretraining_decoder, projection_head
from models.records import MODALITIES

TEMPLATE = "rep_template"
PARALLEL = "module."
"""Prefix of every name when the file was saved from DataParallel or DistributedDataParallel."""
UNUSED = "the reference's forward pass never uses it, so it was never trained"
TITLES = {"uniformer": "BrainMVP's UniFormer", "unet3d": "BrainMVP's UNET3D", "resnet3d": "AnatCL's 3D ResNet"}
"""By the kind of the network."""
NAMED = 3
"""Tensors that an error names of each kind of difference."""


class WeightsError(ValueError):
    """Weights cannot be imported or exported, and why."""


@dataclass(frozen=True)
class Layout:
    """Names, shapes and types of one released file, in the file's order."""

    network: AnyNetwork
    ours: dict[str, str]
    """Released name -> name in weights.safetensors, for the tensors that are used."""
    tensors: dict[str, Tensor]
    """Released name -> tensor without storage, of all tensors."""

    @property
    def unused(self) -> list[str]:
        """Released names of the tensors that no forward pass uses."""
        return [name for name in self.tensors if name not in self.ours]


def layout_of(network: AnyNetwork, grid: tuple[int, int, int], head_dim: int = 128) -> Layout:
    """Return the layout of a network's file: of BrainMVP with templates on a grid of voxels, of AnatCL with a head.

    Raises WeightsError for a vision transformer and for the networks of others.
    """
    if isinstance(network, ScratchNetwork):
        raise WeightsError(
            f"network {network.kind!r} is trained from scratch only, so there is no layout of its weights"
        )
    if isinstance(network, ResNet3DConfig):
        return _resnet_layout(network, head_dim)
    if isinstance(network, ViT3DConfig):
        raise WeightsError("no weights of a vision transformer ('vit3d') were released, so there is no layout of them")
    with torch.device("meta"):
        encoder = build_encoder(network).state_dict()
        decoder = build_pretraining_decoder(network).state_dict()
        bank = {BANK: torch.empty(len(MODALITIES), *grid)}
    own = {f"encoder.{k}": v for k, v in encoder.items()} | {f"decoder.{k}": v for k, v in decoder.items()} | bank
    if isinstance(network, UNet3DConfig):
        pairs, dead = _unet_names(own), {}
    else:
        pairs, dead = _uniformer_names(own), _unused_shapes(network)
    tensors = {name: own[mine] for name, mine in pairs.items()}
    with torch.device("meta"):
        tensors |= {name: torch.empty(shape) for name, shape in dead.items()}
    order = sorted(tensors, key=_unet_place if isinstance(network, UNet3DConfig) else _uniformer_place)
    return Layout(network, pairs, {name: tensors[name] for name in order})


def _resnet_layout(network: ResNet3DConfig, head_dim: int) -> Layout:
    """Return AnatCL's layout, `encoder.*` and `head.*`: its names are ours."""
    with torch.device("meta"):
        encoder, head = build_encoder(network), projection_head(network.feature_dim, head_dim)
    tensors = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    tensors |= {f"head.{name}": value for name, value in head.state_dict().items()}
    return Layout(network, {name: name for name in tensors}, tensors)


def detect_network(names: Iterable[str]) -> AnyNetwork:
    """Return the released network that names look like; raises WeightsError when they look like none."""
    found = list(names)
    if any(name.startswith("encoder.uniformer.") for name in found):
        return NetworkConfig()
    if "conv1a.weight" in found:
        return UNet3DConfig()
    if "encoder.layer1.0.conv1.weight" in found:
        return ResNet3DConfig(mirror_x=True)
    shown = ", ".join(found[:NAMED]) or "nothing"
    raise WeightsError(
        f"it holds neither BrainMVP's UniFormer (`encoder.uniformer.*`) nor its UNET3D (`conv1a.weight`), nor AnatCL's "
        f"3D ResNet (`encoder.layer1.*`): it begins with {shown}"
    )


def strip_parallel(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Return a state without the prefix `module.`, and the prefix; raises WeightsError when only some names have it."""
    with_prefix = [name for name in state if name.startswith(PARALLEL)]
    if not with_prefix:
        return dict(state), ""
    if len(with_prefix) < len(state):
        other = next(name for name in state if not name.startswith(PARALLEL))
        raise WeightsError(f"some names begin with `{PARALLEL}` ({with_prefix[0]}) and some do not ({other})")
    return {name.removeprefix(PARALLEL): value for name, value in state.items()}, PARALLEL


def check_state(state: Mapping[str, Tensor], layout: Layout) -> None:
    """Refuse a state that is not exactly the layout: raises WeightsError naming the first tensors that differ."""
    expected = layout.tensors
    differences = {
        "missing": [name for name in expected if name not in state],
        "unknown": [name for name in state if name not in expected],
        "of another shape or type": [
            f"{name} ({_words(value)} in the file, {_words(expected[name])} expected)"
            for name, value in state.items()
            if name in expected and _words(value) != _words(expected[name])
        ],
    }
    told = [
        f"{len(names)} {what}: {', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''}"
        for what, names in differences.items()
        if names
    ]
    if told:
        raise WeightsError(f"it is not the layout of {_title(layout)}; {'; '.join(told)}")
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise WeightsError(f"tensor {name} holds values that are not finite; the training behind it has diverged")


def _words(tensor: Tensor) -> str:
    words = [str(tensor.dtype).removeprefix("torch."), "x".join(map(str, tensor.shape)) or "scalar"]
    return " ".join(words if tensor.layout == torch.strided else [*words, "sparse"])


def _title(layout: Layout) -> str:
    return f"{TITLES[layout.network.kind]} ({len(layout.tensors)} tensors)"


def _uniformer_names(own: Iterable[str]) -> dict[str, str]:
    pairs = {}
    for name in own:
        if name == BANK:
            pairs[TEMPLATE] = name
        elif name.startswith("encoder."):
            pairs[f"encoder.uniformer.{name.removeprefix('encoder.')}"] = name
        else:
            pairs[name] = name
    return pairs


def _unused_shapes(network: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Return the parts of MONAI's UnetrUpBlocks and the input projection that the reference builds for nothing."""
    one, two, three, _ = network.embed_dims
    shapes: dict[str, tuple[int, ...]] = {}
    for level, dim in ((5, three), (4, two), (3, one), (2, network.decoder_dim)):
        block = f"decoder.decoder{level}.conv_block"
        shapes[f"{block}.conv1.conv.weight"] = (dim, 2 * dim, 3, 3, 3)
        shapes[f"{block}.conv2.conv.weight"] = (dim, dim, 3, 3, 3)
        shapes[f"{block}.conv3.conv.weight"] = (dim, 2 * dim, 1, 1, 1)
    shapes["decoder.proj1.proj.weight"] = (network.decoder_dim, network.in_channels, 3, 3, 3)
    for name in ("proj.bias", "norm.weight", "norm.bias"):
        shapes[f"decoder.proj1.{name}"] = (network.decoder_dim,)
    return shapes


_UNIFORMER_ORDER = (
    TEMPLATE, "encoder.uniformer.patch_embed", "encoder.uniformer.blocks", "encoder.uniformer.norm",
    "decoder.decoder5.transp", "decoder.decoder5", "decoder.decoder4.transp", "decoder.decoder4",
    "decoder.decoder3.transp", "decoder.decoder3", "decoder.decoder2.transp", "decoder.decoder2", "decoder.proj1",
    "decoder.out_1",
)  # fmt: skip


def _uniformer_place(name: str) -> int:
    return next(place for place, start in enumerate(_UNIFORMER_ORDER) if name.startswith(start))


def _unet_names(own: Iterable[str]) -> dict[str, str]:
    modules = {"encoder.stem": "conv1a", "decoder.out_1": "up1conv", "encoder.level1.0": "conv1b"}
    for level in (2, 3, 4):
        modules[f"encoder.down{level}"] = f"ds{level - 1}"
        modules |= {f"encoder.level{level}.{block}": f"conv{level}{letter}" for block, letter in enumerate("abcd")}
        modules[f"decoder.up{level - 1}.reduce"] = f"up{level}conva"
        modules[f"decoder.up{level - 1}.block"] = f"up{level}convb"
    pairs = {}
    for name in own:
        if name == BANK:
            pairs[TEMPLATE] = name
            continue
        module = next(ours for ours in modules if name.startswith(f"{ours}."))
        pairs[modules[module] + name.removeprefix(module)] = name
    return pairs


_UNET_ORDER = (
    TEMPLATE, "conv1", "ds1", "conv2", "ds2", "conv3", "ds3", "conv4", "up4conva", "up4convb", "up3conva", "up3convb",
    "up2conva", "up2convb", "up1conv",
)  # fmt: skip


def _unet_place(name: str) -> int:
    return next(place for place, start in enumerate(_UNET_ORDER) if name.startswith(start))
