"""What a training is: one frozen config, written as run.json, passed by path, carried in every checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from models.config_anatcl import AgeRegressionConfig, AnatCLConfig
from models.config_cinp import CINPConfig, ViT3DConfig
from models.config_crops import CropContrastConfig, MaskedCropsConfig
from models.config_scratch import DynUNetConfig, ScratchNetwork, SwinUNETRConfig
from models.records import Record, digest_of, without_unset


class NetworkConfig(Record):
    """UniFormer encoder sizes. The defaults are UniFormer-S of BrainMVP (22,038,464 parameters with one channel)."""

    edge_multiple: ClassVar[int] = 16
    """Edges of images that the network takes are multiples of this."""

    kind: Literal["uniformer"] = "uniformer"
    in_channels: int = Field(1, ge=1)
    embed_dims: tuple[int, int, int, int] = (64, 128, 320, 512)
    depths: tuple[int, int, int, int] = (3, 4, 8, 3)
    head_dim: int = Field(64, ge=1)
    mlp_ratio: int = Field(4, ge=1)
    decoder_dim: int = Field(64, ge=1)
    """Channels of the decoder's last level."""
    stem_bias_std: float = Field(0.0, ge=0)
    """Spread of the stems' initial biases. With 0, as in the reference, the LayerNorm behind a stem removes the
    absolute intensity of a smooth patch until the biases are learnt."""
    branch_init_scale: float = Field(1.0, ge=0)
    """Factor on the last layer of every residual branch at the start; near 0 the untrained encoder is its stems."""

    @property
    def feature_dim(self) -> int:
        """Channels of the coarsest features."""
        return self.embed_dims[-1]


class UNet3DConfig(Record):
    """Sizes of UNET3D, BrainMVP's second backbone. The defaults are the reference's (18,799,937 parameters with its
    pre-training decoder)."""

    edge_multiple: ClassVar[int] = 16
    """Edges of images that the network takes are multiples of this."""

    kind: Literal["unet3d"] = "unet3d"
    in_channels: int = Field(1, ge=1)
    widths: tuple[int, int, int, int] = (32, 64, 128, 256)
    """Channels of the four levels, fine to coarse."""
    blocks: tuple[int, int, int, int] = (1, 2, 2, 4)
    """Residual blocks of each level."""
    groups: int = Field(8, ge=1)
    """Of the group norms; every width is a multiple of it."""

    @property
    def feature_dim(self) -> int:
        """Channels of the coarsest features."""
        return self.widths[-1]


class ResNet3DConfig(Record):
    """Sizes of the 3D ResNet of AnatCL. The defaults are its ResNet-18: 33,160,000 parameters, 512 features."""

    edge_multiple: ClassVar[int] = 1
    """Edges of images that the network takes are multiples of this."""

    kind: Literal["resnet3d"] = "resnet3d"
    in_channels: int = Field(1, ge=1)
    block: Literal["basic", "bottleneck"] = "basic"
    """`bottleneck` has four times the channels of `widths` at the end of each level (ResNet-50)."""
    blocks: tuple[int, int, int, int] = (2, 2, 2, 2)
    """Residual blocks of each level; (3, 4, 6, 3): ResNet-34, with `bottleneck` ResNet-50."""
    widths: tuple[int, int, int, int] = (64, 128, 256, 512)
    mirror_x: bool = False
    """Look at images from right to left, as the released weights do: they were trained on the voxels of CAT12's files,
    whose x axis points left, while stores are RAS."""

    @property
    def feature_dim(self) -> int:
        """Channels of the coarsest features."""
        return self.widths[-1] * (4 if self.block == "bottleneck" else 1)


def _network_kind(value: Any) -> str:
    """Return the kind of a network; configs written before there were two have none."""
    found = value.get("kind", "uniformer") if isinstance(value, Mapping) else getattr(value, "kind", "uniformer")
    return str(found)


AnyNetwork = Annotated[
    Annotated[NetworkConfig, Tag("uniformer")]
    | Annotated[UNet3DConfig, Tag("unet3d")]
    | Annotated[ResNet3DConfig, Tag("resnet3d")]
    | Annotated[ViT3DConfig, Tag("vit3d")]
    | Annotated[SwinUNETRConfig, Tag("swin_unetr")]
    | Annotated[DynUNetConfig, Tag("dynunet")],
    Discriminator(_network_kind),
]


