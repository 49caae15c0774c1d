"""How scans become stored voxels: preprocessing specs, and the registered ones by name."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from models.connectomes import ConnectomeSpec
from models.records import (
    BOLD,
    BRAIN_MASK,
    DESCRIPTORS,
    FUNCTIONAL,
    GREY,
    LABEL,
    MODALITIES,
    OTHER_MODALITIES,
    T1,
    Matrix,
    Record,
    digest_of,
    field_title,
)


class PreprocessSpec(Record):
    """How scans become stored voxels. Its digest is part of the store's identity.

    Source: BrainMVP's input pipeline (methods paper, section on pre-training data; reference code).
    """

    model_config = ConfigDict(title="own spec", use_attribute_docstrings=True, field_title_generator=field_title)

    name: str
    """What the store calls it."""
    spacing_mm: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Isotropic voxel size of the stored images, more than 0."""
    grid: tuple[int, int, int] = (240, 240, 155)
    """Largest extent of a case and size of the template bank, in voxels."""
    frame: Literal["image", "template"] = "image"
    """`image`: RAS-nearest axes of the reference scan, cropped symmetrically, centred in the template grid
    (BrainMVP). `template`: every scan is resampled onto the grid `grid_affine`, then cropped to its foreground."""
    grid_affine: Matrix | None = None
    """Voxel -> RAS+ mm of the template grid; required when frame is `template`."""
    modalities: tuple[str, ...] = MODALITIES
    """Channel order of the store."""
    reference_order: tuple[str, ...] = ("t1", "t1c", "flair", "t2", "pd", "mra", "dwi", "adc")
    """The first modality present in this order gives the grid of a case in frame `image`."""
    percentiles: tuple[float, float] = (5.0, 95.0)
    """Intensities mapped to 0 and 1; values outside are clipped."""
    percentile_region: Literal["volume", "foreground"] = "volume"
    """`volume`: zeros included, as BrainMVP does. `foreground`: voxels above zero only."""
    intensity: Literal["percentiles", "keep"] = "percentiles"
    """`percentiles`: scaled to [0, 1] between them. `keep`: as in the file, for maps whose values mean something
    (modulated grey matter); negative ones become 0."""
    nan_share_max: float = Field(0.01, ge=0, le=1)
    """Largest share of non-finite voxels, from 0 to 1, that is replaced by 0 and flagged; above it the case is
    quarantined."""
    chunk: int = Field(48, ge=48)
    """Edge of a store chunk in voxels, at least 48."""
    codec: Literal["lz4", "none"] = "lz4"
    """How chunks are packed. `none` reads two to three times faster and takes some two and a half times the space."""
    space: Literal["any", "mni"] = "any"
    """`mni`: a scan that clearly does not lie in MNI space is quarantined (tasks.mni); for frame `template`."""
    brain_mask: Literal["none", "file"] = "none"
    """`file`: everything outside the case's brain mask (modality `brain_mask` of the catalog) becomes 0."""
    bias_correction: Literal["none", "n4"] = "none"
    """`n4`: N4 bias field correction of each scan (needs the extra `registration`; some 10 s a scan)."""
    tissue: Literal["none", "approximate"] = "none"
    """`approximate`: a case with a t1 and no gm gets its gm channel, and without descriptors its regional volumes, from
    the t1 (tasks.anatomy; what they are not: docs/anatomy.md). For specs with gm, intensity keep, frame template."""
    registration: Literal["none", "rigid", "affine"] = "none"
    """Registers the reference scan to `template` and moves all files of the case with it, by their affines: voxels are
    still interpolated once. For frame `template`; needs the extra `registration`; some 20 s a case."""
    template: str = "mni152"
    """`mni152` (the skull-stripped T1 that nilearn ships, 2 mm), or the path of a NIfTI file."""
    template_sha256: str = ""
    """SHA-256 of the template's file; required for a path, so that the spec's digest covers the voxels."""
    connectome: ConnectomeSpec | None = None
    """How functional images and time series of regions become connectomes; None: they are not read."""

    def reads(self, modality: str) -> bool:
        """Say whether a case's file of this modality (or label, brain mask, table) has a part in what is stored."""
        always = self.shows(modality) or modality in (LABEL, DESCRIPTORS)
        functional = modality in FUNCTIONAL and self.connectome is not None
        return always or functional or (modality, self.brain_mask) == (BRAIN_MASK, "file")

    def shows(self, modality: str) -> bool:
        """Say whether a file of this modality can become a channel of the store, itself or as the map made from it."""
        return modality in self.modalities or (modality, self.tissue) == (T1, "approximate")

    def identity(self) -> dict[str, Any]:
        """Return the fields that make up the digest, JSON-able.

        Fields that were added since the first stores count once they differ from their default, so that stores of
        before keep their digest. A default of such a field must never change.
        """
        fields = type(self).model_fields
        body = self.model_dump(mode="json")
        return {
            name: value
            for name, value in body.items()
            if name in _FIRST_SPEC_FIELDS or getattr(self, name) != fields[name].default
        }

    def content_digest(self) -> str:
        """Return the SHA-256 (hex) of `identity`."""
        return digest_of(self.identity())

    @model_validator(mode="after")
    def _check_grid(self) -> Self:
        if (self.frame == "template") != (self.grid_affine is not None):
            raise ValueError("grid_affine is required for frame 'template' and refused for frame 'image'")
        if min(self.grid) < 2:
            raise ValueError(f"grid must have two or more voxels along each axis, got {self.grid}")
        if self.grid_affine is not None:
            _check_matrix(self.grid_affine)
            edges = [sum(row[axis] ** 2 for row in self.grid_affine[:3]) ** 0.5 for axis in range(3)]
            if any(abs(edge - self.spacing_mm) > 1e-3 * self.spacing_mm for edge in edges):
                raise ValueError(f"grid_affine has voxel edges of {edges} mm, but spacing_mm is {self.spacing_mm:g}")
        return self

    @model_validator(mode="after")
    def _check_steps(self) -> Self:
        if self.frame == "image" and (self.space == "mni" or self.registration != "none"):
            raise ValueError("space 'mni' and registration need frame 'template'")
        if self.space == "mni" and self.registration != "none":
            raise ValueError("space 'mni' refuses scans that are not registered yet, registration does it: choose one")
        if self.tissue == "approximate" and (self.frame, self.intensity, GREY in self.modalities) != (
            "template", "keep", True,
        ):  # fmt: skip
            raise ValueError(
                "tissue 'approximate' makes a modulated map of grey matter in MNI space: it needs frame 'template', "
                "intensity 'keep' and modality gm"
            )
        if (self.template == "mni152") == bool(self.template_sha256):
            raise ValueError("template_sha256 is required for a template from a file and refused for 'mni152'")
        if self.template != "mni152" and self.registration == "none":
            raise ValueError(
                f"template {self.template} would not be used, for registration is 'none'; set registration, or leave "
                "template and template_sha256 out"
            )
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"percentiles must rise within 0..100, got {self.percentiles}")
        if unknown := set(self.modalities) - {*MODALITIES, *OTHER_MODALITIES}:
            raise ValueError(f"unknown modalities in the spec: {sorted(unknown)}")
        if self.connectome is not None and BOLD in self.modalities:
            raise ValueError("bold becomes a connectome in this spec and is no channel; take it out of modalities")
        if not self.modalities or len(set(self.modalities)) < len(self.modalities):
            raise ValueError(f"modalities must name one or more channels, each once, got {self.modalities}")
        if unknown := set(self.reference_order) - {*MODALITIES, *OTHER_MODALITIES}:
            raise ValueError(f"unknown modalities in reference_order: {sorted(unknown)}")
        return self


