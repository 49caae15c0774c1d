"""From tissue fractions to signal: one table of relative intensities for the eight modalities.

Values are what the modalities look like after common scaling (white matter about 0.9 in t1), chosen by eye after the
usual radiological description of each sequence; they are not relaxometry. `adc` is diffusivity (CSF is brightest);
`dwi` is the trace image at b = 1000 s/mm^2 (stroke is bright, its adc dark); `mra` is time-of-flight (bright vessels).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tasks.phantom.anatomy import Atlas, medial_temporal_weight
from tasks.phantom.effects import Traits

Array = np.ndarray[Any, np.dtype[Any]]

TISSUES = ("grey", "white", "csf", "oedema", "enhancing", "necrosis", "stroke", "schwannoma")

_TABLE = {
    "t1": (0.62, 0.88, 0.24, 0.52, 0.56, 0.32, 0.50, 0.56),
    "t1c": (0.64, 0.88, 0.25, 0.54, 1.20, 0.34, 0.52, 1.25),
    "t2": (0.58, 0.42, 1.00, 0.86, 0.70, 0.94, 0.84, 0.80),
    "flair": (0.60, 0.48, 0.10, 0.98, 0.80, 0.42, 0.94, 0.74),
    "pd": (0.84, 0.70, 0.92, 0.96, 0.90, 0.94, 0.96, 0.92),
    "mra": (0.24, 0.20, 0.10, 0.20, 0.32, 0.14, 0.17, 0.34),
    "dwi": (0.60, 0.52, 0.14, 0.56, 0.72, 0.28, 1.25, 0.58),
    "adc": (0.28, 0.26, 1.00, 0.48, 0.36, 0.80, 0.14, 0.46),
}
INTENSITY: dict[str, dict[str, float]] = {
    modality: dict(zip(TISSUES, values, strict=True)) for modality, values in _TABLE.items()
}
"""Relative intensity by modality and tissue."""

VESSEL: dict[str, float] = {"t1c": 1.25, "mra": 1.0}
"""Intensity of vessels where they are visible."""

TEXTURE_SHARE = 0.035
"""Amplitude of the subject's own texture, relative to the signal."""
TEXTURE_WAVES = 24
TEXTURE_WAVELENGTH_MM = (14.0, 45.0)


@dataclass(frozen=True)
class Tissue:
    """Tissue fractions at n points; grey + white + csf = 1."""

    grey: Array
    white: Array
    csf: Array


def tissue_at(points: Array, traits: Traits, atlas: Atlas) -> Tissue:
    """Return a subject's tissue at template points (3, n) mm inside the brain, after loss of grey matter."""
    grey, white = atlas.sample("grey", points), atlas.sample("white", points)
    kept = grey
    if traits.grey_loss:
        kept = kept * (1 - np.minimum(traits.grey_loss * atlas.sample("cortex", points), 0.9))
    if traits.medial_temporal_loss:
        kept = kept * (1 - traits.medial_temporal_loss * medial_temporal_weight(points))
    return Tissue(kept, white, np.clip(1 - kept - white, 0, 1))


def signal(modality: str, tissue: Tissue, vessels: Array) -> Array:
    """Return the noiseless relative intensity (n,) of healthy tissue; raises KeyError for an unknown modality."""
    level = INTENSITY[modality]
    value = level["grey"] * tissue.grey + level["white"] * tissue.white + level["csf"] * tissue.csf
    if modality in VESSEL:
        value = value + vessels * (VESSEL[modality] - value)
    return value


def texture(points: Array, rng: np.random.Generator) -> Array:
    """Return a smooth random field (n,) with standard deviation 1 at subject points (3, n) mm: a sum of plane waves."""
    directions = rng.normal(size=(TEXTURE_WAVES, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    waves = directions * (2 * np.pi / rng.uniform(*TEXTURE_WAVELENGTH_MM, size=(TEXTURE_WAVES, 1)))
    phases = rng.uniform(0, 2 * np.pi, TEXTURE_WAVES)
    field = np.zeros(points.shape[1], np.float32)
    for wave, phase in zip(waves.astype(np.float32), phases.astype(np.float32), strict=True):
        field += np.sin(wave @ points + phase)
    return field * np.float32(np.sqrt(2 / TEXTURE_WAVES))
