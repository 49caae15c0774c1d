"""What the pre-training flow is asked for: the form in the UI, names, and where the store is."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from flows.forms import Form, Place, store_field, store_in, workspace_field

CropRecipe = Literal[
    "brainmvp_tiny",
    "brainmvp",
    "brainmvp_unet_tiny",
    "brainmvp_unet",
    "mae_tiny",
    "mae",
    "mae_unet_tiny",
    "mae_unet",
    "simclr_crops_tiny",
    "simclr_crops",
    "simclr_crops_unet_tiny",
    "simclr_crops_unet",
]
"""Pre-trainings of crops, whose networks segment and classify."""
RecipeName = Literal[
    CropRecipe,
    "anatcl_tiny",
    "anatcl",
    "simclr_tiny",
    "simclr",
    "yaware_tiny",
    "yaware",
    "expw_tiny",
    "expw",
    "age_regression_tiny",
    "age_regression",
    "cinp_tiny",
    "cinp",
    "image_mae_tiny",
    "image_mae",
]
BRAINMVP: tuple[str, ...] = ("brainmvp_tiny", "brainmvp", "brainmvp_unet_tiny", "brainmvp_unet")
CROP_BASELINES: tuple[str, ...] = (
    *("mae_tiny", "mae", "mae_unet_tiny", "mae_unet"),
    *("simclr_crops_tiny", "simclr_crops", "simclr_crops_unet_tiny", "simclr_crops_unet"),
)
CINP: tuple[str, ...] = ("cinp_tiny", "cinp", "image_mae_tiny", "image_mae")
AGELESS = (*BRAINMVP, *CROP_BASELINES, *CINP)
"""Recipes that need no ages."""


class PretrainParams(Form):
    """Which store to pre-train on, with which recipe."""

    model_config = ConfigDict(title="Pre-train")

    workspace: str = workspace_field(
        "Folder with the splits and the trainings; the training is written into `<workspace>/trainings`."
    )
    store: Place = store_field()
    recipe: RecipeName = Field(
        "brainmvp_tiny",
        title="Recipe",
        description="""What is trained. With _tiny it is a small network on two CPU ranks, for a trial.

- brainmvp: UniFormer-S on 8 GPUs; brainmvp_unet: UNET3D.

- mae, simclr_crops: its baselines, masked autoencoder and SimCLR, at the same budget; with _unet: UNET3D.

- anatcl: 3D ResNet-18 on grey-matter maps with ages and regional descriptors.

- simclr, yaware, expw, age_regression: the baselines of anatcl.

