"""One subject from a seed: anatomy, lesion, scans. A pure function of config and place; nothing is written here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from models.records import MODALITIES
from tasks.phantom.acquire import (
    BIDS_FIELD_MM,
    DATALIST_FIELD_MM,
    THICK_SLICES,
    Grid,
    Scanner,
    Volume,
    acquire,
    make_grid,
    scanner_of,
)
from tasks.phantom.anatomy import Atlas, load_atlas, medial_temporal_weight
from tasks.phantom.config import PhantomConfig
from tasks.phantom.contrasts import TEXTURE_SHARE, Tissue, signal, texture, tissue_at
from tasks.phantom.deform import IDENTITY, NODE_MM, Warp, check_invertible, draw_warp, voxel_centres, warp_grid
from tasks.phantom.effects import Traits, draw_traits
from tasks.phantom.layout import TOKENS, Place
from tasks.phantom.lesions import Painted, Shape, blend, draw_shapes, lesion_site, paint, to_scheme

Array = np.ndarray[Any, np.dtype[Any]]

BRAIN_THRESHOLD = 0.499
"""Of the interpolated brain mask. Just below a half: rounding must not decide for points half-way between voxels."""
MODALITIES_LEFT = 2
"""Scans that a subject keeps at least."""


@dataclass(frozen=True)
class Sampled:
    """A subject's anatomy on one grid, inside the brain (n voxels)."""

    grid: Grid
    inside: Array
    """(n,) flat voxel indices in C order."""
    world: Array
    """(3, n) subject points, mm."""
    template: Array
    """(3, n) template points, mm."""
    tissue: Tissue
    vessels: Array
    jacobian_min: float


@dataclass(frozen=True)
class _Ready:
    """Anatomy on a grid with the lesion and the subject's texture: what every modality there shares."""

    view: Sampled
    painted: Painted
    relief: Array


@dataclass(frozen=True)
class Subject:
    """All files of one subject and the truth about them."""

    place: Place
    traits: Traits
    warp: Warp
    scans: dict[str, Volume]
    """By canonical modality."""
    mask: Volume | None
    tissue: Volume | None
    """Labels of CSF (1), grey (2) and white matter (3), of the BIDS tree."""
    shapes: tuple[Shape, ...]
    """Regions of the lesion in subject space."""
    latents: dict[str, float]


def make_subject(config: PhantomConfig, place: Place, traits: Traits, complete: bool = False) -> Subject:
    """Make a subject. `complete`: no modality is missing and all share one grid.

    Raises ValueError when the deformation folds (a bug).
    """
    atlas = load_atlas()
    rng = _rng(config, place, 2)
    warp = IDENTITY if config.undeformed else draw_warp(traits, rng)
    bids = place.group == "bids"
    scanner = scanner_of(config, traits.site, anisotropic=bids)
    dx, dy, dz = (config.spacing_mm * factor for factor in scanner.spacing)
    orientation = config.orientations["ABC".index(traits.site)] if bids else "LPS"
    field = BIDS_FIELD_MM if bids else DATALIST_FIELD_MM
    grid = make_grid(field, (dx, dy, dz), orientation, _rng(config, place, 3))
    main = sample_anatomy(warp, traits, grid, atlas, place.subject)
    shapes = _place_lesion(traits, main, atlas, _rng(config, place, 4))
    modalities, thick = _plan_scans(config, place, _rng(config, place, 5))
    if complete or config.undeformed:
        modalities, thick = tuple(_offered(config, place)), False
    ready = _prepare(config, place, main, shapes)
    views = dict.fromkeys(modalities, ready)
    if thick:
        other = make_grid(field, (dx, dy, dz * THICK_SLICES), orientation, _rng(config, place, 3))
        views["flair"] = _prepare(config, place, sample_anatomy(warp, traits, other, atlas, place.subject), shapes)
    labels = ready.painted.labels
    return Subject(
        place=place,
        traits=traits,
        warp=warp,
        scans={name: _scan(config, place, name, view, scanner) for name, view in views.items()},
        mask=_mask(labels, main, place, traits) if shapes else None,
        tissue=tissue_labels(main, labels) if bids else None,
        shapes=shapes,
        latents=measure(main, labels, traits, atlas),
    )


def draw_subject_traits(config: PhantomConfig, place: Place, **changes: Any) -> Traits:
    """Return the traits of the subject at a place; IXI-like ones are healthy. Changes are validated."""
    if place.group == "ixi":
        changes = {"lesion": "none", **changes}
    return draw_traits(config, place.dataset, place.number).replace(**changes)


