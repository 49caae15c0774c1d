"""How hidden traits, diagnosis, age, sex and site change cortex and connectome: committed sizes, each with its source.

These numbers were fixed before any network was trained on this cohort. They are not parameters, and they are never
tuned so that a method wins: a linear model was run on development seeds alone, so that the task is known to be possible
(docs/phantom.md has what it reached). [abstract]: checked against the published abstract; [chosen]: ours.

Traits
    Every person has a number for each of seven networks and one for the whole cortex, independent, with mean 0 and
    standard deviation 1. Each moves both how much cortex its regions have and how strongly they are connected.
    Networks: Yeo et al. 2011, J Neurophysiol 106:1125-1165 (1,000 subjects; local networks in sensory and motor cortex,
    distributed ones in association cortex) [abstract]; which region of the atlas stands for which network is [chosen],
    for regions are larger than networks.
Coupling of structure and function
    Segall et al. 2012, Front Neuroinform 6:10 (603 people): components of grey matter and of resting-state signals lie
    in corresponding places, up to a spatial correlation of 0.59 [abstract]. That says where, not who: how well one
    person's cortex tells the same person's connectivity is weak in reality and not settled. Here it is strong on
    purpose [chosen]: the phantom tests whether a method finds a coupling that is there, not biology.
Diagnosis
    Yan et al. 2019, PNAS 116:9078-9083 (848 patients): connectivity within the default mode network is lower in
    recurrent depression [abstract]. Tozzi et al. 2021, NeuroImage Clin 30:102570 (618 patients): g = -0.246 in its core
    [abstract]. Lower in some networks is the direction here; d = 1.2, five times as much, and a second group whose
    connectivity is higher in other networks are [chosen]. A diagnosis moves traits, nothing else: a T1 shows it because
    structure and function are coupled.
Motion
    Power et al. 2012, NeuroImage 59:2142-2154: motion changes correlations systematically, although motion estimates
    were regressed out; leaving frames out by an index of quality helps [abstract]. Patients move more [chosen].
Age, sex, site
    Directions as in tasks.phantom.effects_cortex; sizes [chosen]. Independent of the diagnosis and of each other.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from models.anatomy import DESIKAN_KILLIANY, bare_region
from models.records import Record
from tasks.phantom.config import SITES
from tasks.phantom.effects import in_permuted_block

NETWORKS: dict[str, tuple[str, ...]] = {
    "visual": ("cuneus", "fusiform", "lateraloccipital", "lingual", "pericalcarine"),
    "somatomotor": ("paracentral", "postcentral", "precentral", "superiortemporal", "transversetemporal"),
    "dorsal_attention": ("caudalmiddlefrontal", "inferiortemporal", "superiorparietal"),
    "ventral_attention": (
        "caudalanteriorcingulate", "insula", "parsopercularis", "posteriorcingulate", "supramarginal",
    ),
    "limbic": (
        "entorhinal", "frontalpole", "lateralorbitofrontal", "medialorbitofrontal", "parahippocampal", "temporalpole",
    ),
    "frontoparietal": ("parsorbitalis", "parstriangularis", "rostralmiddlefrontal"),
    "default": (
        "bankssts", "inferiorparietal", "isthmuscingulate", "middletemporal", "precuneus",
        "rostralanteriorcingulate", "superiorfrontal",
    ),
}  # fmt: skip
"""Regions of both hemispheres by network; every region is in one."""
GLOBAL = "global"
TRAITS: tuple[str, ...] = (*NETWORKS, GLOBAL)
TRAIT_MAX = 3.0
"""Traits beyond, shifts included, are cut off: every correlation matrix then is one."""

THICKNESS_MEAN = AREA_MEAN = 0.9
"""Share of the MNI152 cortex that a mean person has: the average cannot grow much, and shrink well."""
THICKNESS_PER_TRAIT = 0.08
AREA_PER_TRAIT = 0.06
"""Of a region's mean, by one unit of its network's trait."""
THICKNESS_PER_GLOBAL = 0.04
AREA_PER_GLOBAL = 0.02
THICKNESS_SD_REGION = 0.03
AREA_SD_REGION = 0.03
"""Of each region, independent of any trait."""
THICKNESS_PER_YEAR = -0.0015
AREA_SEX_DIFFERENCE = 0.02
"""Men minus women."""
RESIDUAL_MM = 0.75
"""What a non-linear normalisation leaves: root mean square displacement of the T1, smooth and invertible."""

COUPLING = 0.95
"""Correlation of what connectivity follows with the trait that structure follows."""
WITHIN_Z = 0.75
WITHIN_Z_PER_TRAIT = 0.16
"""Fisher z between regions of one network: mean, and change by one unit of its trait."""
BETWEEN_Z = 0.20
Z_PER_GLOBAL = 0.06
"""Of any two regions, by one unit of the global trait."""
Z_PER_YEAR = -0.002
HOMOTOPIC = 0.2
"""By how much of what is missing to 1 a region correlates more with its fellow of the other hemisphere."""
PERSONAL_SHARE = 0.15
PERSONAL_FACTORS = 12
"""Share of a person's correlations that is theirs alone, by random factors: no trait, no structure."""