class BrainMVPConfig(Record):
    """Pretext tasks of BrainMVP: cross-modal reconstruction, template distillation, modality-aware contrast."""

    kind: Literal["brainmvp"] = "brainmvp"
    mask_block: int = Field(8, ge=1)
    """Edge of a masked block in voxels."""
    mask_rate: float = Field(0.875, gt=0, lt=1)
    """Share of blocks replaced; floor(n (1 - rate)) random blocks are kept."""
    weight_reconstruction: float = Field(1.0, ge=0)
    weight_distillation: float = Field(1.0, ge=0)
    weight_contrast: float = Field(1.0, ge=0)
    template_view2_epochs: int = Field(0, ge=0)
    """Number of first epochs in which view 2 uses the template too (301 in the reference code)."""
    contrast_from_epoch: int = Field(1000, ge=0)
    temperature: float = Field(1.0, gt=0)
    gather_negatives: bool = True
    """Negatives from all ranks, not from the local batch only."""
    projector_dim: int = Field(0, ge=0)
    """Width of the projection head of the contrast; 0: flattened stage-4 features, as the paper."""
    template_init: Literal["zero", "mean"] = "zero"
    """`mean`: start the bank at the mean image of the training cases."""
    template_lr_scale: float = Field(1.0, gt=0)
    """Learning rate of the template bank, relative to the optimiser's."""
    modality_heads: bool = False
    """One output convolution per modality instead of one for all: the decoder makes maps of the anatomy, the head of
    the target modality turns them into its contrast."""
    template_gain: bool = False
    """Let the decoder predict a gain and an offset, voxel by voxel, of the modality's template window instead of the
    whole image."""
    decoder_skips: bool = False
    """Let stages 1 to 3 enter the pre-training decoder too, each through convolutions."""


class Region(Record):
    """A segmentation target: a named union of label values."""

    name: str
    labels: tuple[int, ...] = Field(min_length=1)


class SupervisedConfig(Record):
    """What segmentation and classification share: input channels, and what learned templates are used for."""

    modalities: tuple[str, ...] = Field(min_length=1)
    """Input channels in order."""
    template_mix: int = Field(0, ge=0)
    """Largest number of channels that the learned templates of `init_from` replace in training (3 in the reference).
    Each case is then seen as two independently mixed copies. 0: no mix."""
    weight_consistency: float = Field(0.1, ge=0)
    """Weight of the mean squared distance between the copies' stage-4 features; without the mix there are no copies."""
    missing: Literal["zero", "template"] = "zero"
    """What stands in for a channel that a case lacks: zeros, or the learned template of its modality."""

    @property
    def uses_templates(self) -> bool:
        """Whether the template bank of a pre-training is needed."""
        return self.template_mix > 0 or self.missing == "template"


class SegmentationConfig(SupervisedConfig):
    """Fine-tuning for segmentation: soft Dice and cross-entropy per region, deep supervision."""

    kind: Literal["segmentation"] = "segmentation"
    regions: tuple[Region, ...] = Field(min_length=1)
    weight_dice: float = 0.7
    weight_bce: float = 0.3
    overlap: float = Field(0.5, ge=0, lt=1)
    """Of the sliding windows at inference."""
    foreground_share: float = Field(0.5, ge=0, le=1)
    """Share of training crops centred on a labelled voxel; the rest are uniform."""


class ClassificationConfig(SupervisedConfig):
    """Fine-tuning for classification: global average pooling of stage 4 and a linear layer."""

    kind: Literal["classification"] = "classification"
    classes: tuple[str, ...] = Field(min_length=2)


ObjectiveConfig = Annotated[
    BrainMVPConfig
    | MaskedCropsConfig
    | CropContrastConfig
    | AnatCLConfig
    | AgeRegressionConfig
    | CINPConfig
    | SegmentationConfig
    | ClassificationConfig,
    Field(discriminator="kind"),
]


