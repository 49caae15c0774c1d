"""How age, sex, site and diagnosis change the cortex of the anatomical cohort: committed sizes, each with its source.

These numbers were fixed before any network was trained on this cohort. They are not parameters, and they are never
tuned so that a method wins. Thickness and area of a region are shares of the region's mean at 30 years; d is Cohen's d
against the spread within a group of one age. [abstract]: checked against the published abstract; [chosen]: ours, of
plausible size.

Age
    Frangou et al. 2022, Hum Brain Mapp 43:431-451 (17,075 people of 3 to 90 years): thickness is highest in childhood
    and falls, more steeply up to the third decade; entorhinal, temporopolar and anterior cingulate cortex do not
    follow; age explains up to 59 % of the variance [abstract]. Fjell et al. 2009, Cereb Cortex 19:2001-2012: the
    strongest thinning is in the superior and inferior frontal gyri and the superior temporal lobe, the inferior
    temporal lobe and the anterior cingulate are relatively spared [abstract]. Rates and weights are [chosen]; with them
    age explains about half of the variance of a region's thickness.
Sex and head size
    As in tasks.phantom.effects. The cortex grows with the head by its area alone [chosen].
Schizophrenia-like
    van Erp et al. 2018, Biol Psychiatry 84:644-654 (4,474 patients): thinner cortex, d = -0.530 (left) and -0.516
    (right), with the largest effects in frontal and temporal regions [abstract]. Here d = 0.53 in frontal and temporal
    regions alone.
AD-like
    Dickerson et al. 2009, Cereb Cortex 19:497-510: the cortical signature of Alzheimer's disease, nine regions. Which
    regions of the atlas stand for them, and d = 1.5 in the temporal and 1.0 in the other ones, are [chosen].
Site
    Relative offsets of what a scanner measures, never of the latent values [chosen].
Measurement
    Spread of a repeated measurement of one person's region: a few per cent [chosen].
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from models.anatomy import DESIKAN_KILLIANY, bare_region
from models.records import Record
from tasks.phantom.config import SITES
from tasks.phantom.effects import BASE_SCALE, HEAD_SCALE_SD, SEX_SCALE_DIFFERENCE, in_permuted_block

AGE_RANGE_YEARS = (6.0, 88.0)
"""As in OpenBHB."""
BEND_YEARS = 30.0
THICKNESS_PER_YEAR_YOUNG = -0.0045
THICKNESS_PER_YEAR_ADULT = -0.0025
"""Before and after the bend, times the region's weight."""
STRONG_AGEING = frozenset(
    {"superiorfrontal", "rostralmiddlefrontal", "caudalmiddlefrontal", "parsopercularis", "parsorbitalis"}
    | {"parstriangularis", "superiortemporal", "transversetemporal", "bankssts"}
)
WEAK_AGEING = frozenset(
    {"inferiortemporal", "rostralanteriorcingulate", "caudalanteriorcingulate", "entorhinal", "temporalpole"}
)
STRONG_WEIGHT, USUAL_WEIGHT, WEAK_WEIGHT = 1.3, 1.0, 0.5
THICKNESS_SD_PERSON = 0.04
"""Shared by all regions of a person."""
THICKNESS_SD_REGION = 0.05
"""Of each region, independent."""
AREA_PER_YEAR = -0.0015
AREA_SD_REGION = 0.06
OTHER_GREY_PER_YEAR = -0.0025
OTHER_GREY_SD = 0.04
"""Subcortical and cerebellar grey matter."""

THICKNESS_SD = math.hypot(THICKNESS_SD_PERSON, THICKNESS_SD_REGION)
"""Of one region within a group of one age: 6.4 %."""
SCHIZOPHRENIA_D = 0.53
SCHIZOPHRENIA_REGIONS = frozenset(
    {"superiorfrontal", "rostralmiddlefrontal", "caudalmiddlefrontal", "parsopercularis", "parstriangularis"}
    | {"lateralorbitofrontal", "medialorbitofrontal", "superiortemporal", "middletemporal", "inferiortemporal"}
    | {"fusiform"}
)
AD_TEMPORAL_D = 1.5
AD_OTHER_D = 1.0
AD_TEMPORAL_REGIONS = frozenset({"entorhinal", "parahippocampal", "inferiortemporal", "temporalpole"})
AD_OTHER_REGIONS = frozenset(
    {"inferiorparietal", "supramarginal", "superiorparietal", "precuneus", "superiorfrontal", "parsopercularis"}
)

THICKNESS_MM: dict[str, float] = {
    "bankssts": 2.5, "caudalanteriorcingulate": 2.6, "caudalmiddlefrontal": 2.5, "cuneus": 1.8, "entorhinal": 3.3,
    "fusiform": 2.7, "inferiorparietal": 2.4, "inferiortemporal": 2.8, "isthmuscingulate": 2.4,
    "lateraloccipital": 2.2, "lateralorbitofrontal": 2.6, "lingual": 2.0, "medialorbitofrontal": 2.4,
    "middletemporal": 2.8, "parahippocampal": 2.7, "paracentral": 2.3, "parsopercularis": 2.5, "parsorbitalis": 2.7,
    "parstriangularis": 2.4, "pericalcarine": 1.6, "postcentral": 2.0, "posteriorcingulate": 2.5, "precentral": 2.5,
    "precuneus": 2.3, "rostralanteriorcingulate": 2.9, "rostralmiddlefrontal": 2.3, "superiorfrontal": 2.7,
    "superiorparietal": 2.1, "superiortemporal": 2.7, "supramarginal": 2.5, "frontalpole": 2.8, "temporalpole": 3.6,
    "transversetemporal": 2.3, "insula": 3.0,
}  # fmt: skip
"""Of both hemispheres at 30 years: as FreeSurfer usually finds them in adults, rounded [chosen]."""

