"""Import released weights: a `.pt` file becomes a finished training folder, strictly and reversibly."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from models.config import (
    AnatCLConfig,
    AnyNetwork,
    BrainMVPConfig,
    CINPConfig,
    DataConfig,
    NetworkConfig,
    ObjectiveConfig,
    ResNet3DConfig,
    TrainingConfig,
)
from models.export import DONE, read_done, write_text_whole, write_weights
from models.finished import read_settings, write_settings
from models.foreign import read_checkpoint, sha256_of
from models.released import TITLES, UNUSED, Layout, WeightsError, check_state, detect_network, layout_of, strip_parallel
from models.selection import write_selection
from models.spec import SPECS, PreprocessSpec

SIDE_FILE = "unused.safetensors"
"""Tensors of an imported file that nothing uses: kept, so that the file can be written again."""
SLACK_BYTES = 64 * 2**20
OTHER_DATA = (
    "The file does not say under which licence and on which subjects these weights were trained: ask where it comes "
    "from. Test subjects may have been among them; nothing here can check it."
)
Variant = Literal["", "global", "local"]


@dataclass(frozen=True)
class Family:
    """What is known of the released files of a method beside their tensors."""

    name: str
    objective: ObjectiveConfig
    spec: PreprocessSpec
    crop: tuple[int, int, int]
    batch_size: int
    epochs: int
    """What the paper or the released script says; stands in the config when the file itself does not tell."""
    source: str
    intensities: str
    data: str


BRAINMVP = Family(
    "brainmvp",
    BrainMVPConfig(),
    SPECS["brainmvp"],
    (96, 96, 96),
    3,
    1500,
    "Rui et al., Multi-modal Vision Pre-training for Medical Image Analysis, CVPR 2025, arXiv 2410.10604",
    "intensities in [0, 1]",
    "No licence of these weights is known to brainloom: ask their authors before you pass them on. They were trained "
    "on BraTS2021, BraTS2023 (SSA, MEN), UCSF-PDGM and IXI, whose own terms apply.\n\n"
    "Subjects of those datasets, also under other names (UCSF-PDGM and UPENN-GBM lie partly inside BraTS2021), are no "
    "independent test subjects for these weights. The file does not say which subjects they were, so nothing here can "
    "check it.",
)
ANATCL = Family(
    "anatcl",
    AnatCLConfig(),
    SPECS["vbm_128"],
    (0, 0, 0),
    32,
    300,
    "Barbano et al., Anatomical Foundation Models for Brain MRIs, Pattern Recognition Letters 199 (2026) 178-184, "
    "arXiv 2408.07079",
    "modulated grey-matter maps of CAT12 as they are; raw T1 images give features without meaning",
    "The authors' repository has the MIT licence. The weights were trained on OpenBHB (ABIDE I and II, CoRR, GSP, IXI, "
    "Localizer, MPI-Leipzig, NAR, NPC, RBP), whose own terms apply.\n\n"
    "Subjects of those datasets are no independent test subjects for these weights: controls of ABIDE I are among "
    "them. Of the five folds, the file does not say which subjects were held out, so nothing here can check it.",
)


@dataclass(frozen=True)
class Expected:
    """What the file is expected to hold, and what the training folder will say of it."""

    network: AnyNetwork
    family: Family
    tiny: bool
    found: bool
    """Whether the network is told by the file's names instead (UniFormer-S, UNET3D or 3D ResNet-18)."""


@dataclass(frozen=True)
class Imported:
    """A finished training folder made from a file."""

    folder: Path
    done: dict[str, Any]
    fresh: bool
    """False when the folder held these very weights already."""


def import_weights(
    path: Path, folder: Path, like: Path | None = None, variant: Variant = "", fold: int | None = None
) -> Imported:
    """Make a finished training folder of a released checkpoint.

    Every tensor of the file is used, or kept beside the weights and named with the reason; none may be missing,
    unknown, of another shape or type, or not finite. like: a finished training whose network and grid are expected
    instead of the released ones. variant, fold: what a file of AnatCL does not say of itself; the variant must be
    given. The folder appears whole or not at all. Raises WeightsError naming file and rule.
    """
    expected = _expected(like)
    limit = 4 * _bytes(_layout(expected.network, expected.family)) + SLACK_BYTES
    checkpoint = read_checkpoint(path, limit)
    file = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    if (done := _existing(folder, file)) is not None:
        return Imported(folder, done, fresh=False)
    try:
        state, prefix = strip_parallel(checkpoint.state)
        if expected.found:
            network = detect_network(state)
            family = ANATCL if isinstance(network, ResNet3DConfig) else BRAINMVP
            expected = replace(expected, network=network, family=family)
        layout = _layout(expected.network, expected.family)
        check_state(state, layout)
        told = _told(expected, variant, fold)
    except WeightsError as error:
        raise WeightsError(f"{path} is not imported: {error}") from None
    kept, left = _others(checkpoint.others)
    origin = {
        **file,
        "layout": f"{expected.family.name}-{expected.network.kind}",
        "prefix": prefix,
        "wrapped": bool(checkpoint.key),
        "key": checkpoint.key,
        "kept": kept,
        "left_behind": left,
        "unused": dict.fromkeys(layout.unused, UNUSED),
        **told,
    }
    return Imported(folder, _write(folder, state, layout, expected, origin), fresh=True)