def sample_anatomy(warp: Warp, traits: Traits, grid: Grid, atlas: Atlas, subject: str) -> Sampled:
    """Return a subject's anatomy on a grid; raises ValueError when the deformation folds."""
    points = warp_grid(warp, grid.affine, grid.shape, atlas)
    step = max(1, int(NODE_MM // np.linalg.norm(grid.affine[:3, 0])))
    smallest = check_invertible(points[:, ::step, ::step, ::step], grid.affine * [step, step, step, 1], subject)
    flat = points.reshape(3, -1)
    low, high = (edge[:, None] for edge in atlas.brain_box)
    near = np.flatnonzero(((flat > low) & (flat < high)).all(0))
    inside = near[atlas.sample("brain", flat[:, near]) > BRAIN_THRESHOLD]
    template = flat[:, inside]
    return Sampled(
        grid=grid,
        inside=inside,
        world=voxel_centres(grid.affine, grid.shape).reshape(3, -1)[:, inside],
        template=template,
        tissue=tissue_at(template, traits, atlas),
        vessels=atlas.sample("vessels", template),
        jacobian_min=smallest,
    )


def measure(view: Sampled, labels: Array, traits: Traits, atlas: Atlas) -> dict[str, float]:
    """Return the realised volumes in ml (without the lesion's effect on tissue) and the hidden traits."""
    ml = view.grid.voxel_ml
    counts = np.bincount(labels, minlength=4)
    return {
        "head_scale": traits.head_scale,
        "grey_loss": traits.grey_loss,
        "ventricle_log": traits.ventricle_log,
        "medial_temporal_loss": traits.medial_temporal_loss,
        "brain_ml": len(view.inside) * ml,
        "grey_ml": float(view.tissue.grey.sum(dtype=float)) * ml,
        "white_ml": float(view.tissue.white.sum(dtype=float)) * ml,
        "csf_ml": float(view.tissue.csf.sum(dtype=float)) * ml,
        "ventricles_ml": float(atlas.sample("ventricles", view.template).sum(dtype=float)) * ml,
        "medial_temporal_ml": float(view.tissue.grey[medial_temporal_weight(view.template) > 0.5].sum(dtype=float))
        * ml,
        "lesion_ml": int((labels > 0).sum()) * ml,
        **{f"label_{value}_ml": int(counts[value]) * ml for value in (1, 2, 3)},
        "jacobian_min": view.jacobian_min,
    }


def tissue_labels(view: Sampled, lesion: Array) -> Volume:
    """Return 1 CSF, 2 grey and 3 white matter (scheme mrbrains13) by the largest share of each voxel; 0 elsewhere.

    lesion: (n,) labels of the lesion inside the brain; its voxels belong to no tissue.
    """
    shares = np.stack([view.tissue.csf, view.tissue.grey, view.tissue.white])
    stored = np.zeros(view.grid.shape, np.uint8)
    stored.ravel()[view.inside] = np.where(lesion > 0, 0, shares.argmax(axis=0) + 1)
    return Volume(stored, view.grid.affine)


def _rng(config: PhantomConfig, place: Place, *stream: int) -> np.random.Generator:
    """Independent streams per subject and purpose: one more draw in one place moves nothing elsewhere."""
    return np.random.default_rng([config.seed, place.dataset, place.number, *stream])


def _offered(config: PhantomConfig, place: Place) -> list[str]:
    return list(config.modalities if place.group == "bids" else TOKENS[place.group])


def _plan_scans(config: PhantomConfig, place: Place, rng: np.random.Generator) -> tuple[tuple[str, ...], bool]:
    """Return the modalities that were taken, and whether flair has thick slices on its own grid."""
    offered = _offered(config, place)
    chances, thick = rng.random(len(offered)), rng.random() < config.other_grid_share
    if place.group != "bids":
        return tuple(offered), False
    keep = set(np.argsort(chances)[-MODALITIES_LEFT:]) | set(np.flatnonzero(chances >= config.missing_share))
    taken = tuple(name for index, name in enumerate(offered) if index in keep)
    # The mask lies on the grid of t1; without it flair could be the reference of the case.
    return taken, bool(thick) and {"t1", "flair"} <= set(taken)


def _place_lesion(traits: Traits, view: Sampled, atlas: Atlas, rng: np.random.Generator) -> tuple[Shape, ...]:
    if traits.lesion == "none":
        return ()
    site = lesion_site(traits.lesion, atlas, rng).astype(np.float32)
    nearest = int(((view.template - site[:, None]) ** 2).sum(0).argmin())
    return draw_shapes(traits.lesion, view.world[:, nearest].astype(float), rng)


def _prepare(config: PhantomConfig, place: Place, view: Sampled, shapes: tuple[Shape, ...]) -> _Ready:
    flat = np.zeros(len(view.inside), np.float32)
    relief = flat if config.undeformed else texture(view.world, _rng(config, place, 6))
    return _Ready(view, paint(shapes, view.world, view.tissue.csf), relief)


def _scan(config: PhantomConfig, place: Place, modality: str, ready: _Ready, scanner: Scanner) -> Volume:
    view = ready.view
    value = signal(modality, view.tissue, view.vessels) * (1 + TEXTURE_SHARE * ready.relief)
    value = blend(value, modality, ready.painted, ready.relief)
    return acquire(value, view.inside, view.grid, scanner, _rng(config, place, 7, MODALITIES.index(modality)))


def _mask(labels: Array, view: Sampled, place: Place, traits: Traits) -> Volume:
    stored = np.zeros(view.grid.shape, np.uint8)
    scheme = "brats2021" if traits.lesion == "tumour" and place.group != "bids" else "brats2023"
    stored.ravel()[view.inside] = to_scheme(labels, scheme)
    return Volume(stored, view.grid.affine)
