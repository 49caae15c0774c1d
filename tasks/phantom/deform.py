"""Smooth invertible maps from a subject's head to the template, evaluated on any grid.

A warp pulls back: it takes a subject point (RAS+ mm) to the template point whose tissue lies there, by (1) the inverse
of a small affine, (2) a displacement of low-frequency waves whose gradient is bounded below 1, and (3) a flow into the
ventricles in short steps. Each part is invertible, so is the whole; `jacobian` checks the sampled result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.interpolate import make_interp_spline
from scipy.spatial.transform import Rotation

from tasks.phantom.anatomy import BRAIN_CENTRE_MM, Atlas, sample
from tasks.phantom.effects import Traits

Array = np.ndarray[Any, np.dtype[Any]]

WAVES = 10
WAVELENGTH_MM = (70.0, 170.0)
DISPLACEMENT_MM = 3.0
"""Root mean square of the wave displacement."""
GRADIENT_MAX = 0.45
"""Largest allowed norm of the displacement's gradient; below 1 the map is one to one."""
NODE_MM = 6.0
"""Spacing of the nodes where a warp is evaluated; cubic splines fill the voxels between."""
FLOW_STEP = 0.5
FLOW_TABLE = ((-1.343, -0.667, -0.338, 0.0, 0.318, 0.625, 0.912, 1.172, 1.616, 1.961, 2.226),
              (-10.0, -5.0, -2.5, 0.0, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0, 25.0))  # fmt: skip
"""Log change of the template's ventricular volume after a flow time: the calibration of ventricle_log."""


@dataclass(frozen=True)
class Warp:
    """Subject -> template, in mm."""

    to_subject: Array
    """(4, 4): the affine part, template -> subject."""
    waves: Array
    """(n, 3) wave vectors in rad/mm."""
    phases: Array
    """(n, 3)"""
    amplitudes: Array
    """(n, 3) in mm."""
    flow: float
    """Flow time into the ventricles; negative shrinks them."""

    def to_template(self, points: Array, atlas: Atlas) -> Array:
        """Return the template points (3, n) mm of subject points (3, n) mm."""
        inverse = np.linalg.inv(self.to_subject)
        moved = inverse[:3, :3] @ points + inverse[:3, 3:]
        if len(self.waves):
            angle = (self.waves @ moved)[:, None, :] + self.phases[:, :, None]
            moved = moved + np.einsum("kc,kcn->cn", self.amplitudes, np.sin(angle))
        return _flow(moved, self.flow, atlas)


IDENTITY = Warp(np.eye(4), np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 3)), 0.0)


def draw_warp(traits: Traits, rng: np.random.Generator) -> Warp:
    """Draw a subject's warp: scale about +-4 %, rotation about +-4 degrees, translation about +-4 mm, waves of 3 mm."""
    scale = traits.head_scale * (1 + np.clip(rng.normal(0, 0.012, 3), -0.03, 0.03))
    rotation = Rotation.from_euler("xyz", np.clip(rng.normal(0, 2.0, 3), -4, 4), degrees=True).as_matrix()
    linear = rotation @ np.diag(scale)
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = BRAIN_CENTRE_MM - linear @ BRAIN_CENTRE_MM + np.clip(rng.normal(0, 2.0, 3), -4, 4)
    waves = draw_waves(rng, DISPLACEMENT_MM)
    return Warp(affine, *waves, float(np.interp(traits.ventricle_log, *FLOW_TABLE)))


