"""What a phantom cohort is: one frozen config. Equal configs give byte-identical cohorts."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from models.records import MODALITIES, Record, field_title

Orientation = Literal["RAS", "LPS", "oblique"]
Kind = Literal["tumour", "stroke", "schwannoma"]

SITES: tuple[str, ...] = ("A", "B", "C")


class LesionShares(Record):
    """Share of the subjects with each kind of lesion; the rest has none."""

    model_config = ConfigDict(use_attribute_docstrings=True, field_title_generator=field_title)

    tumour: float = Field(0.6, ge=0, le=1)
    """Share with a tumour, from 0 to 1; all shares sum to 1 or less."""
    stroke: float = Field(0.1, ge=0, le=1)
    """Share with a stroke, from 0 to 1."""
    schwannoma: float = Field(0.1, ge=0, le=1)
    """Share with a schwannoma, from 0 to 1."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        total = self.tumour + self.stroke + self.schwannoma
        if total > 1 + 1e-9:
            raise ValueError(f"lesion shares must sum to 1 or less, got {total:g}")
        return self


NO_LESIONS = LesionShares(tumour=0, stroke=0, schwannoma=0)


class PhantomConfig(Record):
    """Size, seed and acquisition of a cohort. Effect sizes are not here on purpose: see `tasks.phantom.effects`."""

    model_config = ConfigDict(title="phantom cohort", use_attribute_docstrings=True, field_title_generator=field_title)

    seed: int = Field(0, ge=0)
    """The cohort is a function of this number, 0 or more."""
    bids_name: str = "phantom-bids"
    """Name of the data set that is a BIDS tree."""
    datalist_name: str = "phantom-16k"
    """Name of the data set in the layout of BrainMVP-16k."""
    bids_subjects: int = Field(24, ge=0)
    """Subjects of the BIDS data set, 0 or more, healthy files only; broken subjects come on top."""
    datalist_subjects: int = Field(24, ge=0)
    """Subjects of the datalist data set, 0 or more."""
    spacing_mm: float = Field(2.0, gt=0.4, le=12)
    """Nominal voxel size, more than 0.4 and at most 12. Each site of the BIDS data set varies it (see
    `tasks.phantom.acquire`)."""
    orientations: tuple[Orientation, Orientation, Orientation] = ("RAS", "LPS", "oblique")
    """Of the BIDS data set's sites A, B and C. The datalist data set is LPS, as BraTS is."""
    anisotropic: bool = True
    """Sites B and C of the BIDS data set have thicker slices."""
    modalities: tuple[str, ...] = ("t1", "t1c", "t2", "flair")
    """Of the BIDS data set; the datalist data set alternates the modality sets of IXI, UCSF-PDGM and BraTS."""
    missing_share: float = Field(0.08, ge=0, lt=1)
    """Share of the BIDS data set's scans, from 0 to below 1, never taken; at least two of a subject remain."""
    other_grid_share: float = Field(0.15, ge=0, le=1)
    """Share of the BIDS subjects, from 0 to 1, whose flair has thick slices, on a grid of its own."""
    lesions: LesionShares = LesionShares()
    """Of the BIDS subjects."""
    datalist_lesions: LesionShares = LesionShares(tumour=0.6, stroke=0.2, schwannoma=0.1)
    """Of the BraTS- and UCSF-like subjects; IXI-like ones are healthy."""
    broken: bool = False
    """Add subjects with a deliberately broken file each (see `tasks.phantom.faults`)."""
    undeformed: bool = False
    """Every subject is the template itself: no deformation, effects, texture, bias field or noise; float32, known
    intensities. For tests against an independent resampling."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if unknown := [name for name in self.modalities if name not in MODALITIES]:
            raise ValueError(f"unknown modalities {unknown}; known: {', '.join(MODALITIES)}")
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"modalities must be named once each and be at least one, got {self.modalities}")
        if self.bids_name == self.datalist_name:
            raise ValueError(f"the two data sets need different names, both are {self.bids_name!r}")
        return self


DEMO = PhantomConfig(seed=20261123, bids_subjects=72, datalist_subjects=48, spacing_mm=2.75, broken=True)
"""About 520 scans of 2.5 to 3 mm voxels."""

TINY = PhantomConfig(seed=7, bids_subjects=6, datalist_subjects=4, spacing_mm=6.0)
"""For tests: a second or two."""

PRESETS: dict[str, PhantomConfig] = {"demo": DEMO, "tiny": TINY}
