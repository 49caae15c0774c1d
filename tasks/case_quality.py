"""Finite numbers and flags of a prepared case for quality control: its channels, map of grey matter and label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from models.records import LABEL
from models.spec import PreprocessSpec
from tasks.intensity import noise, signal
from tasks.qc_voxels import base_of, drift_measure
from tasks.volumes import Box, Grid


def image_quality(
    image: np.ndarray,
    spec: PreprocessSpec,
    flags: Mapping[str, Mapping[str, Any]],
    ranges: Mapping[str, tuple[float, float]],
) -> dict[str, Any]:
    """Return measures of the channels of a case; image: (M, x, y, z) float16.

    flags: by modality that is there, the oddities of its file; ranges: intensities that became 0 and 1.
    """
    channels = {modality: image[spec.modalities.index(modality)] for modality in flags}
    tissue = np.zeros(image.shape[1:], dtype=np.int16)
    for channel in channels.values():
        np.bitwise_or(tissue, channel.view(np.int16), out=tissue)
    count = int(np.count_nonzero(tissue))
    qc: dict[str, Any] = {"foreground_share": round(count / tissue.size, 4)}
    for modality, channel in channels.items():
        total, above = signal(channel)
        sigma = noise(channel)
        base = base_of(ranges[modality])
        qc[f"snr_{modality}"] = round((total / above + base) / sigma, 3) if sigma > 0 else 0.0
        qc[f"mean_{modality}"] = round(total / count, 4)
        qc.update(drift_measure(channel, base, modality))
        qc.update({f"{flag}_{modality}": value for flag, value in flags[modality].items()})
    return qc


def grey_quality(channel: np.ndarray, target: Grid, box: Box) -> dict[str, Any]:
    """Return measures of a map of grey matter (x, y, z) that lies in a box of the template grid."""
    from tasks.anatomy import grey_measures  # here: only maps of grey matter need the template

    whole = np.zeros(target.shape, channel.dtype)
    whole[box] = channel
    return grey_measures(whole, target)


def label_quality(stored: np.ndarray, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return measures of a stored label (x, y, z) uint8."""
    counts = np.bincount(stored.ravel())
    values = [int(v) for v in np.flatnonzero(counts)]
    named = {f"{flag}_{LABEL}": value for flag, value in flags.items()}
    return {"label_voxels": int(counts[1:].sum()), "label_values": values, **named}
