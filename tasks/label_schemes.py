"""What label values mean: regions by scheme. Years of one dataset give one number two meanings."""

from __future__ import annotations

from collections.abc import Iterable

from models.config import Region


def _regions(**labels: tuple[int, ...]) -> tuple[Region, ...]:
    return tuple(Region(name=name, labels=values) for name, values in labels.items())


# One table for every dataset, never a constant in code: enhancing tumour is 4 up to 2021, 3 in 2023 and 1 in later PED.
LABEL_SCHEMES: dict[str, tuple[Region, ...]] = {
    "brats2021": _regions(ET=(4,), TC=(1, 4), WT=(1, 2, 4)),
    "brats2023": _regions(ET=(3,), TC=(1, 3), WT=(1, 2, 3)),
    "brats-ped2024": _regions(ET=(1,), TC=(1, 2, 3), WT=(1, 2, 3, 4)),
    "stroke": _regions(stroke=(1,)),
    "schwannoma": _regions(schwannoma=(1,)),
    "mrbrains13": _regions(CSF=(1,), GM=(2,), WM=(3,)),
}


def find_scheme(name: str) -> tuple[Region, ...]:
    """Return the regions of a label scheme; raises KeyError listing the known schemes."""
    try:
        return LABEL_SCHEMES[name]
    except KeyError:
        raise KeyError(f"unknown label scheme {name!r}; known: {', '.join(LABEL_SCHEMES)}") from None


def scheme_labels(name: str) -> set[int]:
    """Return every label value that a scheme knows, background (0) included."""
    return {0}.union(*(region.labels for region in find_scheme(name)))


def scheme_conflict(values: Iterable[int], scheme: str) -> str:
    """Return what is wrong with label values for a scheme, with what to do; empty when nothing is or it is not known.

    BraTS calls enhancing tumour 4 up to 2021, then 3.
    """
    unknown = sorted(set(values) - scheme_labels(scheme)) if scheme in LABEL_SCHEMES else []
    if not unknown:
        return ""
    return (
        f"label values {unknown} are outside scheme {scheme!r}, which knows {sorted(scheme_labels(scheme))} only; "
        "correct label_scheme of the source, build the catalog again and preprocess with retry_quarantined"
    )
