"""Everything that the quality report of a store shows, gathered once for HTML, CSV and Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import numpy as np
import pandas as pd

from models.records import LABEL
from models.store import Store, open_store, read_cases, store_digest
from models.store_connectomes import CONNECTOME
from tasks.duplicates import THRESHOLD, read_duplicates
from tasks.qc import mean_map, mosaics_of, shows_grey, worst_rows
from tasks.qc_chart import Strip, strips
from tasks.qc_connectomes import dataset_picture
from tasks.qc_measures import CONNECTOME_MEASURES, read_measures
from tasks.qc_outliers import OUTLIER_Z, Ranking, rank
from tasks.report import Picture

MOSAICS = 3
"""Per dataset, as the flow and the UI show them; a full-size case takes most of a second."""
SHOWN = frozenset(
    {
        *("snr", "foreground_share", "foreground_ml", "label_ml", "grey_ml", "grey_prior"),
        *(measure.name for measure in CONNECTOME_MEASURES),
    }
)
"""Measures in the table of cases; the CSV has all."""
STATUSES = ("stored", "quarantined", "retired")


@dataclass(frozen=True)
class DatasetQuality:
    """One dataset."""

    name: str
    counts: Mapping[str, int]
    """Rows by status."""
    ranked: str
    """A sentence on what could not be ranked, or empty."""
    modalities: list[dict[str, Any]]
    """One line per modality: how many cases have it, and the middle half of its measures."""
    facts: list[tuple[str, int]]
    """Flags in words of one case each, and how many cases have the like."""
    strips: list[Strip]
    cases: list[dict[str, Any]]
    """All stored cases, those that stand out first."""
    pictures: list[Picture] = field(default_factory=list)
    connectomes: Picture | None = None
    """What the connectomes of the dataset look like together."""

    @property
    def outliers(self) -> list[dict[str, Any]]:
        """The cases that stand out."""
        return [case for case in self.cases if case["why"]]


@dataclass(frozen=True)
class StoreQuality:
    """The whole report."""

    store: str
    """Last part of the URL: no folder of this machine is named."""
    digest: str
    spec: str
    datasets: list[DatasetQuality]
    quarantine: Sequence[Mapping[str, Any]]
    """Everything left out or quarantined: dataset, case, file, reason, detail."""
    pairs: list[dict[str, Any]]
    """Subjects that look alike: one, other, similarity."""
    ranking: Ranking

    @property
    def outliers(self) -> list[dict[str, Any]]:
        """The cases that stand out, of all datasets, the strangest first."""
        found = [{"dataset": dataset.name, **case} for dataset in self.datasets for case in dataset.outliers]
        return sorted(found, key=lambda case: -case["deviation"])

    def first_pictures(self, per_dataset: int) -> list[Picture]:
        """Return the first mosaics of each dataset, the worst of all datasets before the second of any.

        What the connectomes of a dataset look like together comes before all.
        """
        rounds = zip_longest(*(dataset.pictures[:per_dataset] for dataset in self.datasets))
        together = [dataset.connectomes for dataset in self.datasets]
        return [picture for one in (together, *rounds) for picture in one if picture is not None]


def gather(url: str, quarantine: Sequence[Mapping[str, Any]], mosaics: int = MOSAICS) -> StoreQuality:
    """Return the quality of a store. Only the cases that are drawn are read.

    quarantine: as tasks.qc.quarantine_table returns it. mosaics: how many cases of each dataset are drawn, the worst
    first. Raises StoreError for a store that cannot be read.
    """
    store, ranking = open_store(url), rank(read_measures(url))
    rows = read_cases(url, ["dataset", "status"]).to_pylist()
    counts = Counter((row["dataset"], row["status"]) for row in rows)
    pictures = _pictures(store, ranking, mosaics)
    return StoreQuality(
        store=url.rstrip("/").rsplit("/", 1)[-1],
        digest=store_digest(url),
        spec=f"{store.spec.name}, {store.spec.spacing_mm:g} mm",
        datasets=[
            _dataset(
                ranking,
                name,
                {status: counts[name, status] for status in STATUSES},
                pictures.get(name, []),
                dataset_picture(store, name, _motion(ranking, name)) if mosaics else None,
            )
            for name in sorted({row["dataset"] for row in rows})
        ],
        quarantine=quarantine,
        pairs=_pairs(url),
        ranking=ranking,
    )


def _pictures(store: Store, ranking: Ranking, count: int) -> dict[str, list[Picture]]:
    chosen = [(dataset, row) for dataset in ranking.datasets for row in worst_rows(ranking, dataset, count)]
    lines = {(case.dataset, case.row): case for case in ranking.cases.itertuples()}
    found: dict[str, list[Picture]] = {}
    if count and shows_grey(store.spec):
        for dataset in ranking.datasets:
            if mean := mean_map(store, dataset, [int(row) for row in ranking.of(dataset)["row"]]):
                found[dataset] = [Picture(mean[0], f"{dataset} mean map", f"mean grey matter of {mean[1]} cases")]
    for dataset, row, png in mosaics_of(store, chosen):
        case: Any = lines[dataset, row]
        usual = "does not stand out" if np.isfinite(case.score) else "not ranked"
        picture = Picture(png, f"{dataset} {case.case}", f"{case.case}: {next(iter(case.reasons), usual)}")
        found.setdefault(dataset, []).append(picture)
    return found


def _motion(ranking: Ranking, dataset: str) -> dict[int, float]:
    """Return the mean framewise displacement of the cases with a connectome, by row; NaN where it is unknown."""
    cases = ranking.of(dataset)
    cases = cases[cases["has_connectome"]]
    moved = ranking.values.get("fd_mean_mm")
    values = np.full(len(cases), np.nan) if moved is None else moved.loc[cases.index].to_numpy(float)
    return dict(zip((int(row) for row in cases["row"]), values.tolist(), strict=True))


def _dataset(
    ranking: Ranking, name: str, counts: Mapping[str, int], pictures: list[Picture], connectomes: Picture | None
) -> DatasetQuality:
    cases = ranking.of(name)
    values = ranking.values.loc[cases.index]
    kinds = Counter(kind for facts in cases["facts"] for kind in facts)
    words = {kind: text for facts in reversed(cases["facts"].tolist()) for kind, text in facts.items()}
    return DatasetQuality(
        name=name,
        counts=counts,
        ranked=ranking.unranked.get(name, ""),
        modalities=_by_modality(ranking, cases, values),
        facts=[(words[kind], count) for kind, count in kinds.most_common()],
        strips=strips(ranking, name),
        cases=_lines(ranking, cases, values),
        pictures=pictures,
        connectomes=connectomes,
    )


def _by_modality(ranking: Ranking, cases: pd.DataFrame, values: pd.DataFrame) -> list[dict[str, Any]]:
    present = Counter(modality for modalities in cases["modalities"] for modality in modalities)
    lines = []
    for modality in dict.fromkeys(c.modality for c in ranking.columns.values() if present[c.modality]):
        line: dict[str, Any] = {"modality": modality, "cases": present[modality]}
        for column in ranking.columns.values():
            if column.modality == modality and column.name in values and values[column.name].notna().any():
                low, high = (float(end) for end in np.nanpercentile(values[column.name], [25, 75]))
                name = column.measure.words.format("").removesuffix(" of ").removesuffix(" inside ")
                line[name] = column.show(low) if low == high else f"{low:.3g} to {column.show(high)}"
        lines.append(line)
    names = list(dict.fromkeys(name for line in lines for name in line))
    return [{name: line.get(name, "") for name in names} for line in lines]


def _lines(ranking: Ranking, cases: pd.DataFrame, values: pd.DataFrame) -> list[dict[str, Any]]:
    shown = [column for column in ranking.columns.values() if column.name in values and column.measure.name in SHOWN]
    numbers = values[[column.name for column in shown]].to_numpy()
    lines = []
    for place, case in enumerate(cases.to_dict("records")):
        score = case["score"]
        lines.append(
            {
                "case": case["case"],
                "deviation": round(score, 1) if np.isfinite(score) else None,
                "why": case["reasons"] if score > OUTLIER_Z else [],
                "modalities": " ".join(
                    [
                        *case["modalities"],
                        *([LABEL] if case["has_label"] else []),
                        *([CONNECTOME] if case["has_connectome"] else []),
                    ]
                ),
                "missing": " ".join(case["missing"]),
                "flags": "; ".join(case["facts"].values()),
                "numbers": {
                    column.words: float(f"{value:.4g}") if np.isfinite(value) else None
                    for column, value in zip(shown, numbers[place], strict=True)
                },
            }
        )
    return lines


def _pairs(url: str) -> list[dict[str, Any]]:
    return [
        {
            "one": f"{pair['dataset_a']}/{pair['subject_a']}",
            "other": f"{pair['dataset_b']}/{pair['subject_b']}",
            "similarity": round(pair["similarity"], 3),
        }
        for pair in read_duplicates(url)
        if pair["similarity"] >= THRESHOLD
    ]