_FIRST_SPEC_FIELDS = frozenset(
    {
        *("name", "spacing_mm", "grid", "frame", "grid_affine", "modalities", "reference_order", "percentiles"),
        *("percentile_region", "nan_share_max", "chunk", "codec", "space", "brain_mask", "bias_correction"),
        *("registration", "template", "template_sha256"),
    }
)
"""Of PreprocessSpec when the first stores were written. Nothing is added here."""


def _check_matrix(matrix: Matrix) -> None:
    """Raise ValueError unless a matrix maps voxels to mm: 4 x 4, finite, last row 0 0 0 1, not singular."""
    if len(matrix) != 4 or tuple(matrix[3]) != (0.0, 0.0, 0.0, 1.0):
        raise ValueError(f"grid_affine must have four rows, the last one 0 0 0 1, got {matrix}")
    if not all(math.isfinite(value) for row in matrix for value in row):
        raise ValueError(f"grid_affine must be finite, got {matrix}")
    (a, b, c, _), (d, e, f, _), (g, h, i, _) = matrix[:3]
    scale = max(map(abs, (a, b, c, d, e, f, g, h, i)))
    if abs(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)) <= 1e-6 * scale**3:
        raise ValueError(f"grid_affine is singular: two axes point the same way, got {matrix}")


def _mni_affine(spacing_mm: float, corner_mm: tuple[float, float, float]) -> Matrix:
    x, y, z = corner_mm
    s = spacing_mm
    return ((s, 0.0, 0.0, x), (0.0, s, 0.0, y), (0.0, 0.0, s, z), (0.0, 0.0, 0.0, 1.0))