AGE_RANGE_YEARS = (18.0, 60.0)
AGE_MEAN_YEARS = 39.0
FD_MEDIAN_MM = 0.15
FD_LOG_SD = 0.35
FD_LOG_PATIENTS = 0.25
"""Mean framewise displacement: log-normal; patients move 28 % more (d = 0.7 of its logarithm)."""

TRAIT_D = 1.2
HYPOCONNECTED: tuple[str, ...] = ("default", "frontoparietal", "limbic")
HYPERCONNECTED: tuple[str, ...] = ("visual", "somatomotor", "dorsal_attention")
Diagnosis = Literal["control", "hypoconnected", "hyperconnected"]
PATIENT_BLOCK: tuple[Diagnosis, ...] = ("control", "hypoconnected", "hyperconnected")


class ConnectivityTraits(Record):
    """What was drawn for one subject: labels that people see, and the hidden values behind them."""

    age: float
    """Years."""
    sex: Literal["M", "F"]
    site: str
    diagnosis: Diagnosis
    fd_mm: float
    """Intended mean framewise displacement."""
    structure: tuple[float, ...] = Field(min_length=len(TRAITS), max_length=len(TRAITS))
    """Traits, as in TRAITS: what the cortex follows."""
    function: tuple[float, ...] = Field(min_length=len(TRAITS), max_length=len(TRAITS))
    """What connectivity follows: correlated with `structure` by COUPLING."""
    thickness: tuple[float, ...]
    """By region, as in DESIKAN_KILLIANY: share of the MNI152 average."""
    area: tuple[float, ...]


def network_of_regions() -> np.ndarray:
    """Return the place in NETWORKS of each region of DESIKAN_KILLIANY, (68,) int."""
    place = {region: n for n, regions in enumerate(NETWORKS.values()) for region in regions}
    return np.array([place[bare_region(name)] for name in DESIKAN_KILLIANY])


def shift_of(diagnosis: str) -> np.ndarray:
    """Return by how much a diagnosis moves each trait, (8,) in standard deviations."""
    sign, moved = {
        "control": (0.0, ()),
        "hypoconnected": (-1.0, HYPOCONNECTED),
        "hyperconnected": (1.0, HYPERCONNECTED),
    }[diagnosis]
    return np.array([sign * TRAIT_D * (name in moved) for name in TRAITS])


def draw_connectivity_traits(seed: int, subject: int, patients: bool) -> ConnectivityTraits:
    """Draw the traits of a subject: a function of seed and subject number alone.

    patients: a third each is a control, hypoconnected and hyperconnected; else all are controls. Categories come in
    permuted blocks.
    """
    stream = [seed, 3]  # 0, 1 and 2 are those of the other cohorts
    diagnosis = in_permuted_block(PATIENT_BLOCK, subject, stream, 2) if patients else "control"
    sex = in_permuted_block(("M", "F", "M", "F"), subject, stream, 0)
    rng = np.random.default_rng([*stream, subject, 0])
    age = round(float(rng.uniform(*AGE_RANGE_YEARS)), 1)
    shared, own = rng.standard_normal((2, len(TRAITS)))
    log_fd = np.log(FD_MEDIAN_MM) + FD_LOG_SD * float(np.clip(rng.standard_normal(), -2.5, 2.5))
    noise = np.clip(rng.standard_normal((2, len(DESIKAN_KILLIANY))), -2.5, 2.5)
    shift = shift_of(diagnosis)
    structure = np.clip(shared + shift, -TRAIT_MAX, TRAIT_MAX)
    function = COUPLING * shared + np.sqrt(1 - COUPLING**2) * own + shift
    thickness, area = _cortex(structure, age, sex, noise)
    return ConnectivityTraits.model_validate(
        {
            "age": age,
            "sex": sex,
            "site": in_permuted_block(SITES, subject, stream, 1),
            "diagnosis": diagnosis,
            "fd_mm": float(np.exp(log_fd + FD_LOG_PATIENTS * (diagnosis != "control"))),
            "structure": tuple(structure.tolist()),
            "function": tuple(np.clip(function, -TRAIT_MAX, TRAIT_MAX).tolist()),
            "thickness": tuple(thickness.tolist()),
            "area": tuple(area.tolist()),
        }
    )


def _cortex(structure: np.ndarray, age: float, sex: str, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return thickness and area of each region as shares of the average, (68,) each."""
    own, whole = structure[network_of_regions()], structure[TRAITS.index(GLOBAL)]
    thickness = 1 + THICKNESS_PER_TRAIT * own + THICKNESS_PER_GLOBAL * whole
    thickness += THICKNESS_PER_YEAR * (age - AGE_MEAN_YEARS) + THICKNESS_SD_REGION * noise[0]
    area = 1 + AREA_PER_TRAIT * own + AREA_PER_GLOBAL * whole
    area += AREA_SEX_DIFFERENCE * (0.5 if sex == "M" else -0.5) + AREA_SD_REGION * noise[1]
    return THICKNESS_MEAN * thickness, AREA_MEAN * area
