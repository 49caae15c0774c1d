"""Names of regional descriptors: measures with their units, and the cortical regions of two FreeSurfer atlases.

Regions are in the order of FreeSurfer's colour tables (`lh.aparc.stats`, `lh.aparc.a2009s.stats`), the left hemisphere
first, and called `lh_bankssts`. Sources: Desikan et al. 2006 (NeuroImage 31:968), Destrieux et al. 2010 (53:1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from models.reasons import Reason

Atlas = Literal["desikan_killiany", "destrieux"]
Basis = Literal["freesurfer", "cat12", "approximate"]
"""Which software measured; `approximate`: our own estimate from tissue maps, never comparable with the others."""

MEASURES: tuple[str, ...] = ("cortical_thickness_mm", "grey_matter_volume_mm3", "surface_area_mm2")
"""CT, GMV, SA: the order of AnatCL's descriptors."""

_DESIKAN_KILLIANY = """
bankssts caudalanteriorcingulate caudalmiddlefrontal cuneus entorhinal fusiform inferiorparietal inferiortemporal
isthmuscingulate lateraloccipital lateralorbitofrontal lingual medialorbitofrontal middletemporal parahippocampal
paracentral parsopercularis parsorbitalis parstriangularis pericalcarine postcentral posteriorcingulate precentral
precuneus rostralanteriorcingulate rostralmiddlefrontal superiorfrontal superiorparietal superiortemporal supramarginal
frontalpole temporalpole transversetemporal insula
"""
_DESTRIEUX = """
G_and_S_frontomargin G_and_S_occipital_inf G_and_S_paracentral G_and_S_subcentral G_and_S_transv_frontopol
G_and_S_cingul-Ant G_and_S_cingul-Mid-Ant G_and_S_cingul-Mid-Post G_cingul-Post-dorsal G_cingul-Post-ventral G_cuneus
G_front_inf-Opercular G_front_inf-Orbital G_front_inf-Triangul G_front_middle G_front_sup G_Ins_lg_and_S_cent_ins
G_insular_short G_occipital_middle G_occipital_sup G_oc-temp_lat-fusifor G_oc-temp_med-Lingual G_oc-temp_med-Parahip
G_orbital G_pariet_inf-Angular G_pariet_inf-Supramar G_parietal_sup G_postcentral G_precentral G_precuneus G_rectus
G_subcallosal G_temp_sup-G_T_transv G_temp_sup-Lateral G_temp_sup-Plan_polar G_temp_sup-Plan_tempo G_temporal_inf
G_temporal_middle Lat_Fis-ant-Horizont Lat_Fis-ant-Vertical Lat_Fis-post Pole_occipital Pole_temporal S_calcarine
S_central S_cingul-Marginalis S_circular_insula_ant S_circular_insula_inf S_circular_insula_sup S_collat_transv_ant
S_collat_transv_post S_front_inf S_front_middle S_front_sup S_interm_prim-Jensen S_intrapariet_and_P_trans
S_oc_middle_and_Lunatus S_oc_sup_and_transversal S_occipital_ant S_oc-temp_lat S_oc-temp_med_and_Lingual
S_orbital_lateral S_orbital_med-olfact S_orbital-H_Shaped S_parieto_occipital S_pericallosal S_postcentral
S_precentral-inf-part S_precentral-sup-part S_suborbital S_subparietal S_temporal_inf S_temporal_sup
S_temporal_transverse
"""
HEMISPHERES: tuple[str, str] = ("lh", "rh")
NO_CORTEX = frozenset({"unknown", "corpuscallosum", "medial_wall", "cortex"})
"""Names, in lower case, that FreeSurfer's tables hold beside regions; they are passed over."""


def _both(names: str) -> tuple[str, ...]:
    return tuple(f"{side}_{name}" for side in HEMISPHERES for name in names.split())


DESIKAN_KILLIANY: tuple[str, ...] = _both(_DESIKAN_KILLIANY)
"""68 regions."""
DESTRIEUX: tuple[str, ...] = _both(_DESTRIEUX)
"""148 regions."""
ATLASES: dict[Atlas, tuple[str, ...]] = {"desikan_killiany": DESIKAN_KILLIANY, "destrieux": DESTRIEUX}

Floats = npt.NDArray[np.float32]


def bare_region(name: str) -> str:
    """Return the name of a region without its hemisphere."""
    return name.split("_", 1)[1]


class DescriptorError(ValueError):
    """Descriptors that cannot be used; `reason` says which rule they broke."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Plausible:
    """What a measure of healthy or diseased human cortex can be, in its unit."""

    region: tuple[float, float]
    """Of any single region."""
    median: tuple[float, float]
    """Of the median over the regions of one person: wrong units show here, whatever the region."""
    per_cm: float
    """What one centimetre (cm2, cm3) is in the measure's unit."""


