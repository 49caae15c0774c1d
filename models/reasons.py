"""Why something cannot be used, in the words of catalogs, quarantines and reports."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why a scan was left out of the catalog, or a case put into quarantine."""

    UNREADABLE = "unreadable"
    MISSING_FILE = "missing file"
    UNKNOWN_MODALITY = "unknown modality"
    DUPLICATE_SCAN = "duplicate scan"
    OUTSIDE_ROOT = "outside root"
    UNMATCHED = "matches no pattern"
    BAD_ID = "unusable id"
    NOT_3D = "not 3D"
    NOT_FINITE = "not finite"
    CONSTANT = "constant image"
    EMPTY = "empty image"
    BAD_AFFINE = "bad affine"
    NO_OVERLAP = "grids do not overlap"
    LABEL_SHAPE = "label shape mismatch"
    LABEL_VALUES = "label values"
    NO_SCAN = "no usable scan"
    TOO_LARGE = "does not fit the grid"
    NOT_MNI = "not in MNI space"
    NO_MASK = "no brain mask"
    REGISTRATION = "registration failed"
    TISSUE = "tissues not separable"
    ARRAY_SHAPE = "unknown array shape"
    INTENSITIES = "intensities out of range"
    DESCRIPTOR_MEASURES = "descriptor measures"
    DESCRIPTOR_REGIONS = "descriptor regions"
    DESCRIPTOR_UNITS = "descriptor units"
    DESCRIPTOR_VALUES = "descriptor values"
    DESCRIPTOR_ATLAS = "descriptors of another atlas"
    ONE_HEMISPHERE = "one hemisphere"
    MEMORY = "memory refused"
    KILLED_WORKER = "killed the worker"
