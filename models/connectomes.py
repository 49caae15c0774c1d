"""Functional connectomes: how a matrix of regions is made of time series, and the regions of well-known atlases.

A connectome is symmetric (R, R) with a diagonal of 0: correlations or partial correlations of the regions' signals,
Fisher-transformed unless asked otherwise. Order and names of the regions are part of the settings, and so of the
preprocessing spec and of a store: two atlases never meet in one store.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from models.anatomy import DESIKAN_KILLIANY
from models.records import Record, field_title

Kind = Literal["correlation", "partial correlation"]
Strategy = Literal["high_pass", "motion", "wm_csf", "compcor"]
"""Of nilearn's `load_confounds`, what needs no other image; the global signal and scrubbing have their own settings."""

_AAL_PAIRS = """
2001 Precentral, 2101 Frontal_Sup, 2111 Frontal_Sup_Orb, 2201 Frontal_Mid, 2211 Frontal_Mid_Orb, 2301 Frontal_Inf_Oper,
2311 Frontal_Inf_Tri, 2321 Frontal_Inf_Orb, 2331 Rolandic_Oper, 2401 Supp_Motor_Area, 2501 Olfactory,
2601 Frontal_Sup_Medial, 2611 Frontal_Med_Orb, 2701 Rectus, 3001 Insula, 4001 Cingulum_Ant, 4011 Cingulum_Mid,
4021 Cingulum_Post, 4101 Hippocampus, 4111 ParaHippocampal, 4201 Amygdala, 5001 Calcarine, 5011 Cuneus, 5021 Lingual,
5101 Occipital_Sup, 5201 Occipital_Mid, 5301 Occipital_Inf, 5401 Fusiform, 6001 Postcentral, 6101 Parietal_Sup,
6201 Parietal_Inf, 6211 SupraMarginal, 6221 Angular, 6301 Precuneus, 6401 Paracentral_Lobule, 7001 Caudate,
7011 Putamen, 7021 Pallidum, 7101 Thalamus, 8101 Heschl, 8111 Temporal_Sup, 8121 Temporal_Pole_Sup, 8201 Temporal_Mid,
8211 Temporal_Pole_Mid, 8301 Temporal_Inf, 9001 Cerebelum_Crus1, 9011 Cerebelum_Crus2, 9021 Cerebelum_3,
9031 Cerebelum_4_5, 9041 Cerebelum_6, 9051 Cerebelum_7b, 9061 Cerebelum_8, 9071 Cerebelum_9, 9081 Cerebelum_10
"""
_AAL_VERMIS = """
9100 Vermis_1_2, 9110 Vermis_3, 9120 Vermis_4_5, 9130 Vermis_6, 9140 Vermis_7, 9150 Vermis_8, 9160 Vermis_9,
9170 Vermis_10
"""


def _aal() -> dict[int, str]:
    """Return value -> name of the 116 regions of AAL as SPM distributes it: left, then right of every pair."""
    pairs = [entry.split() for entry in _AAL_PAIRS.split(",")]
    sides = {int(value) + n: f"{name}_{side}" for value, name in pairs for n, side in enumerate("LR")}
    vermis = {int(value): name for value, name in (entry.split() for entry in _AAL_VERMIS.split(","))}
    return sides | vermis


def _numbered(atlas: str, count: int) -> dict[int, str]:
    return {value: f"{atlas}_{value:03d}" for value in range(1, count + 1)}


KNOWN_ATLASES: dict[str, dict[int, str]] = {
    "aal116": _aal(),
    "cc200": _numbered("cc200", 200),
    "cc400": _numbered("cc400", 392),
    **{f"schaefer_{count}": _numbered("schaefer", count) for count in (100, 200, 400)},
    "desikan_killiany": dict(enumerate(DESIKAN_KILLIANY, start=1)),
}
"""Value -> region by atlas: Tzourio-Mazoyer et al. 2002 (AAL, the values of SPM and of the Preprocessed Connectomes
Project), Craddock et al. 2012 (as that project resampled them: 200 and 392 regions), Schaefer et al. 2018, Desikan et
al. 2006 (cortex; 1 to 68 in the order of models.anatomy). Regions without names of their own are numbered."""


MEANING = ("atlas", "regions", "kind", "covariance", "fisher_z")
"""Settings that say what the numbers of a matrix are."""


