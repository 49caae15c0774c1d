"""How age, sex, diagnosis and the positive control change anatomy: committed sizes, each with its source.

These numbers were fixed before any network was trained on a phantom. They are not parameters, and they are never tuned
so that a method wins. Standard deviations are between subjects; d is Cohen's d against the spread within a group.

Sources (numbers marked [abstract] were checked against the published abstract, [chosen] are ours, of plausible size):

Head size
    Ruigrok et al. 2014, Neurosci Biobehav Rev 39:34-50: men have larger brains on average (the volume difference of
    about 11 % used here is [chosen], near the usual reports). The MNI152 head is larger than the average one
    (Lancaster et al. 2007, Hum Brain Mapp 28:1194-1205); BASE_SCALE brings its 1.89 l to about 1.48 l [chosen].
Grey matter and age
    Hedman et al. 2012, Hum Brain Mapp 33:1987-2002: brain volume falls by 0.2 % a year after 35, by 0.5 % at 60
    [abstract]. We use 0.2 % of grey matter a year over the whole range, linear.
Ventricles and age
    Walhovd et al. 2011, Neurobiol Aging 32:916-932: lateral ventricles grow with age in every sample studied. The
    rate (1.2 % a year, doubling in 58 years) and the spread of log volume are [chosen].
Diagnosis: medial temporal atrophy, as in mild cognitive impairment
    Shi et al. 2009, Hippocampus 19:1055-1064 (meta-analysis): hippocampal volume in MCI against controls has effect
    size 0.92 (left) and 0.78 (right), a loss of 12.9 and 11.1 % [abstract]. Those are measured volumes, so ours are
    too: patients lose 13.5 % more grey matter in the middle of the region, about 12.5 % of its measured volume relative
    to the head, which is d = 0.8 against the spread that shape and general atrophy add. The cause itself is less hidden
    than the volume: d = 1.1 for the trait `medial_temporal_loss`.
Control group: large lateral ventricles, as in normal pressure hydrocephalus
    Miskin et al. 2017, Radiology 285:197-205: callosal angle and Evans index together tell NPH from AD and healthy
    people with an AUC of 0.96 (a d of about 2.5) [abstract]. We use d = 3 [chosen]: a method that misses it is broken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from models.records import Record
from tasks.phantom.config import SITES, LesionShares, PhantomConfig

AGE_RANGE_YEARS = (20.0, 85.0)
AGE_MEAN_YEARS = 52.5
AGE_SD_YEARS = (85.0 - 20.0) / math.sqrt(12.0)

BASE_SCALE = 0.92
"""Linear size of the mean subject's head relative to MNI152."""
HEAD_SCALE_SD = 0.028
SEX_SCALE_DIFFERENCE = 0.035
"""Linear, men minus women, relative: 1.035^3 - 1 = 11 % of volume; d = 1.25."""

GREY_LOSS_MEAN = 0.12
GREY_LOSS_PER_YEAR = 0.002
GREY_LOSS_SD = 0.045

VENTRICLE_LOG_PER_YEAR = 0.012
VENTRICLE_LOG_SD = 0.30
CONTROL_D = 3.0
CONTROL_LOG_SHIFT = CONTROL_D * math.hypot(VENTRICLE_LOG_PER_YEAR * AGE_SD_YEARS, VENTRICLE_LOG_SD)
"""Added to the log ventricular volume of the group `large`: 1.13, a factor of 3.1."""

DIAGNOSIS_D = 0.8
"""Intended for the measured medial temporal volume relative to the head (see docs/phantom.md for what came out)."""
DIAGNOSIS_LOSS = 0.135
"""What patients lose more than controls."""
MEDIAL_TEMPORAL_LOSS_MEAN = 0.20
MEDIAL_TEMPORAL_LOSS_SD = 0.12
"""Share of grey matter in the middle of the medial temporal regions, controls."""

GREY_LOSS_MAX = 0.4
VENTRICLE_LOG_RANGE = (-1.2, 2.0)
"""What the flow can do without folding; few subjects reach the ends."""
MEDIAL_TEMPORAL_LOSS_MAX = 0.7


