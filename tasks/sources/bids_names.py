"""BIDS file names taken apart, and what the image behind a name is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from models.records import BRAIN_MASK, LABEL, UnknownModalityError
from tasks.headers import stem
from tasks.sources.base import SourceBase

ENTITY = re.compile(r"^([a-zA-Z]+)-([a-zA-Z0-9]+)$")
MASK_SUFFIXES = ("dseg", "mask", "msk")
"""The last is no suffix of BIDS: ISLES 2022 writes it."""
SEGMENTATION_SUFFIXES = (*MASK_SUFFIXES, "probseg")
ANATOMICAL_MASKS = frozenset({"brain", "head", "skull", "aseg", "aparcaseg", "tissue"})
"""Values of `desc` or `label` that mark a segmentation of anatomy, not of a lesion."""
ROLE_ENTITIES = frozenset({"desc", "label"})
"""Entities that say what a segmentation shows; the others say which image it belongs to."""


@dataclass(frozen=True)
class BidsName:
    """A BIDS file name, taken apart."""

    entities: dict[str, str]
    suffix: str

    @property
    def subject(self) -> str:
        """`sub-<label>`, or empty."""
        return f"sub-{self.entities['sub']}" if "sub" in self.entities else ""

    @property
    def session(self) -> str:
        """`ses-<label>`, or empty."""
        return f"ses-{self.entities['ses']}" if "ses" in self.entities else ""

    @property
    def roles(self) -> set[str]:
        """What `desc` and `label` say, in lower case."""
        return {self.entities[name].lower() for name in ROLE_ENTITIES if name in self.entities}

    def fits(self, wanted: Mapping[str, str], without: frozenset[str] = frozenset()) -> bool:
        """Return whether the entities have the wanted values; an empty value asks for the entity to be absent."""
        return all(self.entities.get(name, "") == value for name, value in wanted.items() if name not in without)


def parse_name(name: str) -> BidsName:
    """Take a file name apart: `sub-1_ce-gd_T1w.nii.gz` -> entities sub, ce and suffix T1w."""
    *pieces, suffix = stem(name).split("_")
    entities = {match[1]: match[2] for match in map(ENTITY.match, pieces) if match}
    return BidsName(entities, suffix)


def modality_of(name: BidsName, source: SourceBase) -> str:
    """Return the canonical modality of an image; raises UnknownModalityError saying which rule failed.

    `ce-*_T1w` is t1c, `desc-adc_dwi` is adc. Another contrast-enhanced suffix or a phase image is refused: it is not
    the contrast that its suffix names.
    """
    if name.entities.get("part", "mag") != "mag":
        raise UnknownModalityError(f"part-{name.entities['part']} is not a magnitude image")
    if name.suffix == "dwi" and "adc" in name.roles:
        return source.resolve("adc")
    modality = source.resolve(name.suffix)
    if "ce" not in name.entities or modality == "t1c":
        return modality
    if modality == "t1":
        return "t1c"
    raise UnknownModalityError(f"contrast-enhanced {name.suffix} (ce-{name.entities['ce']}) has no modality of its own")


def mask_kind(name: BidsName) -> str:
    """Return `label` for a segmentation of a lesion, `brain_mask` for a brain mask, empty for other anatomy."""
    if name.suffix == "mask" and "brain" in name.roles:
        return BRAIN_MASK
    return LABEL if name.suffix in MASK_SUFFIXES and not name.roles & ANATOMICAL_MASKS else ""


def natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts run-2 before run-10, and dseg before mask."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", name)]
