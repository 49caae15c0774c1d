"""A phantom cohort made from real anatomy: deformed MNI152 brains with known lesions, ages and diagnoses."""

from __future__ import annotations

from tasks.phantom.cohort import write_cohort
from tasks.phantom.config import DEMO, PRESETS, TINY, LesionShares, PhantomConfig
from tasks.phantom.folder import DifferentCohortError
from tasks.phantom.layout import CohortPaths, cohort_paths

__all__ = [
    "DEMO",
    "PRESETS",
    "TINY",
    "CohortPaths",
    "DifferentCohortError",
    "LesionShares",
    "PhantomConfig",
    "cohort_paths",
    "write_cohort",
]
