"""Retrieval of the study of CINP: which of 32 connectomes belongs to this image?

Rows: every training with both encoders; the linear model (ridge from voxels to the components of the connectomes),
which is known to work; the true traits, with which an image could at best be read; and wrong pairs, for which
everybody's own connectome is that of somebody else. Linear models are fitted on the cohort of the pre-training. All
rows see the same candidates, of people of one group, so that no diagnosis helps.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from models.objectives.base import centred_start
from models.records import SelectedCase
from models.store import Store
from studies.linear import cosines, fit_components, ridge
from tasks.figures import forest_plot
from tasks.latents import read_latents
from tasks.network_embeddings import pair_embeddings, trained_pair
from tasks.phantom.effects_connectivity import TRAITS
from tasks.probes import Floats
from tasks.retrieval import SIZE, TOP, retrieval
from tasks.summary import Line

LINEAR = "linear (positive control)"
CEILING = "true traits (ceiling)"
WRONG = "wrong pairs (negative control)"
COMPONENTS = len(TRAITS)


@dataclass(frozen=True)
class People:
    """Cases of one dataset with image and connectome."""

    store: Store
    cases: Sequence[SelectedCase]
    latents: Path
    """Folder of the dataset's latents."""

    def voxels(self) -> Floats:
        """Return the whole images (N, voxels)."""
        dataset = self.store.dataset(self.cases[0].dataset)
        grid = dataset.spec.grid
        starts = [(case.row, centred_start(grid, grid, dataset.case_info(case.row).origin)) for case in self.cases]
        return np.stack([dataset.read_crop(row, [0], start, grid).ravel() for row, start in starts])

    def edges(self) -> Floats:
        """Return the upper triangles of the connectomes (N, edges)."""
        dataset = self.store.dataset(self.cases[0].dataset)
        matrices = np.stack([dataset.read_connectome(case.row) for case in self.cases])
        upper = np.triu_indices(matrices.shape[1], 1)
        return np.asarray(matrices[:, upper[0], upper[1]])

    def traits(self) -> Floats:
        """Return the true traits that the cortex follows (N, 8)."""
        table = read_latents(self.latents, [self.cases[0].dataset])
        assert table is not None
        return np.asarray(
            table.set_index("subject").loc[[case.subject for case in self.cases], [f"trait.{name}" for name in TRAITS]],
            dtype=float,
        )


def retrieve(trainings: Mapping[str, Sequence[Path]], train: People, test: People, folder: Path) -> pd.DataFrame:
    """Return one line for every row and number of first ones, and write them with a picture into a folder.

    trainings: folders of finished trainings by row, the full method first. Kept embeddings are read.
    """
    rows = {
        name: np.stack([_by_training(path, test, folder / "embeddings") for path in paths])
        for name, paths in trainings.items()
    }
    full = next(iter(rows.values()))
    rows[LINEAR], rows[CEILING] = _linear(train, test), _true(train, test)
    rows[WRONG] = np.roll(full, 1, axis=2)
    person = np.arange(len(test.cases))
    lines = [
        {
            "row": name,
            "top": one.top,
            "candidates": min(SIZE, len(person)),
            "chance": one.chance,
            "estimate": one.interval.estimate,
            "low": one.interval.low,
            "high": one.interval.high,
            "n": one.interval.n,
            "trainings": len(similarity),
        }
        for name, similarity in rows.items()
        for one in retrieval(similarity, person, min(SIZE, len(person)))
    ]
    table = pd.DataFrame(lines)
    write(table, folder / "retrieval")
    return table


def write(table: pd.DataFrame, folder: Path) -> None:
    """Write the table as CSV and Markdown, and a picture for every number of first ones."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "retrieval.csv", index=False)
    (folder / "retrieval.md").write_text(markdown(table), encoding="utf-8")
    for top in TOP:
        title = f"Own connectome among the first {top} of {table['candidates'].iloc[0]}"
        chosen = table[table["top"] == top]
        (folder / f"top{top}.png").write_bytes(forest_plot([_line(row) for row in chosen.to_dict("records")], title))


def markdown(table: pd.DataFrame) -> str:
    """Return the table with a line a row; intervals are over subjects."""
    firsts = table[["top", "chance"]].drop_duplicates().to_dict("records")
    heads = [f"top {one['top']} (chance {one['chance']:.3f})" for one in firsts]
    lines = [f"| row | {' | '.join(heads)} | n | trainings |", "|---" * (len(heads) + 3) + "|"]
    for name, part in table.groupby("row", sort=False):
        cells = [f"{one.estimate:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in part.itertuples()]
        lines.append(f"| {name} | {' | '.join(cells)} | {part['n'].iloc[0]} | {part['trainings'].iloc[0]} |")
    return "\n".join(lines) + "\n"


def _line(row: Mapping[Hashable, Any]) -> Line:
    kind = {LINEAR: "baseline", WRONG: "baseline", CEILING: "ceiling"}.get(str(row["row"]), "ours")
    values = {"row": row["row"], "metric": f"share of hits, chance {row['chance']:.3f}", "kind": kind, "n": row["n"]}
    body = {"benchmark": "retrieval", **values, **{name: row[name] for name in ("estimate", "low", "high")}}
    return Line.model_validate(body)


def _by_training(training: Path, test: People, kept: Path) -> Floats:
    """Return the cosine (N, N) of every image and every connectome by one training."""
    source = trained_pair(training)
    sides = (pair_embeddings(source, test.store, test.cases, side, kept)[0] for side in ("image", "network"))
    image, network = (np.asarray(embedding, dtype=float) for _, embedding in sides)
    return cosines(image, network)


def _linear(train: People, test: People) -> Floats:
    components = fit_components(train.edges(), COMPONENTS)
    guess = ridge(train.voxels(), components.of(train.edges()), test.voxels())
    return cosines(guess, components.of(test.edges()))[None]


def _true(train: People, test: People) -> Floats:
    guess = ridge(train.edges(), train.traits(), test.edges())
    return cosines(test.traits(), guess)[None]
