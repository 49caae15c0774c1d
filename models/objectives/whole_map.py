"""Objectives of whole maps: one image of a case on the whole grid, its age, its descriptors, one or two views of it.

The reference's two views are one tensor. Real augmentations are ours; they keep what a modulated map says, which is
volume: no scaling of intensities, no zoom. Left-right flips would contradict descriptors that tell the hemispheres
apart, so they are an option for objectives without them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.config import TrainingConfig
from models.config_anatcl import ViewConfig
from models.networks.build import build_encoder
from models.objectives.base import CaseInfo, Objective, Reader, centred_start, read_size
from models.objectives.contrast import identity_of
from models.objectives.supervised import channel_indices, flip_left_right
from models.records import SelectedCase
from models.spec import PreprocessSpec
from models.store_layout import clip_window


@dataclass(frozen=True)
class WholeMapSampler:
    """Reads one modality on the whole grid, or on a window in its middle; zeros outside the case."""

    modality: str
    channel: int
    """Of the modality in the store."""
    grid: tuple[int, int, int]
    size: tuple[int, int, int]
    """Voxels that are read, around the middle of the grid."""
    spacing_mm: float
    views: ViewConfig
    measures: tuple[str, ...] = ()
    """Of the descriptors; empty: none are read."""
    regions: tuple[str, ...] = ()
    needs_age: bool = False
    """Refuse cases without an age."""

    def draw(self, case: CaseInfo, rng: np.random.Generator, train: bool) -> dict[str, Any]:
        """Return the start of the window and two views; `views` is empty when both would be the image itself.

        Raises ValueError for a case without the modality, and for one without an age where that is needed.
        """
        if not case.present[self.channel]:
            raise ValueError(
                f"case {case.dataset}/{case.case} has no modality {self.modality!r}; leave it out of the selection"
            )
        if self.needs_age and case.age is None:
            raise ValueError(
                f"case {case.dataset}/{case.case} has no age, which age regression is fitted to; add it to the "
                "phenotypes or leave the case out of the selection"
            )
        drawn = (draw_view(self.views, self.size, self.spacing_mm, rng) for _ in range(2))
        views = list(drawn) if self.views.differ else []
        return {"start": centred_start(self.grid, self.size, case.origin), "views": views}

    def load(self, case: CaseInfo, reader: Reader, draw: Mapping[str, Any]) -> dict[str, Any]:
        """Return `image` (1 or 2 views, x, y, z), `age` in years (NaN: unknown), `identity` of the subject and, where
        they are used, `descriptors` (M, R), as they are stored."""
        image = reader.read((self.channel,), draw["start"], self.size)[0]
        views = [apply_view(image, view) for view in draw["views"]] or [image]
        sample: dict[str, Any] = {
            "image": np.stack(views),
            "age": math.nan if case.age is None else float(case.age),
            "identity": identity_of(case.dataset, case.subject, case.person),
        }
        if self.measures:
            sample["descriptors"] = reader.read_descriptors(self.measures, self.regions)
        return sample


def draw_view(views: ViewConfig, size: Sequence[int], spacing_mm: float, rng: np.random.Generator) -> dict[str, Any]:
    """Return what makes one view of an image of `size` voxels; see `apply_view`."""
    most = int(views.shift_mm / spacing_mm)
    edges = [math.ceil(views.cutout_share * edge) for edge in size]
    return {
        "flip": bool(rng.random() < 0.5) and views.flip,
        "shift": rng.integers(-most, most + 1, size=3).tolist(),
        "cutout": [int(rng.integers(0, have - edge + 1)) for have, edge in zip(size, edges, strict=True)],
        "edges": edges if rng.random() < 0.5 else [0, 0, 0],
        "noise_std": float(rng.uniform(0, views.noise_std)),
        "noise_seed": int(rng.integers(2**63)),
    }


def apply_view(image: NDArray[np.float32], view: Mapping[str, Any]) -> NDArray[np.float32]:
    """Return one view (x, y, z): mirrored, shifted by whole voxels, with noise, and with a box of zeros."""
    flipped = flip_left_right(image, view["flip"])
    out = np.zeros_like(image)
    there, here = clip_window(view["shift"], image.shape, image.shape)
    out[tuple(here)] = flipped[tuple(there)]
    if view["noise_std"]:
        noise = np.random.default_rng(view["noise_seed"]).standard_normal(image.shape, dtype=np.float32)
        out += np.float32(view["noise_std"]) * noise
    out[_box(view["cutout"], view["edges"])] = 0
    return out


def _box(start: Sequence[int], edges: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first, first + edge) for first, edge in zip(start, edges, strict=True))


class WholeMap(Objective):
    """An encoder of one modality's maps. Raises ValueError for a store without it, or a network of several channels."""

    def __init__(self, config: TrainingConfig, modality: str, spec: PreprocessSpec) -> None:
        super().__init__()
        if config.network.in_channels != 1:
            raise ValueError(
                f"objective {config.objective.kind!r} encodes one map: in_channels must be 1, got "
                f"{config.network.in_channels}"
            )
        self.modality, self.spec = modality, spec
        self.channel = channel_indices((modality,), spec)[0]
        self.size = read_size(config.data.crop, spec.grid)
        self.encoder = build_encoder(config.network)

    def reading(self, views: ViewConfig, **values: Any) -> WholeMapSampler:
        """Return the sampler of this modality; values: further fields of it."""
        spec = self.spec
        return WholeMapSampler(self.modality, self.channel, spec.grid, self.size, spec.spacing_mm, views, **values)


def check_ages(train: Sequence[SelectedCase], otherwise: str) -> None:
    """Raise ValueError when no case has an age."""
    if all(case.age is None for case in train):
        raise ValueError(
            f"none of the {len(train)} training cases has an age, which the loss needs; catalog a participants table "
            f"with ages (column `age`), or {otherwise}"
        )