class DataConfig(Record):
    """Which cases are read, and how."""

    store: str
    """URL of the Zarr store."""
    selection: str
    """Path of selection.parquet: the frozen rows and their roles."""
    crop: tuple[int, int, int]
    """Voxels, each a multiple of 16 (of the patch for a vision transformer). For a 3D ResNet any size around the
    middle; (0, 0, 0): the whole grid."""
    batch_size: int = Field(ge=1)
    """Cases per rank and micro-batch."""
    workers: int = Field(0, ge=0)
    """Loader processes per rank; the result does not depend on it."""
    flip: bool = False
    """Random left-right flips (fine-tuning)."""
    intensity_jitter: float = Field(0.0, ge=0)
    """Random shift and scale of intensities, +- this share (fine-tuning)."""


class OptimiserConfig(Record):
    """Optimiser and learning-rate schedule."""

    kind: Literal["adamw", "adam", "muon"] = "adamw"
    """muon: Muon for weight matrices, AdamW for the rest."""
    lr: float = Field(3e-4, gt=0)
    muon_lr: float = Field(0.02, gt=0)
    """Of the matrices, with kind muon only."""
    weight_decay: float = Field(1e-5, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    warmup_share: float = Field(0.0, ge=0, lt=1)
    """Share of all steps with a linearly rising rate; it never rises again after that."""
    schedule: Literal["cosine", "step"] = "cosine"
    """What follows the rise: a cosine to 0, or the factor `step_factor` every `step_epochs` epochs."""
    step_epochs: int = Field(10, ge=1)
    step_factor: float = Field(0.9, gt=0, le=1)


class RunningConfig(Record):
    """How a training runs and what it reports. Nothing here changes a weight, so all of it may change on a resume."""

    tensorboard: bool = False
    """Write TensorBoard event files beside metrics.jsonl, which stays the source."""
    stage_dir: str = ""
    """Local folder to which the shards of the selected cases are copied before the first step, shared by the ranks of
    a node and by trainings; empty: read the store where it is."""
    stage_gib: float = Field(100.0, gt=0)
    """GiB (2^30 bytes) that the staging folder may hold. Copies that no running training uses make room, the least
    recently used ones first; a selection that does not fit beside the others is refused."""
    rank_limit: float = Field(1.5, ge=1)
    """Warn of collapse when the effective rank of the pooled stage-4 features of the validation cases falls below it;
    1 (all cases alike) never warns."""
    probe_every: int = Field(0, ge=0)
    """Epochs between k-NN and linear probes of the selection's targets during pre-training; 0: none."""


class MadeFrom(Record):
    """Which tables chose the cases of a training and their targets. The selection is frozen, so none decides a weight;
    `tasks.versions` keeps the tables by these digests."""

    split: str = ""
    """Name of the split."""
    split_digest: str = ""
    phenotypes_digest: str = ""
    """Empty: there were none."""
    crosswalks_digest: str = Field("", exclude_if=lambda value: not value)
    """Of who is who in the workspace's crosswalks (tasks.crosswalk); empty: there were none."""


class TrainingConfig(Record):
    """Everything that decides the weights of one training."""

    name: str
    recipe: str
    preset: str = "recommended"
    network: AnyNetwork
    objective: ObjectiveConfig
    data: DataConfig
    optimiser: OptimiserConfig = OptimiserConfig()
    epochs: int = Field(ge=1)
    accumulation: int = Field(1, ge=1)
    seed: int = Field(0, ge=0)
    world_size: int = Field(1, ge=1)
    threads: int = Field(1, ge=1)
    """CPU threads per rank: part of the numerics, so part of the config."""
    channels_last: bool = True
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 use autocast on CUDA, bf16 also on a CPU with AMX for it; other CPUs compute in fp32."""
    init_from: str = ""
    """Folder of a finished training whose encoder (and decoder, where shapes agree) starts this one."""
    checkpoint_every: int = Field(50, ge=1)
    """Optimiser steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    validate_every: int = Field(0, ge=0)
    """Optimiser steps between validations; 0: only at the end."""
    predict: bool = False
    """Write predictions for the test cases after the last step (supervised objectives)."""
    select_every: int = Field(0, ge=0)
    """Epochs between looks at whole validation cases (supervised objectives); the weights with the best mean Dice or
    AUROC are kept. 0, or no validation case: the weights of the last step."""
    running: RunningConfig = RunningConfig()
    made_from: MadeFrom = MadeFrom()

    @model_validator(mode="after")
    def _check_crop(self) -> Self:
        crop, step = self.data.crop, self.network.edge_multiple
        decoding = BrainMVPConfig | MaskedCropsConfig | SegmentationConfig
        if isinstance(self.network, ResNet3DConfig | ViT3DConfig) and isinstance(self.objective, decoding):
            raise ValueError(
                f"training {self.name}: network {self.network.kind!r} has no decoder, which objective "
                f"{self.objective.kind!r} needs; use 'uniformer' or 'unet3d'"
            )
        whole = step == 1 and not any(crop)
        if (min(crop) <= 0 and not whole) or any(edge % step for edge in crop):
            rule = "positive, or all 0 for the whole grid," if step == 1 else f"positive multiples of {step},"
            raise ValueError(f"crop edges must be {rule} got {crop}")
        return self

    @model_validator(mode="after")
    def _check_scratch(self) -> Self:
        if not isinstance(self.network, ScratchNetwork):
            return self
        kind = self.network.kind
        if not isinstance(self.objective, SegmentationConfig):
            raise ValueError(
                f"training {self.name}: network {kind!r} is for segmentation from scratch only, not for objective "
                f"{self.objective.kind!r}; use 'uniformer' or 'unet3d'"
            )
        if self.init_from:
            raise ValueError(
                f"training {self.name}: network {kind!r} is trained from scratch only, there is no pre-training to "
                f"start it from, got init_from {self.init_from!r}; leave it empty, or use the network of that training"
            )
        least = self.data.crop == (self.network.edge_multiple,) * 3
        if isinstance(self.network, SwinUNETRConfig) and self.network.norm == "instance" and least:
            raise ValueError(
                f"training {self.name}: a crop of {self.data.crop} leaves one voxel at 1/32, which network.norm "
                "'instance' makes 0; use a larger crop or the norm 'group'"
            )
        return self

    @model_validator(mode="after")
    def _check_cinp(self) -> Self:
        if not isinstance(self.objective, CINPConfig):
            return self
        if not isinstance(self.network, ViT3DConfig):
            raise ValueError(
                f"training {self.name}: objective 'cinp' hides patches of a vision transformer, network "
                f"{self.network.kind!r} has none; use 'vit3d'"
            )
        if self.data.crop != self.network.image_size:
            raise ValueError(
                f"training {self.name}: crop {self.data.crop} must equal the network's image_size "
                f"{self.network.image_size}: on such images the encoder is used afterwards; set both alike"
            )
        return self

    @model_validator(mode="after")
    def _check_supervised(self) -> Self:
        supervised = isinstance(self.objective, SupervisedConfig)
        if self.select_every and not supervised:
            raise ValueError(
                f"training {self.name}: select_every chooses weights by labelled validation cases, which objective "
                f"{self.objective.kind!r} does not use; set it to 0"
            )
        if isinstance(self.objective, SupervisedConfig) and self.objective.uses_templates and not self.init_from:
            raise ValueError(
                f"training {self.name}: template_mix and missing 'template' need the template bank of a BrainMVP "
                "pre-training; name its folder in init_from, or set template_mix to 0 and missing to 'zero'"
            )
        return self

    def content_digest(self) -> str:
        """Return the SHA-256 (hex) of what decides the weights; see `deciding`."""
        return digest_of(deciding(self.model_dump(mode="json")))


def deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a dumped TrainingConfig that decides its weights.

    Left out are `running` and the number of loader processes: a training may be continued with others; and
    `made_from`, for the selection that was made is frozen.
    """
    values = {key: value for key, value in config.items() if key not in ("running", "made_from")}
    if "data" in values:
        values["data"] = {**values["data"], "workers": 0}
    for part, defaults in LATER.items():
        if part in values:
            values[part] = without_unset(values[part], defaults)
    return values


LATER: dict[str, dict[str, Any]] = {"optimiser": {"schedule": "cosine", "step_epochs": 10, "step_factor": 0.9}}
"""Settings that came after trainings were made, with the values that these had: left out of the digest with them."""
