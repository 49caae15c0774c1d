"""What things are: modality vocabulary, catalog rows, preprocessing specs, receipts and selections.

Nothing here imports torch, zarr, Prefect or Dask, so every other part may depend on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.anatomy import ATLASES, MEASURES, Atlas, Basis, Floats, check_values
from models.reasons import Reason as Reason

MODALITIES: tuple[str, ...] = ("flair", "t1", "t1c", "t2", "mra", "pd", "dwi", "adc")
"""Canonical names in template order. The order is an ABI: the index into a BrainMVP template bank."""

BOLD = "bold"
"""The modality of functional images: 4D, no channel of the store; preprocessing makes connectomes of them."""
OTHER_MODALITIES: tuple[str, ...] = (BOLD, "gm")
"""Canonical names that other methods use and that have no BrainMVP template."""

T1, GREY = "t1", "gm"
"""A map of grey matter can be made from a t1 (PreprocessSpec.tissue)."""
LABEL = "label"
"""The `modality` of a segmentation in the catalog."""
BRAIN_MASK = "brain_mask"
"""The `modality` of a brain mask: no channel of the store, but preprocessing may use it."""
DESCRIPTORS = "descriptors"
"""The `modality` of regional descriptors (models.anatomy) of a case: a table, no image."""
CONFOUNDS = "bold_confounds"
"""The `modality` of the confounds that fMRIPrep wrote for a BOLD image: a table."""
SERIES = "roi_series"
"""The `modality` of time series of the regions of an atlas: a text file. A case has this or a BOLD image."""
FUNCTIONAL = (BOLD, CONFOUNDS, SERIES)
"""What connectomes are made of."""

# Explicit and lower-case; a token that is not here is reported, never guessed.
MODALITY_ALIASES: dict[str, str] = {
    **{name: name for name in (*MODALITIES, *OTHER_MODALITIES)},
    "t2f": "flair",
    "t1n": "t1",
    "t1w": "t1",
    "t1ce": "t1c",
    "t1gd": "t1c",
    "t2w": "t2",
    "pdw": "pd",
    "angio": "mra",
}


class UnknownModalityError(ValueError):
    """A file name carries a modality token that the alias table does not know."""


def canonical_modality(token: str) -> str:
    """Return the canonical modality of a file-name token; upper and lower case are equal.

    Raises UnknownModalityError naming the token and the accepted ones.
    """
    try:
        return MODALITY_ALIASES[token.lower()]
    except KeyError:
        known = ", ".join(sorted(MODALITY_ALIASES))
        raise UnknownModalityError(f"unknown modality token {token!r}; known tokens: {known}") from None


def field_title(name: str, _: object) -> str:
    """Return what a form calls a field: `spacing_mm` becomes `Spacing mm`."""
    return name[:1].upper() + name[1:].replace("_", " ")


class Record(BaseModel):
    """A frozen value that refuses unknown keys; copies go through `replace`, which validates again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with some fields changed."""
        return type(self).model_validate({**self.model_dump(), **changes})

    def content_digest(self) -> str:
        """Return the SHA-256 of the canonical JSON of this record (hex)."""
        return digest_of(self.model_dump(mode="json"))


def digest_of(value: Any) -> str:
    """Return the SHA-256 (hex) of a JSON-able value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def without_unset(values: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a digest is made of: settings of `later` that have their value there count as not yet invented."""
    return {name: value for name, value in values.items() if name not in later or later[name] != value}


class Scan(Record):
    """One row of the catalog: one image or label file, or the reason why it was left out."""

    dataset: str
    subject: str
    session: str = ""
    case: str
    """`<subject>` or `<subject>_<session>`; unique inside a dataset."""
    modality: str
    """Canonical name, `label` for a segmentation, `brain_mask`, `descriptors` for a table of regions,
    `bold_confounds` or `roi_series`."""
    path: str
    """URL or absolute path of the file."""
    size_bytes: int = 0
    etag: str = ""
    """Identity beside the size: S3's ETag, a local file's modification time in ns, or `sha256:<hex>` on request."""
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    dtype: str = ""
    label_scheme: str = ""
    split: str = ""
    """What the source says (`training`, `validation`, `test`), or empty."""
    status: Literal["ok", "left out"] = "ok"
    reason: str = ""
    detail: str = ""


Matrix = tuple[tuple[float, float, float, float], ...]


class SourceFile(Record):
    """Identity of one source file of a case, as it was when the case was preprocessed."""

    modality: str
    path: str
    size_bytes: int
    etag: str
    alias: str = Field("", exclude_if=lambda value: not value)
    """What is written in place of the path where paths are hidden (tasks.hidden_paths); empty: the path itself."""

    def written(self) -> Self:
        """Return the file as it stands in plans, receipts and tables."""
        return self.replace(path=self.alias, alias="") if self.alias else self

    @property
    def identity(self) -> tuple[str, int, str]:
        """What decides whether it is the same file: a folder may be moved, so its path does not."""
        return self.modality, self.size_bytes, self.etag


class PlannedCase(Record):
    """One line of a plan: which case gets which row, and from which files."""

    dataset: str
    row: int
    case: str
    subject: str
    session: str = ""
    label_scheme: str = ""
    split: str = ""
    files: tuple[SourceFile, ...]

    @property
    def hides_paths(self) -> bool:
        """Whether hashes stand in place of its paths in the store."""
        return any(file.alias for file in self.files)

    def written(self) -> Self:
        """Return the case as it stands in plans, receipts and tables: with hidden paths where they are hidden."""
        return self.replace(files=[file.written().model_dump() for file in self.files]) if self.hides_paths else self


class DescriptorTable(Record):
    """Regional descriptors of one case, checked by models.anatomy: what a file of modality `descriptors` holds."""

    atlas: Atlas
    basis: Basis
    values: dict[str, tuple[float | None, ...]]
    """By measure, in its unit: one value per region of the atlas, in its order; None: not measured."""
    missing_regions: int = Field(0, ge=0)
    """How many regions may lack a measure."""
    sources: tuple[str, ...] = ()
    """Names of the files that it was made from."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_values(self.values, self.atlas, self.missing_regions)
        return self

    def array(self) -> Floats:
        """Return the values (measure, region) float32 in the order of MEASURES; NaN where there is none."""
        nothing = (None,) * len(ATLASES[self.atlas])
        return np.array([self.values.get(measure, nothing) for measure in MEASURES], dtype=np.float32)


class CaseGeometry(Record):
    """Where the stored voxels of a case lie, and what is needed to go back to its source grids."""

    affine: Matrix
    """Stored voxel -> RAS+ mm."""
    origin: tuple[int, int, int]
    """Index of stored voxel 0 in the template grid."""
    source_shape: dict[str, tuple[int, int, int]] = Field(default_factory=dict)
    """By modality: voxels of the source file."""
    source_affine: dict[str, Matrix] = Field(default_factory=dict)
    """By modality: source voxel -> RAS+ mm, as it was used."""
    intensity_range: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """By modality: source intensities that became 0 and 1."""
    registration: Matrix | None = None
    """RAS+ mm of the files -> RAS+ mm of the template, already part of `source_affine`; None when not registered."""


class Receipt(Record):
    """Written after a case is safely in the store, or after it was found unusable."""

    dataset: str
    row: int
    case: str
    subject: str
    session: str = ""
    label_scheme: str = ""
    split: str = ""
    spec_digest: str
    files: tuple[SourceFile, ...]
    status: Literal["stored", "quarantined"]
    reason: str = ""
    detail: str = ""
    digest: str = ""
    """Case digest: voxels, label, present, extent, affine, origin, descriptors, connectome. Empty when quarantined."""
    modalities: tuple[str, ...] = ()
    has_label: bool = False
    extent: tuple[int, int, int] = (0, 0, 0)
    qc: dict[str, Any] = Field(default_factory=dict)
    """Finite numbers and flags by name, e.g. `foreground_share`, `snr_t1`, `nan_replaced`."""
    fingerprint: tuple[float, ...] = ()
    geometry: CaseGeometry | None = None
    """None when quarantined."""
    descriptors: DescriptorTable | None = None
    """None when quarantined, and for a case without."""
    seconds: float = 0.0


OLDEST = 130
"""Years that a person may be old."""


class SelectedCase(Record):
    """One line of a training's frozen selection.parquet."""

    dataset: str
    row: int
    case: str
    subject: str
    digest: str
    role: Literal["train", "val", "test"]
    target: str = ""
    """Class name for classification; empty otherwise."""
    age: float | None = Field(None, ge=0, le=OLDEST, allow_inf_nan=False)
    """In years, for objectives that learn from it."""
    person: str = ""
    """Shared by the subjects, of any dataset, that are known to be one person; empty: the subject stands alone."""
