"""The numbers of quality control: what is measured of a stored case, and reading them all without touching a voxel.

They come from the receipts (as folded into cases.parquet) and the store's small arrays; a few thousand cases take about
a second. What each measure means stands beside it in MEASURES and, in words for readers, in docs/qc.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from models.spec import PreprocessSpec
from models.store import open_store, read_cases
from models.store_connectomes import FRAMES
from models.store_layout import open_array

COLUMNS = ["dataset", "row", "case", "subject", "status", "modalities", "has_label", "extent", "qc"]
KEPT = "connectome_kept"
SMALLEST_LABEL_ML = 0.01
"""Labels are compared by ratio; below this one they count as equal."""


@dataclass(frozen=True)
class Measure:
    """One number of a case, or of each of its modalities when the words have a place for one."""

    name: str
    """Column, followed by `_<modality>` for one of a modality."""
    words: str
    bad: Literal["low", "high", "either"]
    """Which side counts as standing out."""
    floor: float
    """Smallest deviation that is worth a word: in units of the measure, or of its logarithm."""
    means: str
    by_ratio: bool = False
    """Compared by ratio: its logarithm is used."""
    unit: str = ""

    def column(self, modality: str = "") -> str:
        """Return the column of the measure for a modality."""
        return f"{self.name}_{modality}" if self.of_modality else self.name

    @property
    def of_modality(self) -> bool:
        """Say whether there is one number per modality."""
        return "{}" in self.words


MEASURES: tuple[Measure, ...] = (
    Measure(
        "snr", "SNR of {}", "low", 0.08,
        "mean of the voxels above zero over the noise, which is 1.05 times the median difference of neighbours along x "
        "(a robust standard deviation by the root of 2). Fine anatomy counts as noise: a lower bound.",
        by_ratio=True,
    ),
    Measure(
        "mean", "mean intensity of {}", "either", 0.03,
        "mean over the foreground after scaling: where the bulk of the histogram lies between the two percentiles.",
    ),
    Measure(
        "drift", "drift of intensity inside {}", "high", 0.015,
        "spread of the best quadratic field through the tissue's intensities as a share of their mean: a bias field.",
    ),
    Measure(
        "flat_end", "flat end of {}", "high", 0.05,
        "tissue in the outermost plane of one face as a share of the largest plane along that axis: a cut-off brain.",
    ),
    Measure(
        "outside_grid", "tissue of {} outside the grid", "high", 0.01,
        "share of the file's tissue that lies outside the spec's fixed grid and was cut off; for frame `template`.",
    ),
    Measure(
        "range", "source intensity range of {}", "either", 0.1,
        "distance of the intensities of the file that became 0 and 1: drift of gain between scans.",
        by_ratio=True,
    ),
    Measure(
        "offset", "source intensity offset of {}", "either", 0.1,
        "intensity of the file that became 0, as a share of that range: drift of offset between scans.",
    ),
    Measure(
        "voxel_mm", "largest voxel edge of {}", "either", 0.02,
        "of the file: thick slices.",
        by_ratio=True, unit=" mm",
    ),
    Measure(
        "view_mm", "smallest field of view of {}", "low", 0.05,
        "shortest edge of the file's grid.",
        by_ratio=True, unit=" mm",
    ),
    Measure(
        "foreground_share", "foreground share", "either", 0.03,
        "voxels above zero in any modality as a share of the stored box.",
        by_ratio=True,
    ),
    Measure(
        "foreground_ml", "foreground volume", "either", 0.03,
        "the same in millilitres: a lost part of the brain, or skull that was left.",
        by_ratio=True, unit=" ml",
    ),
    Measure(
        "label_ml", "label volume", "either", 0.3,
        "voxels of the segmentation that are not 0; an empty one is a fact of its own.",
        by_ratio=True, unit=" ml",
    ),
    Measure(
        "grey_ml", "grey-matter volume", "either", 0.05,
        "integral of a map of grey matter: the person's volume where the map is modulated.",
        by_ratio=True, unit=" ml",
    ),
    Measure(
        "grey_share", "grey-matter share", "either", 0.03,
        "voxels of a map of grey matter above 0.2 as a share of the MNI152 brain: a map on another scale, or smoothed.",
        by_ratio=True,
    ),
    Measure(
        "grey_prior", "correlation with MNI152 grey matter", "low", 0.02,
        "of a map of grey matter over the brain: a map that is turned, shifted or of another tissue has a low one.",
    ),
    Measure(
        "registration_correlation", "registration", "low", 0.02,
        "correlation with the template after registration.",
    ),
)  # fmt: skip

CONNECTOME_MEASURES: tuple[Measure, ...] = (
    Measure(
        FRAMES, "frames of the connectome", "low", 0.1,
        "frames that its matrix was made of, after scrubbing: few frames make noisy correlations.",
        by_ratio=True,
    ),
    Measure(
        KEPT, "share of frames kept", "low", 0.05,
        "of the frames in the file: the rest had too much motion, or were not steady yet.",
    ),
    Measure(
        "fd_mean_mm", "mean framewise displacement", "high", 0.1,
        "motion of the head from frame to frame, over all frames, as fMRIPrep measured it.",
        by_ratio=True, unit=" mm",
    ),
    Measure(
        "connectome_missing_regions", "regions without signal", "high", 1.0,
        "regions outside the field of view, or constant.",
    ),
    Measure(
        "connectome_mean_z", "mean of the connectome", "either", 0.02,
        "over all pairs of regions: signals that share something which was not removed have a high one.",
    ),
)  # fmt: skip
"""Only of stores whose spec has a connectome."""

FLAGS: dict[str, str] = {
    "nan_replaced": "{name}: {value} voxels were not finite and became 0",
    "negative_replaced": "{name}: {value} negative voxels became 0",
    "tissue": "{name}: {value} map, made here from a t1 (docs/anatomy.md)",
    "modulation": "{name}: modulation {value}",
    "affine_from": "{name}: affine from the {value}",
    "affine_defect": "{name}: {value}",
    "affine_conflict_mm": "{name}: sform and qform are up to {value} mm apart",
    "zooms_disagree": "{name}: voxel size of the header disagrees with its affine",
    "high_pass_absent": "{name}: its confounds have no cosines, so slow drift was not removed",
}
"""Flags of a receipt's `qc`, each followed by `_<modality>`, as words."""


