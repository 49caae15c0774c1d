"""Optional steps that need the extra `registration` (antspyx): N4 bias correction, registration to a template.

Both run on the CPU, on one thread, with a fixed seed: the same input gives the same voxels.
Sources: N4, Tustison et al. (2010), doi 10.1109/TMI.2010.2046908; registration, Avants et al. (2011),
doi 10.1016/j.neuroimage.2010.09.025 (Mattes mutual information).
"""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from infra import storage
from models.records import Reason
from models.spec import PreprocessSpec
from tasks import nifti
from tasks.affines import BadScanError
from tasks.nifti import Volume

MNI152 = "mni152"
SEED = 1
TRANSFORMS = {"rigid": "Rigid", "affine": "Affine"}
N4_GRID_MM = 4.0
"""Voxel edge at which the bias field is fitted."""
STRETCH_MAX = 1.6
"""Largest stretch or shrinkage along any direction that a registered head can need."""
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""ITK counts mm to the left and to the back."""


class MissingExtraError(RuntimeError):
    """The spec asks for a step whose package is not installed."""


@dataclass(frozen=True)
class Move:
    """Where registration puts an image."""

    matrix: np.ndarray
    """(4, 4): RAS+ mm of the file -> RAS+ mm of the template."""
    correlation: float
    """Of the voxels with the template's, after registration, -1..1; near 0 for a failure."""


def require_extra(spec: PreprocessSpec) -> None:
    """Raise MissingExtraError when the spec has a step that cannot run here, ValueError for a template that changed."""
    if spec.bias_correction != "none" or spec.registration != "none":
        _ants()
    if spec.registration != "none":
        template(spec.template, spec.template_sha256)


def without_bias(volume: Volume) -> Volume:
    """Return a scan without its bias field, (X, Y, Z) float32, up to a factor for the whole image; air stays 0."""
    ants = _ants()
    data = volume.data.float().numpy()
    tissue = data > data[data > 0].mean() / 4
    image, mask = _image(data, volume.affine), _image(tissue.astype(np.float32), volume.affine)
    # The field is smooth: a coarse grid fits it in seconds.
    factor = max(1, round(N4_GRID_MM / min(image.spacing)))
    corrected = ants.n4_bias_field_correction(image, mask=mask, shrink_factor=factor).numpy()
    return volume.replace(data=torch.from_numpy(np.where(data == 0, 0, corrected).astype(np.float32)))


def register(moving: Volume, spec: PreprocessSpec) -> Move:
    """Register a scan to the spec's template; raises BadScanError when the result is no head's."""
    ants = _ants()
    fixed = template(spec.template, spec.template_sha256)
    with tempfile.TemporaryDirectory(prefix="brainloom-ants-") as folder:
        found = ants.registration(
            fixed=_image(fixed.data.float().numpy(), fixed.affine),
            moving=_image(moving.data.float().numpy(), moving.affine),
            type_of_transform=TRANSFORMS[spec.registration],
            outprefix=f"{folder}/",
        )
        to_file = _matrix_of(ants.read_transform(found["fwdtransforms"][0]))
        warped = found["warpedmovout"].numpy()
    stretches = np.linalg.svd(to_file[:3, :3], compute_uv=False)
    if stretches.max() > STRETCH_MAX or stretches.min() < 1 / STRETCH_MAX:
        raise BadScanError(
            Reason.REGISTRATION,
            f"{moving.name}: registration to {spec.template} stretches by {stretches.min():.2f} to "
            f"{stretches.max():.2f}, {1 / STRETCH_MAX:.2f} to {STRETCH_MAX:g} are plausible",
        )
    inside = fixed.data.numpy() > 0
    return Move(np.linalg.inv(to_file), round(float(np.corrcoef(warped[inside], fixed.data.numpy()[inside])[0, 1]), 4))


@lru_cache(maxsize=2)
def template(name: str, sha256: str) -> Volume:
    """Return the template: `mni152` from nilearn (2 mm, skull-stripped), or a file whose SHA-256 is checked."""
    if name == MNI152:
        from nilearn import datasets

        image = datasets.load_mni152_template(resolution=2)
        return Volume(torch.from_numpy(np.asarray(image.dataobj, dtype=np.float32)), image.affine, MNI152)
    try:
        raw = storage.read_bytes(name)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise FileNotFoundError(
            f"the spec's `template` names {name}, which is no file; correct `template`, or put the file where the flow "
            "and all workers can read it"
        ) from None
    if (found := hashlib.sha256(raw).hexdigest()) != sha256:
        raise ValueError(f"template {name} has the SHA-256 {found}, the spec says {sha256}; correct template_sha256")
    return nifti.parse_nifti(raw, name)


def _ants() -> Any:
    # ITK reads this once. More threads would also sum in another order, and results would differ.
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
    try:
        ants = importlib.import_module("ants")
    except ImportError as error:
        raise MissingExtraError(
            "bias_correction 'n4' and registration need antspyx; install the extra: pip install "
            f"'brainloom[registration]' ({error})"
        ) from error
    if not ants.config._deterministic:  # each call would seed numpy's global generator again
        ants.config.set_ants_deterministic(True, seed_value=SEED)
    return ants


def _image(data: np.ndarray, affine: np.ndarray) -> Any:
    """Return an ANTs image; slight shear of the axes, which ITK refuses, is dropped."""
    lps = RAS_TO_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    left, _, right = np.linalg.svd(lps[:3, :3] / spacing)
    return _ants().from_numpy(
        np.ascontiguousarray(data), origin=lps[:3, 3].tolist(), spacing=spacing.tolist(), direction=left @ right
    )


def _matrix_of(transform: Any) -> np.ndarray:
    """Return an ITK affine transform (template -> file, LPS) as a (4, 4) matrix in RAS+ mm."""
    parameters, centre = np.asarray(transform.parameters), np.asarray(transform.fixed_parameters)
    matrix = np.eye(4)
    matrix[:3, :3] = parameters[:9].reshape(3, 3)
    matrix[:3, 3] = parameters[9:] + centre - matrix[:3, :3] @ centre
    return RAS_TO_LPS @ matrix @ RAS_TO_LPS