- cinp: 3D vision transformer on T1 images and connectomes; image_mae: its baseline on images alone.""",
    )
    preset: Literal["recommended", "paper", "code"] = Field(
        "recommended",
        title="Preset",
        description="Values of the objective: ours with reasons (recommended), the paper's, or the released code's. Of "
        "cinp and image_mae no code was released; mae and simclr_crops have recommended alone.",
    )
    variant: Literal["global", "local"] | None = Field(
        None,
        title="Variant",
        description="Of anatcl alone. global: each measure is compared over the whole brain; local: the measures "
        "region by region. Empty: global.",
    )
    name: str = Field(
        "",
        title="Name",
        description="Folder of the training, letters, digits, dashes and underscores; empty: the recipe's name, with "
        "the variant local and the fold.",
        pattern=r"^[A-Za-z0-9_-]*$",
    )
    epochs: int | None = Field(None, ge=1, title="Epochs", description="At least 1; empty: as the recipe says.")
    seed: int = Field(0, ge=0, le=2**31 - 1, title="Seed", description="From 0 to 2147483647.")
    init_from: str = Field(
        "",
        title="Start from",
        description="Name of a finished or imported training in `<workspace>/trainings` whose network and weights this "
        "one starts with; empty: the recipe's network, random weights.",
        pattern=r"^[A-Za-z0-9_-]*$",
    )
    datasets: list[str] = Field(
        default_factory=list, title="Datasets", description="Only these datasets of the store; empty: all of them."
    )
    split: str = Field(
        "default",
        title="Split",
        description="Name of the split in `<workspace>/splits`, made when absent; letters, digits, dashes, "
        "underscores. Its test subjects are left out of the pre-training.",
        pattern=r"^[A-Za-z0-9_-]+$",
    )
    fold: int | None = Field(
        None,
        ge=0,
        title="Fold",
        description="Hold out this fold of the subjects, from 0 to folds - 1: it validates, all others but the split's "
        "test subjects train. Empty: the split's training and validation subjects.",
    )
    folds: int = Field(
        5, ge=2, le=100, title="Folds", description="Number of folds by subject, from 2 to 100; used with a fold."
    )
    probe_target: str = Field(
        "",
        title="Probed phenotype",
        description="Column of the phenotypes (diagnosis, sex, age) that k-NN and linear probes of the features "
        "predict on the validation subjects; empty: no probes.",
    )
    probe_every: int = Field(
        10, ge=1, title="Probe every", description="Epochs between two probes, at least 1; one more is made at the end."
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        title="Cases per micro-batch",
        description="Of each rank, at least 1; empty: as the recipe says.",
    )
    accumulation: int | None = Field(
        None,
        ge=1,
        title="Micro-batches",
        description="Of each rank in an optimiser step, at least 1; empty: as the recipe says. A step sees ranks x "
        "cases per micro-batch x micro-batches; the contrast compares the cases of one micro-batch.",
    )
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        None,
        title="Precision",
        description="bf16 and fp16 on GPUs, bf16 on CPUs with AMX; other CPUs use fp32. Empty: as the recipe says.",
    )
    ranks: int | None = Field(
        None,
        ge=1,
        le=64,
        title="Ranks",
        description="Processes of all nodes together, from 1 to 64; empty: as the recipe says. A training that exists "
        "may be continued with another number: a step keeps its cases.",
    )
    launch: Literal["local", "pool", "slurm"] | None = Field(
        None,
        title="Launch",
        description="Where the ranks run. local: on the host of this flow run; pool: a flow run per node in the work "
        "pool of `train-node`; slurm: one job. Empty: as BRAINLOOM_LAUNCH says, else local.",
    )
    nodes: int | None = Field(
        None,
        ge=1,
        le=64,
        title="Nodes",
        description="Of launch pool and slurm, from 1 to 64; they must divide the ranks and see the workspace. Empty: "
        "as BRAINLOOM_NODES says, else 1.",
    )
    restarts: int = Field(
        1,
        ge=0,
        le=100,
        title="Restarts",
        description="How often a killed training is continued from its checkpoint in the same flow run, from 0 to 100.",
    )
    stall_seconds: int = Field(
        600,
        ge=30,
        le=86_400,
        title="Stall time",
        description="Seconds without any sign of life from the ranks after which they are stopped and the flow run "
        "fails, from 30 to 86400.",
    )
    loader_workers: int | None = Field(
        None,
        ge=0,
        le=64,
        title="Loader processes",
        description="Of each rank, from 0 to 64; empty: as the recipe says. The result does not depend on it.",
    )
    stage_dir: str = Field(
        "",
        title="Staging folder",
        description="Local folder of every node to which the selected cases are copied first; for stores on S3. "
        "Empty: the store is read where it is.",
    )
    stage_gib: float = Field(
        100.0,
        gt=0,
        title="Staging limit",
        description="GiB that the staging folder may hold, more than 0. Copies that no running training uses make "
        "room, the least recently used first; cases that do not fit beside the others are refused.",
    )
    tensorboard: bool = Field(
        False, title="TensorBoard", description="Write event files into the training's folder `tensorboard`."
    )
    rank_limit: float = Field(
        1.5,
        ge=1,
        title="Rank limit",
        description="Warn of collapse when the effective rank of the features of the validation cases is below it, at "
        "least 1; 1 never warns.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.variant and not self.recipe.startswith("anatcl"):
            raise ValueError(f"variant is of the recipes anatcl and anatcl_tiny, not of {self.recipe}; leave it empty")
        if self.fold is not None and self.fold >= self.folds:
            raise ValueError(f"fold must be from 0 to {self.folds - 1} with {self.folds} folds, got {self.fold}")
        if self.preset != "recommended" and self.recipe in CROP_BASELINES:
            raise ValueError(f"{self.recipe} is a baseline of ours, so it has no preset {self.preset}; use recommended")
        if self.preset == "code" and self.recipe in CINP:
            raise ValueError(
                f"no code of CINP was released, so {self.recipe} has no preset code; use recommended or paper"
            )
        return self


def training_name(params: PretrainParams) -> str:
    """Return the folder name of the training."""
    variant = "_local" if params.variant == "local" else ""
    fold = "" if params.fold is None else f"_fold{params.fold}"
    return params.name or f"{params.recipe}{variant}{fold}"


def run_name(params: PretrainParams) -> str:
    """Return `pretrain <training> on <store>`."""
    return f"pretrain {training_name(params)} on {store_url(params).rstrip('/').rsplit('/', 1)[-1]}"


def store_url(params: PretrainParams) -> str:
    """Return the store's URL."""
    return store_in(params.workspace, params.store)