def _expected(like: Path | None) -> Expected:
    if like is None:
        return Expected(NetworkConfig(), BRAINMVP, tiny=False, found=True)
    config, spec = read_settings(like)
    if isinstance(config.objective, CINPConfig):
        raise WeightsError(f"{like} was pre-trained with CINP, of which no weights were released; give another --like")
    family = ANATCL if isinstance(config.objective, AnatCLConfig) else BRAINMVP
    objective = config.objective if family is ANATCL else family.objective
    family = replace(family, objective=objective, spec=spec, crop=config.data.crop, data=OTHER_DATA)
    return Expected(config.network, family, config.recipe.endswith("_tiny"), found=False)


def _layout(network: AnyNetwork, family: Family) -> Layout:
    head = family.objective.head_dim if isinstance(family.objective, AnatCLConfig) else 0
    return layout_of(network, family.spec.grid, head)


def _told(expected: Expected, variant: Variant, fold: int | None) -> dict[str, Any]:
    """Return what was said of the file; raises WeightsError when that is too little, or of no use."""
    if expected.family.name != "anatcl":
        if variant or fold is not None:
            raise WeightsError(f"variant and fold are of AnatCL's files; this one is of {expected.family.name}")
        return {}
    if not variant and expected.found:
        raise WeightsError("it does not say which variant it is of; give --variant global or --variant local")
    return {"variant": variant, "fold": fold}


def _bytes(layout: Layout) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in layout.tensors.values())


def _existing(folder: Path, file: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return done.json of a folder that was made from this very file, None when there is no folder."""
    if not folder.exists():
        return None
    done = read_done(folder) if folder.is_dir() else None
    if done is not None and done.get("origin", {}).get("sha256") == file["sha256"]:
        return done
    raise WeightsError(f"{folder} exists and was not made from {file['file']}; give another folder, or move it away")


def _others(others: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the plain values beside the weights, and the names of what is left behind (the optimiser, ...)."""
    kept = {key: value for key, value in others.items() if _is_plain(value)}
    return kept, [key for key in others if key not in kept]


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def _write(
    folder: Path, state: Mapping[str, Tensor], layout: Layout, expected: Expected, origin: dict[str, Any]
) -> dict[str, Any]:
    """Write the folder under a temporary name beside it and rename it; return done.json."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = _config(folder, layout, expected, origin)
    digest = write_weights(partial, {mine: state[name] for name, mine in layout.ours.items()})
    if layout.unused:
        save_file({name: state[name].detach().contiguous().clone() for name in layout.unused}, partial / SIDE_FILE)
    done = {
        "training": config.name,
        "weights_digest": digest,
        "config_digest": config.content_digest(),
        "selection_digest": write_selection(partial / "selection.parquet", []),
        "init_digest": "",
        "world_sizes": [],
        "step": 0,
        "predictions": 0,
        "metrics": {},
        "origin": origin,
    }
    write_text_whole(partial / "run.json", config.model_dump_json(indent=1) + "\n")
    write_settings(partial, config, expected.family.spec)
    write_text_whole(partial / "model_card.md", _card(config, layout, expected, done))
    write_text_whole(partial / DONE, json.dumps(done, indent=1, allow_nan=False) + "\n")
    partial.rename(folder)
    return done


def _config(folder: Path, layout: Layout, expected: Expected, origin: Mapping[str, Any]) -> TrainingConfig:
    """Return a config with the structure of the released pre-training; its store is unknown."""
    family, epoch = expected.family, origin["kept"].get("current_epoch", origin["kept"].get("epoch"))
    variant = {"variant": origin["variant"]} if origin.get("variant") else {}
    return TrainingConfig(
        name=folder.name,
        recipe="imported_tiny" if expected.tiny else "imported",
        preset="released",
        network=layout.network,
        objective=family.objective.replace(**variant),
        data=DataConfig(
            store="",
            selection=str(folder.absolute() / "selection.parquet"),
            crop=family.crop,
            batch_size=family.batch_size,
        ),
        epochs=max(1, epoch) if isinstance(epoch, int) else family.epochs,
    )


def _card(config: TrainingConfig, layout: Layout, expected: Expected, done: Mapping[str, Any]) -> str:
    origin, family, spec = done["origin"], expected.family, expected.family.spec
    unused = sum(layout.tensors[name].numel() for name in layout.unused)
    others = ", ".join(f"`{name}`" for name in origin["left_behind"]) or "nothing"
    return (
        f"# {config.name}\n\n"
        f"A 3D brain-MRI network: {TITLES[layout.network.kind]}, imported from the file "
        f"`{origin['file']}`, not trained here. **Research only: not for clinical use.**\n\n"
        f"- SHA-256 of the file: `{origin['sha256']}` ({origin['bytes']} bytes)\n"
        f"- weights digest: `{done['weights_digest']}`\n"
        f"- tensors: {len(layout.ours)} used; {len(layout.unused)} kept in `{SIDE_FILE}` ({unused:,} entries: "
        f"{UNUSED})\n"
        f"- left behind in the file: {others}\n"
        f"{_words_of_variant(origin)}"
        f"- source: {family.source}\n"
        f"- inputs: preprocessed as spec `{spec.name}` ({spec.spacing_mm:g} mm, RAS, {family.intensities}), one "
        f"channel; {'templates on ' if family.name == 'brainmvp' else ''}a grid of {' x '.join(map(str, spec.grid))} "
        f"voxels\n\n## Licence and data\n\n{family.data}\n"
    )


def _words_of_variant(origin: Mapping[str, Any]) -> str:
    if not origin.get("variant"):
        return ""
    fold = "fold not told" if origin["fold"] is None else f"fold {origin['fold']}"
    return f"- variant: {origin['variant']}, {fold} (as said at the import; the file does not tell)\n"