@dataclass(frozen=True)
class Column:
    """One column of the values: a measure, and its modality when it has one."""

    measure: Measure
    modality: str = ""

    @property
    def name(self) -> str:
        """Column of the values."""
        return self.measure.column(self.modality)

    @property
    def words(self) -> str:
        """E.g. `SNR of t1`."""
        return self.measure.words.format(self.modality)

    def show(self, value: float) -> str:
        """Return a value with its unit."""
        return f"{value:.3g}{self.measure.unit}"


@dataclass(frozen=True)
class Measured:
    """All stored cases of a store, one line each, by dataset and row."""

    cases: pd.DataFrame
    """dataset, row, case, subject, modalities (list), has_label, extent, facts (kind -> words), faces (by modality),
    has_connectome."""
    values: pd.DataFrame
    """One column per measure (and modality), NaN where it was not measured; same index."""
    columns: dict[str, Column] = field(default_factory=dict)


def read_measures(url: str) -> Measured:
    """Return the measures of all stored cases. Raises StoreError for a store that cannot be read."""
    spec = open_store(url).spec
    lines = [line for line in read_cases(url, COLUMNS).to_pylist() if line["status"] == "stored"]
    lines.sort(key=lambda line: (line["dataset"], line["row"]))
    quality = [json.loads(line.pop("qc") or "{}") for line in lines]
    columns = _columns(spec)
    cases = pd.DataFrame(lines, columns=[name for name in COLUMNS if name not in {"status", "qc"}])
    facts = [dict(_facts(qc, line["has_label"])) for qc, line in zip(quality, lines, strict=True)]
    cases["facts"] = pd.Series(facts, index=cases.index, dtype=object)
    cases["has_connectome"] = [FRAMES in qc for qc in quality]
    cases["faces"] = pd.Series([_faces(qc) for qc in quality], index=cases.index, dtype=object)
    for qc in quality:
        if every := qc.get(f"{FRAMES}_all"):
            qc[KEPT] = qc[FRAMES] / every
    values = pd.DataFrame(
        [{name: value for name, value in qc.items() if name in columns} for qc in quality],
        columns=list(columns),
        index=cases.index,
        dtype=float,
    )
    for dataset, rows in cases.groupby("dataset").groups.items():
        _add_geometry(values, cases, quality, rows, url, str(dataset), spec)
    # A SNR of 0 says that there was nothing to measure the noise on; logarithms want what is above 0.
    ratios = [name for name, column in columns.items() if column.measure.by_ratio]
    values[ratios] = values[ratios].where(values[ratios] > 0)
    return Measured(cases, values.dropna(axis="columns", how="all"), columns)