SITE_THICKNESS: dict[str, float] = {"A": 0.0, "B": 0.02, "C": -0.02}
"""Offset of the thickness that a site's descriptors report."""
SITE_GREY: dict[str, float] = {"A": 0.0, "B": 0.03, "C": -0.04}
"""Offset of the grey matter in a site's maps and descriptors."""
SITE_NOISE: dict[str, float] = {"A": 0.02, "B": 0.03, "C": 0.05}
"""Standard deviation of the noise in a map's voxels, as a share of their value."""
MEASURED_SD: dict[str, float] = {
    "cortical_thickness_mm": 0.02, "grey_matter_volume_mm3": 0.03, "surface_area_mm2": 0.02,
}  # fmt: skip
"""Standard deviation of the error of a region's descriptor, as a share of its value."""
RESIDUAL_MM = 1.5
"""What a normalisation to MNI space leaves: root mean square displacement of the maps, a smooth and invertible one."""

Diagnosis = Literal["control", "schizophrenia-like", "ad-like"]
PATIENT_BLOCK: tuple[Diagnosis, ...] = ("control", "control", "schizophrenia-like", "ad-like")
Z_MAX = 2.5
"""Deviations beyond are cut off: no thickness is ever negative, and no head leaves the field of view."""


class CorticalTraits(Record):
    """What was drawn for one subject: labels that people see, and the hidden values behind them."""

    age: float
    """Years."""
    sex: Literal["M", "F"]
    site: str
    diagnosis: Diagnosis
    head_scale: float
    """Linear size relative to MNI152."""
    thickness: tuple[float, ...]
    """By region, as in DESIKAN_KILLIANY: share of the region's mean at 30 years."""
    area: tuple[float, ...]
    """The same of the surface area, without head size."""
    other_grey: float
    """Share of the mean of the grey matter outside the cortex, without head size."""


def thinning(diagnosis: str) -> np.ndarray:
    """Return by which share of its mean at 30 years a diagnosis thins each region, (68,)."""
    if diagnosis == "control":
        return np.zeros(len(DESIKAN_KILLIANY))
    if diagnosis == "schizophrenia-like":
        return SCHIZOPHRENIA_D * THICKNESS_SD * _is_in(SCHIZOPHRENIA_REGIONS)
    return THICKNESS_SD * (AD_TEMPORAL_D * _is_in(AD_TEMPORAL_REGIONS) + AD_OTHER_D * _is_in(AD_OTHER_REGIONS))


def ageing(age: float) -> np.ndarray:
    """Return the change of each region's thickness from its mean at 30 years, as a share of that, (68,)."""
    weight = USUAL_WEIGHT + (STRONG_WEIGHT - USUAL_WEIGHT) * _is_in(STRONG_AGEING)
    weight += (WEAK_WEIGHT - USUAL_WEIGHT) * _is_in(WEAK_AGEING)
    rate = THICKNESS_PER_YEAR_YOUNG if age < BEND_YEARS else THICKNESS_PER_YEAR_ADULT
    return weight * rate * (age - BEND_YEARS)


def mean_thickness_mm() -> np.ndarray:
    """Return the mean thickness of each region at 30 years, (68,) mm."""
    return np.array([THICKNESS_MM[bare_region(name)] for name in DESIKAN_KILLIANY])


def draw_cortical_traits(seed: int, subject: int, patients: bool) -> CorticalTraits:
    """Draw the traits of a subject: a function of seed and subject number alone. patients: else all are controls.

    Age, sex, site and diagnosis are independent: none can stand in for another. Categories come in permuted blocks.
    """
    stream = [seed, 2]  # 0 and 1 are the data sets of the other cohort
    diagnosis = in_permuted_block(PATIENT_BLOCK, subject, stream, 2) if patients else "control"
    sex = in_permuted_block(("M", "F", "M", "F"), subject, stream, 0)
    rng = np.random.default_rng([*stream, subject, 0])
    age = round(float(rng.uniform(*AGE_RANGE_YEARS)), 1)
    z_head, z_person, z_other = np.clip(rng.standard_normal(3), -Z_MAX, Z_MAX)
    z_thickness, z_area = np.clip(rng.standard_normal((2, len(DESIKAN_KILLIANY))), -Z_MAX, Z_MAX)
    healthy = 1 + ageing(age) + THICKNESS_SD_PERSON * z_person + THICKNESS_SD_REGION * z_thickness
    area = 1 + AREA_PER_YEAR * (age - BEND_YEARS) + AREA_SD_REGION * z_area
    sign = 0.5 if sex == "M" else -0.5
    return CorticalTraits.model_validate(
        {
            "age": age,
            "sex": sex,
            "site": in_permuted_block(SITES, subject, stream, 1),
            "diagnosis": diagnosis,
            "head_scale": BASE_SCALE * (1 + HEAD_SCALE_SD * z_head + sign * SEX_SCALE_DIFFERENCE),
            "thickness": tuple((healthy - thinning(diagnosis)).tolist()),
            "area": tuple(area.tolist()),
            "other_grey": float(1 + OTHER_GREY_PER_YEAR * (age - BEND_YEARS) + OTHER_GREY_SD * z_other),
        }
    )


def _is_in(names: frozenset[str]) -> np.ndarray:
    return np.array([float(bare_region(name) in names) for name in DESIKAN_KILLIANY])