class ConnectomeSpec(Record):
    """How time series become a stored connectome. Part of the preprocessing spec and of its digest.

    Known atlases need their name alone: regions and values are filled in.
    """

    model_config = ConfigDict(title="connectomes", use_attribute_docstrings=True, field_title_generator=field_title)

    atlas: str = Field(pattern=r"^[a-z0-9_]+$")
    """Name of the atlas: lower-case letters, digits, underscores."""
    regions: tuple[str, ...] = ()
    """Names of the regions in the order of the matrix; empty: those of the known atlas."""
    values: tuple[int, ...] = ()
    """Value of each region in the label image, and in the headers of series files, in the order of `regions`."""
    atlas_image: str = ""
    """Label image of the atlas in MNI space, which BOLD images need; ROI time series do not."""
    atlas_sha256: str = ""
    """SHA-256 of that file, so that the spec's digest covers it; required with an image."""
    kind: Kind = "correlation"
    """Of the matrix. Tangent space is fitted to a group, so it is made of stored matrices where it is used."""
    covariance: Literal["empirical", "ledoit_wolf"] = "empirical"
    """Estimator behind the matrix. Partial correlation of few frames needs `ledoit_wolf`."""
    fisher_z: bool = True
    """Store atanh(r)."""
    confounds: tuple[Strategy, ...] = ("high_pass", "motion", "wm_csf")
    """What is regressed out of BOLD with confounds: strategies of nilearn's `load_confounds`; empty: nothing."""
    global_signal: bool = False
    """Regress the global signal out as well."""
    fd_threshold_mm: float = Field(0.5, ge=0, allow_inf_nan=False)
    """Frames with a larger framewise displacement are left out; 0: none are."""
    high_pass_hz: float = Field(0.0, ge=0, allow_inf_nan=False)
    """0: no filter. A filter needs the repetition time."""
    low_pass_hz: float = Field(0.0, ge=0, allow_inf_nan=False)
    """0: no filter."""
    min_frames: int = Field(80, ge=10)
    """At least 10. Fewer frames after scrubbing: the case is quarantined."""
    min_kept_share: float = Field(0.5, ge=0, le=1)
    """Of all frames, from 0 to 1; less: the case is quarantined."""
    missing_regions: int = Field(0, ge=0)
    """How many regions, 0 or more, may have no signal (outside the field of view, constant); they are stored as NaN."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """Write regions and values of a known atlas out: the digest must not depend on this table."""
        if not isinstance(given, Mapping) or given.get("regions") or given.get("values"):
            return given
        known = KNOWN_ATLASES.get(str(given.get("atlas")))
        if known is None:
            return given
        return {**given, "regions": tuple(known.values()), "values": tuple(known)}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.regions:
            raise ValueError(
                f"atlas {self.atlas!r} is not known, so `regions` and `values` must name its regions; known are "
                f"{', '.join(KNOWN_ATLASES)}"
            )
        if len(self.regions) < 3 or len(set(self.regions)) < len(self.regions):
            raise ValueError(f"atlas {self.atlas!r}: a connectome needs 3 or more regions, each named once")
        if len(self.values) != len(self.regions) or len(set(self.values)) < len(self.values) or min(self.values) < 1:
            raise ValueError(
                f"atlas {self.atlas!r}: `values` must have one positive number per region, each once; got "
                f"{len(self.values)} for {len(self.regions)} regions"
            )
        if bool(self.atlas_image) != bool(self.atlas_sha256):
            raise ValueError("atlas_image and atlas_sha256 are given together, or not at all")
        if "compcor" in self.confounds and "high_pass" not in self.confounds:
            raise ValueError("confounds: compcor needs high_pass beside it, for fMRIPrep fits it after that filter")
        if self.low_pass_hz and self.high_pass_hz >= self.low_pass_hz:
            raise ValueError(
                f"high_pass_hz {self.high_pass_hz:g} must be below low_pass_hz {self.low_pass_hz:g}: nothing would pass"
            )
        if self.missing_regions >= len(self.regions) - 2:
            raise ValueError(
                f"missing_regions {self.missing_regions} leaves fewer than 3 of {len(self.regions)} regions"
            )
        return self


def unlike_connectomes(one: ConnectomeSpec, other: ConnectomeSpec) -> str:
    """Return the first setting in which matrices mean something else; empty when there is none. How frames are chosen
    and cleaned may differ."""
    return next((name for name in MEANING if getattr(one, name) != getattr(other, name)), "")