def _columns(spec: PreprocessSpec) -> dict[str, Column]:
    wanted = [
        Column(measure, modality)
        for measure in (*MEASURES, *(CONNECTOME_MEASURES if spec.connectome else ()))
        for modality in (spec.modalities if measure.of_modality else ("",))
    ]
    return {column.name: column for column in wanted}


def _add_geometry(
    values: pd.DataFrame,
    cases: pd.DataFrame,
    quality: Sequence[dict[str, Any]],
    index: pd.Index,
    url: str,
    dataset: str,
    spec: PreprocessSpec,
) -> None:
    """Fill the measures of one dataset that follow from geometry."""
    rows = cases.loc[index, "row"].to_numpy()
    voxel_ml = np.abs(np.linalg.det(_small(url, dataset, "affine")[rows][:, :3, :3])) / 1000
    boxes = np.array(cases.loc[index, "extent"].tolist(), dtype=float).prod(axis=1)
    values.loc[index, "foreground_ml"] = values.loc[index, "foreground_share"].to_numpy() * boxes * voxel_ml
    labels = np.array([quality[place].get("label_voxels", 0) for place in index], dtype=float)
    values.loc[index, "label_ml"] = np.where(labels > 0, np.maximum(labels * voxel_ml, SMALLEST_LABEL_ML), np.nan)
    edges = np.linalg.norm(_small(url, dataset, "source_affine")[rows][..., :3, :3], axis=-2)
    views = (edges * _small(url, dataset, "source_shape")[rows]).min(axis=-1)
    low, high = np.moveaxis(_small(url, dataset, "intensity_range")[rows].astype(float), -1, 0)
    # Rows of absent modalities are all zero.
    here = high > low
    for place, modality in enumerate(spec.modalities):
        mine = here[:, place]
        if mine.any():
            width = high[:, place] - low[:, place]
            values.loc[index, f"range_{modality}"] = np.where(mine, width, np.nan)
            values.loc[index, f"offset_{modality}"] = np.where(mine, low[:, place] / np.where(mine, width, 1), np.nan)
            values.loc[index, f"voxel_mm_{modality}"] = np.where(mine, edges[:, place].max(axis=-1), np.nan)
            values.loc[index, f"view_mm_{modality}"] = np.where(mine, views[:, place], np.nan)


def _small(url: str, dataset: str, name: str) -> np.ndarray:
    return np.asarray(open_array(url, f"{dataset}/{name}")[:])


def _facts(qc: dict[str, Any], has_label: bool) -> Iterator[tuple[str, str]]:
    """Yield kind and words of what is no number."""
    for kind, value in sorted(qc.items()):
        flag = next((flag for flag in FLAGS if kind.startswith(f"{flag}_")), None)
        if flag is not None:
            yield kind, FLAGS[flag].format(name=kind.removeprefix(f"{flag}_"), value=value)
    if ignored := qc.get("ignored_modalities"):
        yield "ignored_modalities", f"not in the spec and left aside: {', '.join(ignored)}"
    if has_label and qc.get("label_voxels") == 0:
        yield "empty_label", "the label is empty"


def _faces(qc: dict[str, Any]) -> dict[str, str]:
    return {name.removeprefix("flat_face_"): face for name, face in qc.items() if name.startswith("flat_face_")}