# FreeSurfer bounds thickness by 5 mm; a small sulcus of Destrieux may have a few vertices, hence the low ends.
PLAUSIBLE: dict[str, Plausible] = {
    "cortical_thickness_mm": Plausible((0.5, 6.0), (1.0, 5.0), 10.0),
    "grey_matter_volume_mm3": Plausible((0.5, 100_000.0), (200.0, 50_000.0), 1000.0),
    "surface_area_mm2": Plausible((0.5, 50_000.0), (80.0, 20_000.0), 100.0),
}


def canonical_region(name: str, atlas: Atlas, hemisphere: str = "") -> str:
    """Return our name of a region, e.g. `lh_bankssts` of `lh-bankssts` or of `bankssts` with hemisphere lh.

    FreeSurfer's tables write `&` where its colour tables write `_and_`. Empty for what is no cortical region
    (NO_CORTEX). Raises DescriptorError for a name that the atlas does not know.
    """
    plain = name.strip().replace("&", "_and_").lower()
    for prefix in ("ctx-", "ctx_"):
        plain = plain.removeprefix(prefix)
    side = hemisphere
    if not side and plain[:2] in HEMISPHERES and plain[2:3] in ("-", "_", "."):
        side, plain = plain[:2], plain[3:]
    if plain in NO_CORTEX:
        return ""
    if found := _BY_LOWER[atlas].get(f"{side}_{plain}"):
        return found
    raise DescriptorError(
        Reason.DESCRIPTOR_REGIONS,
        f"region {name[:80]!r} is none of atlas {atlas}, whose names are {ATLASES[atlas][0]} ... {ATLASES[atlas][-1]}",
    )


_BY_LOWER: dict[Atlas, dict[str, str]] = {
    atlas: {name.lower(): name for name in names} for atlas, names in ATLASES.items()
}


def check_values(values: Mapping[str, Sequence[float | None]], atlas: Atlas, missing_max: int = 0) -> None:
    """Refuse descriptors that are no measures of a human cortex in their units.

    values: by measure, one per region of the atlas in its order; None: not measured. missing_max: regions that may lack
    a measure. Raises DescriptorError: an unknown measure, a wrong number of regions, too many missing ones, values that
    are not finite, not positive or not plausible, and medians that look like centimetres.
    """
    if not values:
        raise DescriptorError(Reason.DESCRIPTOR_MEASURES, f"no measure; use some of {', '.join(MEASURES)}")
    for measure, row in values.items():
        if measure not in PLAUSIBLE:
            raise DescriptorError(
                Reason.DESCRIPTOR_MEASURES, f"unknown measure {measure[:80]!r}; use some of {', '.join(MEASURES)}"
            )
        if len(row) != len(ATLASES[atlas]):
            raise DescriptorError(
                Reason.DESCRIPTOR_REGIONS, f"{measure}: {len(row)} regions, atlas {atlas} has {len(ATLASES[atlas])}"
            )
        _check_measure(measure, row, atlas, missing_max)


def _check_measure(measure: str, row: Sequence[float | None], atlas: Atlas, missing_max: int) -> None:
    there = {name: float(value) for name, value in zip(ATLASES[atlas], row, strict=True) if value is not None}
    absent = [name for name, value in zip(ATLASES[atlas], row, strict=True) if value is None]
    if len(absent) > missing_max:
        shown = ", ".join(absent[:5]) + (" ..." if len(absent) > 5 else "")
        raise DescriptorError(
            Reason.DESCRIPTOR_REGIONS,
            f"{measure}: {len(absent)} of {len(row)} regions are missing ({shown}), {missing_max} may be; measure "
            "them, or raise missing_regions of the source",
        )
    if bad := next(((name, value) for name, value in there.items() if not np.isfinite(value) or value <= 0), None):
        raise DescriptorError(
            Reason.DESCRIPTOR_VALUES, f"{measure} of {bad[0]} is {bad[1]:g}; it must be a positive number"
        )
    _check_plausible(measure, there)


def _check_plausible(measure: str, there: Mapping[str, float]) -> None:
    rule = PLAUSIBLE[measure]
    median = float(np.median(list(there.values()))) if there else rule.median[0]
    if not rule.median[0] <= median <= rule.median[1]:
        hint = "; it looks like centimetres" if rule.median[0] <= median * rule.per_cm <= rule.median[1] else ""
        raise DescriptorError(
            Reason.DESCRIPTOR_UNITS,
            f"the median of {measure} is {median:.4g}, plausible are {rule.median[0]:g} to {rule.median[1]:g}{hint}; "
            "give it in the unit of its name",
        )
    low, high = rule.region
    if odd := next(((name, value) for name, value in there.items() if not low <= value <= high), None):
        raise DescriptorError(
            Reason.DESCRIPTOR_UNITS,
            f"{measure} of {odd[0]} is {odd[1]:.4g}, plausible are {low:g} to {high:g}; are units mixed?",
        )
