"""Deliberately broken files: what each fault does to a file, and the reason that a reader must give for it.

Every fault has a subject of its own, normal in all other respects and on top of the healthy ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.records import Reason
from tasks.phantom.acquire import Volume
from tasks.phantom.config import Kind, PhantomConfig
from tasks.phantom.layout import BROKEN_FROM, Place, bids_place, datalist_place

Array = np.ndarray[Any, np.dtype[Any]]

NAN_SHARE = 0.3
LABEL = "label"


@dataclass(frozen=True)
class Fault:
    """One way to break one file."""

    name: str
    place: Place
    modality: str
    """Which file; `label` for the mask."""
    reason: Reason
    """What a reader must say."""
    lesion: Kind | None
    """Lesion of the subject (a label fault needs one)."""
    breaking: Callable[[Volume], bytes | None]
    """Returns the broken file's bytes, or None for an absent file."""

    @property
    def file(self) -> str:
        """Path of the broken file, relative to the cohort's root."""
        return self.place.mask("tumour") if self.modality == LABEL else self.place.scan(self.modality)


def list_faults(config: PhantomConfig) -> tuple[Fault, ...]:
    """Return the faults of a cohort: five when config.broken, else none; a modality the cohort lacks is replaced."""
    if not config.broken:
        return ()
    names = config.modalities

    def modality(wish: str) -> str:
        return wish if wish in names else names[0]

    def bids(offset: int) -> Place:
        return bids_place(config, BROKEN_FROM + offset)

    absent = datalist_place(config, BROKEN_FROM, "brats")
    return (
        Fault("truncated gzip", bids(0), modality("t2"), Reason.UNREADABLE, None, _truncated),
        Fault("NaN voxels", bids(1), modality("flair"), Reason.NOT_FINITE, None, _not_finite),
        Fault("two volumes", bids(2), modality("t1c"), Reason.NOT_3D, None, _four_dimensional),
        Fault("label of another shape", bids(3), LABEL, Reason.LABEL_SHAPE, "tumour", _cropped),
        Fault("absent file", absent, "flair", Reason.MISSING_FILE, "tumour", _absent),
    )


def _truncated(volume: Volume) -> bytes:
    """The header and the first slices still read."""
    data = volume.to_bytes()
    return data[: len(data) * 6 // 10]


def _not_finite(volume: Volume) -> bytes:
    values = volume.stored.astype(np.float32) * np.float32(volume.slope) + np.float32(volume.intercept)
    values[: int(np.ceil(NAN_SHARE * len(values)))] = np.nan
    return Volume(values, volume.affine).to_bytes()


def _four_dimensional(volume: Volume) -> bytes:
    twice = np.stack([volume.stored, volume.stored], axis=-1)
    return Volume(twice, volume.affine, volume.slope, volume.intercept).to_bytes()


def _cropped(volume: Volume) -> bytes:
    return Volume(np.ascontiguousarray(volume.stored[:-3]), volume.affine).to_bytes()


def _absent(volume: Volume) -> None:
    return None
