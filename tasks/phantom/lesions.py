"""Lesions with exact masks: a voxel belongs to a region when its centre lies inside a closed formula.

A region is a rotated ellipsoid whose radius is modulated by a few waves: rho(x) < level, with
rho(x) = |D R'(x - c)| (1 + sum_k a_k sin(w_k . R'(x - c) + p_k)). A tumour nests three of them (oedema around enhancing
tissue around necrosis); stroke and schwannoma have one. Oedema and stroke spare CSF; everything stays inside the brain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from models.records import Record
from tasks.phantom.anatomy import Atlas
from tasks.phantom.config import Kind
from tasks.phantom.contrasts import INTENSITY

Array = np.ndarray[Any, np.dtype[Any]]

NECROSIS, OEDEMA, ENHANCING = 1, 2, 3
"""Label values of a tumour in the scheme brats2023. In brats2021 enhancing is 4. Other lesions are 1."""
SCHEMES: dict[str, dict[int, int]] = {"brats2023": {1: 1, 2: 2, 3: 3}, "brats2021": {1: 1, 2: 2, 3: 4}}

LOBES = 6
EDGE_MM = 2.0
"""Width of the soft edge of the intensities; the mask's edge is its middle."""
CPA_MM = np.array([16.0, -36.0, -37.0])
"""Cerebellopontine angle on the right, in template space."""
RADIUS_MM: dict[Kind, tuple[float, float]] = {"tumour": (15.0, 30.0), "stroke": (11.0, 22.0), "schwannoma": (6.0, 11.0)}
"""Mean radius of the outermost region."""


class Shape(Record):
    """One region in subject space (RAS+ mm): enough to compute its mask on any grid."""

    tissue: str
    """Row of the intensity table."""
    label: int
    centre_mm: tuple[float, float, float]
    rotation: tuple[float, float, float]
    """Euler angles xyz in degrees."""
    axes_mm: tuple[float, float, float]
    waves: tuple[tuple[float, float, float], ...]
    phases: tuple[float, ...]
    amplitudes: tuple[float, ...]
    """Sum to less than 1, so the region is bounded."""
    spares_csf: bool

    def inside(self, points: Array) -> Array:
        """Return rho (n,) at subject points (3, n) mm: below 1 inside; 9 far away."""
        offset = points - np.asarray(self.centre_mm, points.dtype)[:, None]
        rho = np.full(points.shape[1], 9.0)
        reach = 1.2 * max(self.axes_mm) / (1 - sum(self.amplitudes))
        near = np.flatnonzero((offset**2).sum(0) < reach**2)
        turned = Rotation.from_euler("xyz", self.rotation, degrees=True).as_matrix().T @ offset[:, near]
        radius = np.sqrt(((turned / np.asarray(self.axes_mm)[:, None]) ** 2).sum(0))
        bumps = np.asarray(self.amplitudes) @ np.sin(np.asarray(self.waves) @ turned + np.asarray(self.phases)[:, None])
        rho[near] = radius * (1 + bumps)
        return rho


@dataclass(frozen=True)
class Painted:
    """A lesion at n points."""

    labels: Array
    """uint8, scheme brats2023."""
    layers: tuple[tuple[str, Array], ...]
    """Tissue and its weight (0..1), outermost first."""


def lesion_site(kind: Kind, atlas: Atlas, rng: np.random.Generator) -> Array:
    """Return where a lesion sits, (3,) mm in template space."""
    if kind == "schwannoma":
        side = rng.choice([-1.0, 1.0])
        return CPA_MM * [side, 1, 1] + rng.uniform(-1.5, 1.5, 3)
    sites = atlas.tumour_sites_mm if kind == "tumour" else atlas.stroke_sites_mm
    return sites[rng.integers(len(sites))]


def draw_shapes(kind: Kind, centre_mm: Array, rng: np.random.Generator) -> tuple[Shape, ...]:
    """Draw the regions of a lesion, outermost first, at a centre in subject space."""
    low, high = RADIUS_MM[kind]
    radius = float(np.exp(rng.uniform(math.log(low), math.log(high))))
    axes = radius * np.exp(rng.normal(0, 0.15, 3))
    rotation = rng.uniform(-90, 90, 3)

    def shape(tissue: str, label: int, size: float, roughness: float, spares_csf: bool) -> Shape:
        directions = rng.normal(size=(LOBES, 3))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        lengths = radius * size * rng.uniform(1.0, 2.5, (LOBES, 1))
        return Shape(
            tissue=tissue,
            label=label,
            centre_mm=_three(centre_mm),
            rotation=_three(rotation),
            axes_mm=_three(axes * size),
            waves=tuple(_three(row) for row in directions * 2 * math.pi / lengths),
            phases=tuple(rng.uniform(0, 2 * math.pi, LOBES).tolist()),
            amplitudes=tuple((roughness * rng.uniform(0.5, 1, LOBES)).tolist()),
            spares_csf=spares_csf,
        )

    if kind == "stroke":
        return (shape("stroke", 1, 1.0, 0.12, True),)
    if kind == "schwannoma":
        return (shape("schwannoma", 1, 1.0, 0.03, False),)
    core = rng.uniform(0.55, 0.72)
    return (
        shape("oedema", OEDEMA, 1.0, 0.13, True),
        shape("enhancing", ENHANCING, core, 0.08, False),
        shape("necrosis", NECROSIS, core * rng.uniform(0.5, 0.7), 0.08, False),
    )


def paint(shapes: tuple[Shape, ...], points: Array, csf: Array) -> Painted:
    """Return labels and intensity weights at subject points (3, n) mm; each region lies inside the one before it.

    csf: CSF fraction (n,); regions that spare CSF leave points with half or more of it alone.
    """
    labels = np.zeros(points.shape[1], np.uint8)
    layers = []
    outer = np.zeros(points.shape[1])
    for shape in shapes:
        rho = np.maximum(shape.inside(points), outer)
        weight = np.clip(0.5 + (1 - rho) * float(np.mean(shape.axes_mm)) / EDGE_MM, 0, 1)
        inside = rho < 1
        if shape.spares_csf:
            weight, inside = weight * (csf < 0.5), inside & (csf < 0.5)
        labels[inside] = shape.label
        layers.append((shape.tissue, weight.astype(np.float32)))
        outer = rho
    return Painted(labels, tuple(layers))


def blend(value: Array, modality: str, painted: Painted, relief: Array) -> Array:
    """Return the signal (n,) with the lesion mixed in; relief (n,), sd 1, makes the lesion uneven by 6 %."""
    for tissue, weight in painted.layers:
        value = value + weight * (INTENSITY[modality][tissue] * (1 + 0.06 * relief) - value)
    return value


def to_scheme(labels: Array, scheme: str) -> Array:
    """Return labels (brats2023 numbers) in another scheme; raises KeyError for an unknown one."""
    table = np.zeros(256, np.uint8)
    for source, target in SCHEMES[scheme].items():
        table[source] = target
    return table[labels]


def _three(values: Array) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in values)
    return x, y, z