_VBM: dict[str, Any] = {
    "spacing_mm": 1.5,
    "frame": "template",
    "modalities": ("gm",),
    "reference_order": ("gm",),
    "intensity": "keep",
    "chunk": 64,
}
_T1_MNI: dict[str, Any] = {
    "grid": (160, 192, 160),
    "frame": "template",
    "grid_affine": _mni_affine(1.0, (-80.0, -113.0, -75.0)),
    "modalities": ("t1",),
    "percentiles": (0.5, 99.5),
    "percentile_region": "foreground",
    "space": "mni",
}
SPECS: dict[str, PreprocessSpec] = {
    "brainmvp": PreprocessSpec(name="brainmvp"),
    # 3 mm MNI grid of 192 x 240 x 192 mm around the MNI152 brain: small enough for a laptop.
    "demo": PreprocessSpec(
        name="demo",
        spacing_mm=3.0,
        grid=(64, 80, 64),
        frame="template",
        grid_affine=_mni_affine(3.0, (-96.0, -132.0, -78.0)),
        percentiles=(1.0, 99.0),
        percentile_region="foreground",
    ),
    # CINP's T1: 1 mm MNI, intensities between percentiles 0.5 and 99.5 of the foreground. The grid lies on the voxels
    # of the 1 mm MNI152 templates, so that images on them are only shifted; 160 x 192 x 160 holds the brain with 2 to
    # 8 mm to spare. Scaled to [0, 1] (the option of the reconstruction); a z-score is left to training.
    "t1_mni": PreprocessSpec(name="t1_mni", **_T1_MNI),
    # CINP: that T1 and the connectome of the regions of CC200, from time series as the Preprocessed Connectomes Project
    # ships them. BOLD images need the label image of an atlas: give `own_spec`.
    "cinp": PreprocessSpec(name="cinp", connectome=ConnectomeSpec(atlas="cc200"), **_T1_MNI),
    # The same with fMRIPrep's brain masks, whose T1s still have a skull.
    "cinp_fmriprep": PreprocessSpec(
        name="cinp_fmriprep", brain_mask="file", connectome=ConnectomeSpec(atlas="cc200"), **_T1_MNI
    ),
    # The field of view of `demo` at 6 mm, for phantoms and tests.
    "cinp_tiny": PreprocessSpec(
        name="cinp_tiny",
        connectome=ConnectomeSpec(atlas="desikan_killiany"),
        **{**_T1_MNI, "spacing_mm": 6.0, "grid": (32, 40, 32), "grid_affine": _mni_affine(6.0, (-96.0, -132.0, -78.0))},
    ),
    # A start for own studies: give `own_spec` with other spacing, grid and percentiles.
    "generic": PreprocessSpec(
        name="generic", grid=(256, 256, 256), percentiles=(1.0, 99.0), percentile_region="foreground"
    ),
    # AnatCL's input: CAT12's modulated grey-matter maps, 1.5 mm MNI (SPM's bounding box -90 -126 -72 to 90 90 108 mm).
    # The files have x from right to left; the store has RAS axes: the voxels are the same, x the other way round.
    "vbm": PreprocessSpec(
        name="vbm", grid=(121, 145, 121), grid_affine=_mni_affine(1.5, (-90.0, -126.0, -72.0)), **_VBM
    ),
    # The same grid for people who have only a T1, in MNI space already: an approximate map (docs/anatomy.md).
    "vbm_approximate": PreprocessSpec(
        name="vbm_approximate",
        grid=(121, 145, 121),
        grid_affine=_mni_affine(1.5, (-90.0, -126.0, -72.0)),
        space="mni",
        tissue="approximate",
        **_VBM,
    ),
    # The central 128 of the 145 planes along y, as the released AnatCL encoder takes them.
    "vbm_128": PreprocessSpec(
        name="vbm_128", grid=(121, 128, 121), grid_affine=_mni_affine(1.5, (-90.0, -114.0, -72.0)), **_VBM
    ),
    # The field of view of `vbm` at 6 mm, for phantoms and tests.
    "vbm_tiny": PreprocessSpec(
        name="vbm_tiny",
        grid=(31, 37, 31),
        grid_affine=_mni_affine(6.0, (-90.0, -126.0, -72.0)),
        **{**_VBM, "spacing_mm": 6.0, "chunk": 48},
    ),
}


def find_spec(name: str) -> PreprocessSpec:
    """Return a registered spec; raises ValueError listing the known names."""
    try:
        return SPECS[name]
    except KeyError:
        raise ValueError(f"unknown preprocessing spec {name!r}; known: {', '.join(SPECS)}") from None


def unlike_images(one: PreprocessSpec, other: PreprocessSpec) -> str:
    """Return the first field in which two specs make images that look different to an encoder; the grid may differ."""
    for name in ("spacing_mm", "frame", "intensity", "percentiles", "percentile_region", "tissue"):
        if getattr(one, name) != getattr(other, name):
            return name
    return ""