def draw_waves(rng: np.random.Generator, displacement_mm: float) -> tuple[Array, Array, Array]:
    """Return wave vectors, phases and amplitudes of a displacement of this root mean square, or less if it folded."""
    directions = rng.normal(size=(WAVES, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    waves = directions * (2 * math.pi / rng.uniform(*WAVELENGTH_MM, size=(WAVES, 1)))
    phases = rng.uniform(0, 2 * math.pi, (WAVES, 3))
    amplitudes = rng.normal(size=(WAVES, 3))
    amplitudes *= displacement_mm / math.sqrt((amplitudes**2).sum() / 6)
    amplitudes *= min(1.0, GRADIENT_MAX / _steepest(waves, phases, amplitudes))
    return waves, phases, amplitudes


def _steepest(waves: Array, phases: Array, amplitudes: Array) -> float:
    """Return the largest Frobenius norm of the displacement's gradient on a 12 mm lattice over the head."""
    axes = [np.arange(c - 96, c + 97, 12.0) for c in BRAIN_CENTRE_MM]
    points = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(3, -1)
    slope = amplitudes[:, :, None] * np.cos((waves @ points)[:, None, :] + phases[:, :, None])
    gradient = np.einsum("kcn,kd->ncd", slope, waves)
    return float(np.sqrt((gradient**2).sum((1, 2))).max())


def _flow(points: Array, time: float, atlas: Atlas) -> Array:
    """Move points along the inflation field by Euler steps short enough to keep each step invertible."""
    steps = math.ceil(abs(time) / FLOW_STEP)
    if not steps:
        return points
    # The field is zero far from the ventricles: moving the points near them is enough.
    near = np.flatnonzero(
        (np.abs(points[0]) < 72) & (points[1] > -105) & (points[1] < 75) & (points[2] > -40) & (points[2] < 68)
    )
    moving = points[:, near]
    for _ in range(steps):
        velocity = np.stack([sample(part, atlas.coarse_affine, moving) for part in atlas.inflation])
        moving = moving + (time / steps) * velocity
    moved = points.copy()
    moved[:, near] = moving
    return moved


def warp_grid(warp: Warp, affine: Array, shape: tuple[int, int, int], atlas: Atlas) -> Array:
    """Return the template points (3, X, Y, Z) mm, float32, of the voxel centres of a grid.

    The displacement is evaluated at nodes about NODE_MM apart and filled in by tensor-product cubic splines.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    x, y, z = (max(1, int(NODE_MM // edge)) for edge in spacing)
    steps = (x, y, z)
    nodes = [np.arange(0, n - 1 + step, step) for n, step in zip(shape, steps, strict=True)]
    where = np.stack(np.meshgrid(*nodes, indexing="ij")).reshape(3, -1)
    world = affine[:3, :3] @ where + affine[:3, 3:]
    displacement = (warp.to_template(world, atlas) - world).reshape(3, *(len(n) for n in nodes))
    return fill(displacement, shape, steps) + voxel_centres(affine, shape)


def voxel_centres(affine: Array, shape: tuple[int, int, int]) -> Array:
    """Return the RAS+ mm of all voxel centres, (3, X, Y, Z) float32."""
    axes = [np.arange(n) for n in shape]
    points = [affine[:3, i].reshape(3, *(-1 if j == i else 1 for j in range(3))) * axes[i].reshape(
        *(-1 if j == i else 1 for j in range(3))) for i in range(3)]  # fmt: skip
    return (points[0] + points[1] + points[2] + affine[:3, 3].reshape(3, 1, 1, 1)).astype(np.float32)


def fill(nodes: Array, shape: tuple[int, int, int], steps: tuple[int, int, int]) -> Array:
    """Return values (..., X, Y, Z), float32, of the cubic spline through nodes that lie `steps` voxels apart."""
    values = nodes.astype(np.float32)
    for axis, (n, step) in enumerate(zip(shape, steps, strict=True)):
        matrix = _spline_matrix(n, step, values.shape[axis - 3])
        values = np.moveaxis(np.tensordot(values, matrix, axes=(axis - 3, 1)), -1, axis - 3)
    return np.ascontiguousarray(values)


@lru_cache(maxsize=256)
def _spline_matrix(n: int, step: int, count: int) -> Array:
    nodes = np.arange(count) * step
    spline = make_interp_spline(nodes, np.eye(count), k=min(3, count - 1))
    return np.asarray(spline(np.arange(n)), np.float32)


def jacobian(points: Array, affine: Array) -> Array:
    """Return the determinant of d(template)/d(subject) on a grid, from (3, X, Y, Z) template points; > 0 everywhere
    when no tissue folds. Central differences; units 1."""
    a, b, c = (np.stack([np.gradient(part, axis=axis) for part in points]) for axis in range(3))
    return (a * np.cross(b, c, axis=0)).sum(0) / np.linalg.det(affine[:3, :3])


def check_invertible(points: Array, affine: Array, subject: str) -> float:
    """Return the smallest Jacobian; raises ValueError naming the subject when it is not positive."""
    smallest = float(jacobian(points, affine).min())
    if smallest <= 0:
        raise ValueError(
            f"{subject}: the deformation folds, smallest Jacobian {smallest:.3g} must be > 0; "
            "this is a bug of the generator, please report the cohort's config"
        )
    return smallest
