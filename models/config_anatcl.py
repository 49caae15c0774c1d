"""Settings of AnatCL and of the baselines that its paper compares it with."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from models.anatomy import MEASURES, Atlas
from models.records import Record

Kernel = Literal["rbf", "gaussian", "cauchy"]
Form = Literal["yaware", "expw", "threshold"]
Variant = Literal["global", "local"]
Negative = Literal["shift", "clamp"]


class ViewConfig(Record):
    """How the two views of a map are made to differ; without any of it they are one image."""

    flip: bool = False
    """Mirror left and right in half of the views. Not with descriptors that tell the hemispheres apart."""
    shift_mm: float = Field(0.0, ge=0)
    """Largest shift along each axis, in whole voxels that are not more."""
    noise_std: float = Field(0.0, ge=0)
    """Largest standard deviation of Gaussian noise, in the unit of the map."""
    cutout_share: float = Field(0.0, ge=0, lt=1)
    """Edge of a box of zeros in half of the views, as a share of each edge of the map."""

    @property
    def differ(self) -> bool:
        """Whether two views of a map are different."""
        return self.flip or max(self.shift_mm, self.noise_std, self.cutout_share) > 0


class WholeMapConfig(Record):
    """What the objectives of whole maps share."""

    kind: str
    modality: str = "gm"
    """Channel of the store: modulated grey matter."""


class AnatCLConfig(WholeMapConfig):
    """Contrast whose positives are weighted by age (y-Aware) and by anatomy (AnatCL); its baselines are parts of it."""

    kind: Literal["anatcl"] = "anatcl"
    weight_age: float = Field(1.0, ge=0)
    """lambda2 of the paper: of the age term (y-Aware)."""
    weight_anatomy: float = Field(1.0, ge=0)
    """lambda1 of the paper: of the anatomical term."""
    weight_self: float = Field(0.0, ge=0)
    """Of the term whose only positive is the other view of the same image (SimCLR)."""
    variant: Variant = "global"
    """`global` compares each measure over all regions, `local` the measures of each region."""
    measures: tuple[str, ...] = MEASURES
    """Descriptors that the anatomical term compares, by name."""
    atlas: Atlas = "desikan_killiany"
    """Of the descriptors: 68 or 148 regions."""
    negative: Negative = "shift"
    """What becomes of similarities s in -1..1: (1 + s) / 2, or max(s, 0)."""
    kernel: Kernel = "rbf"
    """Of age differences; gaussian is rbf / (sqrt(2 pi) sigma)."""
    sigma_years: float = Field(2.0, gt=0)
    """Width of the kernel, not its square."""
    form: Form = "yaware"
    """Denominator of both terms; see models.objectives.similarity."""
    temperature: float = Field(0.1, gt=0)
    base_temperature: float = Field(0.07, gt=0)
    """The terms are multiplied by temperature / base_temperature, as the reference does; equal to it: by 1."""
    head_dim: int = Field(128, ge=1)
    """Width of the embedding that is compared; the head is dropped afterwards."""
    gather_negatives: bool = True
    """Candidates from all ranks, not from the local batch only."""
    views: ViewConfig = ViewConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.weight_age or self.weight_anatomy or self.weight_self):
            raise ValueError("weight_age, weight_anatomy and weight_self are all 0: nothing would be learned")
        if self.form == "expw" and self.kernel == "gaussian":
            raise ValueError(
                "form 'expw' weighs by 1 - w, so its kernel must have the peak 1, and gaussian has another; use 'rbf'"
            )
        if self.weight_anatomy and len(set(self.measures)) < max(len(self.measures), 1):
            raise ValueError(f"measures must name one or more descriptors, each once, got {self.measures}")
        if self.weight_anatomy and self.variant == "local" and len(self.measures) < 2:
            raise ValueError(
                f"variant 'local' compares the measures of a region, so it needs two or more, got {self.measures}; add "
                "measures or use 'global'"
            )
        if self.weight_anatomy and self.views.flip:
            raise ValueError(
                "views.flip mirrors the map and not its descriptors, which tell the hemispheres apart; set it to false "
                "or weight_anatomy to 0"
            )
        return self


class AgeRegressionConfig(WholeMapConfig):
    """Baseline of AnatCL: the age in years from pooled features and a linear layer, absolute error."""

    kind: Literal["age_regression"] = "age_regression"
