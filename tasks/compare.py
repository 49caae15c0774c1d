"""How two stores differ: spec, datasets, cases, digests, and on request the voxels themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field

from models.records import Record
from models.spec import PreprocessSpec
from models.store import Store, open_store

CaseName = tuple[str, str]
"""Dataset and case."""


class VoxelDifference(Record):
    """Largest absolute differences of one case; a modality or label in one store only counts as the whole of it."""

    modalities: dict[str, float]
    label_voxels: int = 0
    """Voxels with another label."""
    descriptors: bool = False
    """Whether the regional descriptors differ."""
    connectome: bool = False
    """Whether the connectomes differ."""
    shifted: str = ""
    """What differs of extent, origin and affine; with different extents voxels cannot be compared."""

    def sentence(self) -> str:
        """Return all of it in one line."""
        gaps = ", ".join(f"{modality} {gap:g}" for modality, gap in self.modalities.items() if gap)
        parts = [f"largest difference {gaps}"] if gaps else []
        parts += [f"{self.label_voxels} label voxels differ"] if self.label_voxels else []
        parts += ["descriptors differ"] if self.descriptors else []
        parts += ["connectomes differ"] if self.connectome else []
        parts += [f"differs in {self.shifted}"] if self.shifted else []
        return "; ".join(parts) or "same voxels, but another set of present modalities or labels"


class Comparison(Record):
    """What differs between the stores a and b; cases are `dataset/case`."""

    spec: dict[str, tuple[Any, Any]]
    """By field of the spec: value in a, value in b."""
    datasets_only_a: tuple[str, ...]
    datasets_only_b: tuple[str, ...]
    cases_only_a: tuple[str, ...]
    cases_only_b: tuple[str, ...]
    changed: tuple[str, ...]
    """Cases of both stores whose digests differ."""
    same: int
    """Cases whose digests agree."""
    voxels: dict[str, VoxelDifference] = Field(default_factory=dict)
    """Of the changed cases, when asked for."""

    @property
    def equal(self) -> bool:
        """Say whether the stores hold the same content."""
        differing = (self.spec, self.datasets_only_a, self.datasets_only_b, self.cases_only_a, self.cases_only_b)
        return not (any(differing) or self.changed)

    def sentences(self, shown: int) -> list[str]:
        """Return what a person wants to read: at most `shown` names of each kind."""
        out = [f"spec: {key} is {one!r} in A, {other!r} in B" for key, (one, other) in self.spec.items()]
        for what, names in (
            ("datasets only in A", self.datasets_only_a),
            ("datasets only in B", self.datasets_only_b),
            ("cases only in A", self.cases_only_a),
            ("cases only in B", self.cases_only_b),
            ("cases with different digests", self.changed),
        ):
            if names:
                more = f" and {len(names) - shown} more" if len(names) > shown else ""
                out.append(f"{what} ({len(names)}): {', '.join(names[:shown])}{more}")
        out += [f"{case}: {gap.sentence()}" for case, gap in list(self.voxels.items())[:shown]]
        return [*out, f"{self.same} cases are the same; the stores {'are equal' if self.equal else 'differ'}"]


def compare(a: str, b: str, voxels: bool = False) -> Comparison:
    """Compare the stored cases of two stores by name and digest; voxels: also how far the changed ones are apart.

    Raises StoreError when one is no finalised store.
    """
    first, second = open_store(a), open_store(b)
    lines_a, lines_b = _stored(first), _stored(second)
    changed = sorted(name for name in lines_a.keys() & lines_b if lines_a[name]["digest"] != lines_b[name]["digest"])
    return Comparison(
        spec=_differing(first.spec, second.spec),
        datasets_only_a=tuple(sorted(set(first.datasets) - set(second.datasets))),
        datasets_only_b=tuple(sorted(set(second.datasets) - set(first.datasets))),
        cases_only_a=_names(lines_a.keys() - lines_b),
        cases_only_b=_names(lines_b.keys() - lines_a),
        changed=_names(set(changed)),
        same=len(lines_a.keys() & lines_b) - len(changed),
        voxels={"/".join(name): _voxels(first, second, lines_a[name], lines_b[name]) for name in changed if voxels},
    )


def _stored(store: Store) -> dict[CaseName, dict[str, Any]]:
    table = store.cases().select(["dataset", "case", "row", "digest", "status"])
    return {(line["dataset"], line["case"]): line for line in table.to_pylist() if line["status"] == "stored"}


def _names(pairs: set[CaseName]) -> tuple[str, ...]:
    return tuple(sorted("/".join(pair) for pair in pairs))


def _differing(a: PreprocessSpec, b: PreprocessSpec) -> dict[str, tuple[Any, Any]]:
    one, other = a.model_dump(mode="json"), b.model_dump(mode="json")
    return {key: (one[key], other[key]) for key in one if one[key] != other[key]}


def _voxels(first: Store, second: Store, line_a: dict[str, Any], line_b: dict[str, Any]) -> VoxelDifference:
    data_a, data_b = first.dataset(line_a["dataset"]), second.dataset(line_b["dataset"])
    info_a, info_b = data_a.case_info(line_a["row"]), data_b.case_info(line_b["row"])
    if info_a.extent != info_b.extent:
        return VoxelDifference(modalities={}, shifted=f"extent {info_a.extent} and {info_b.extent}")
    shifted = "" if info_a.origin == info_b.origin else f"origin {info_a.origin} and {info_b.origin}"
    if not np.array_equal(info_a.affine, info_b.affine):
        shifted = f"{shifted}, affine" if shifted else "affine"
    (image_a, label_a), (image_b, label_b) = data_a.read_case(line_a["row"]), data_b.read_case(line_b["row"])
    channels_a = dict(zip(first.spec.modalities, image_a, strict=True))
    channels_b = dict(zip(second.spec.modalities, image_b, strict=True))
    names = sorted(channels_a.keys() | channels_b)
    return VoxelDifference(
        modalities={name: round(_largest(channels_a.get(name), channels_b.get(name)), 6) for name in names},
        label_voxels=_label_gap(label_a, label_b),
        descriptors=data_a.descriptor_bytes(line_a["row"]) != data_b.descriptor_bytes(line_b["row"]),
        connectome=data_a.connectome_bytes(line_a["row"]) != data_b.connectome_bytes(line_b["row"]),
        shifted=shifted,
    )


def _largest(one: np.ndarray | None, other: np.ndarray | None) -> float:
    """Return max |a - b|; a channel that is absent counts as zeros."""
    there = [np.asarray(c, np.float32) for c in (one, other) if c is not None]
    return float(np.abs(there[0] - (there[1] if len(there) == 2 else 0)).max(initial=0))


def _label_gap(one: np.ndarray | None, other: np.ndarray | None) -> int:
    there = [label for label in (one, other) if label is not None]
    if not there:
        return 0
    return int(np.count_nonzero(there[0] != (there[1] if len(there) == 2 else 0)))