class Traits(Record):
    """What was drawn for one subject before any voxel: labels that people see, and the hidden causes."""

    age: float
    """Years."""
    sex: Literal["M", "F"]
    site: str
    diagnosis: Literal["control", "patient"]
    control_group: Literal["small", "large"]
    lesion: Literal["none", "tumour", "stroke", "schwannoma"]
    head_scale: float = 1.0
    """Linear size relative to MNI152."""
    grey_loss: float = 0.0
    """Share of cortical grey matter replaced by CSF."""
    ventricle_log: float = 0.0
    """Intended log of the ventricular volume relative to a head of the same size."""
    medial_temporal_loss: float = 0.0
    """Share of medial temporal grey matter replaced by CSF, on top of grey_loss."""


def draw_traits(config: PhantomConfig, dataset: int, subject: int) -> Traits:
    """Draw the traits of a subject: a function of seed, data set and subject number alone.

    Categories come in permuted blocks, so that every prefix of the cohort is nearly balanced.
    """
    sex, site, diagnosis, group, kind = _categories(config, dataset, subject)
    rng = np.random.default_rng([config.seed, dataset, subject, 0])
    age = round(float(rng.uniform(*AGE_RANGE_YEARS)), 1)
    labels = {"age": age, "sex": sex, "site": site, "diagnosis": diagnosis, "control_group": group, "lesion": kind}
    z_scale, z_grey, z_ventricle, z_temporal = rng.standard_normal(4)
    if config.undeformed:
        return Traits.model_validate(labels)
    years = age - AGE_MEAN_YEARS
    sign = 0.5 if sex == "M" else -0.5
    grey = GREY_LOSS_MEAN + GREY_LOSS_PER_YEAR * years + GREY_LOSS_SD * z_grey
    ventricle = VENTRICLE_LOG_PER_YEAR * years + VENTRICLE_LOG_SD * z_ventricle
    temporal = MEDIAL_TEMPORAL_LOSS_MEAN + MEDIAL_TEMPORAL_LOSS_SD * z_temporal
    temporal += DIAGNOSIS_LOSS * (diagnosis == "patient")
    return Traits.model_validate(
        {
            **labels,
            "head_scale": BASE_SCALE * (1 + HEAD_SCALE_SD * _bounded(z_scale) + sign * SEX_SCALE_DIFFERENCE),
            "grey_loss": float(np.clip(grey, 0.0, GREY_LOSS_MAX)),
            "ventricle_log": float(np.clip(ventricle + CONTROL_LOG_SHIFT * (group == "large"), *VENTRICLE_LOG_RANGE)),
            "medial_temporal_loss": float(np.clip(temporal, 0.0, MEDIAL_TEMPORAL_LOSS_MAX)),
        }
    )


def _bounded(z: float) -> float:
    """Heads beyond 2.5 SD would leave the field of view."""
    return float(np.clip(z, -2.5, 2.5))


def in_permuted_block(block: Sequence[str], subject: int, seed: Sequence[int], variable: int) -> str:
    """Return a subject's value of a variable: each run of subjects as long as the block has all of its values."""
    rng = np.random.default_rng([*seed, subject // len(block), variable, 1])
    return block[int(rng.permutation(len(block))[subject % len(block)])]


def _categories(config: PhantomConfig, dataset: int, subject: int) -> tuple[str, str, str, str, str]:
    def draw(variable: int, block: list[str]) -> str:
        return in_permuted_block(block, subject, [config.seed, dataset], variable)

    shares = config.datalist_lesions if dataset else config.lesions
    return (
        draw(0, ["M", "F", "M", "F"]),
        draw(1, list(SITES)),
        draw(2, ["control", "patient"] * 2),
        draw(3, ["small", "large"] * 2),
        draw(4, lesion_block(shares)),
    )


def lesion_block(shares: LesionShares, size: int = 10) -> list[str]:
    """Return `size` kinds of lesion in the given shares (largest remainders)."""
    exact = {name: share * size for name, share in shares.model_dump().items()}
    exact["none"] = size - sum(exact.values())
    counts = {name: int(value + 1e-9) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: size - sum(counts.values())]:
        counts[name] += 1
    return [name for name, count in counts.items() for _ in range(count)]
