"""The rows of a prompting table: prompting, linear probes of the same encoders, baselines, and what is absent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from tasks.network_embeddings import PairSource, Side
from tasks.probe_cohort import ProbeCohort
from tasks.probes import Floats
from tasks.probing import grouped
from tasks.prompt_baselines import ImageRow, absent_images, connectome_rows, image_row, simple_rows
from tasks.prompt_cohort import PromptCohort
from tasks.prompt_seeds import RULES_VERSION, Embedder, PairRow, PromptSettings, Row, fitted_seed
from tasks.prompting import Prompt, PromptError, prompt_folds
from tasks.row_scores import Seed, score_row
from tasks.scores import RowKey, score_path
from tasks.summary import Line

SCORES = "prompts/scores"
"""Where a workspace keeps the scores of prompting tasks."""


def make_rows(
    cohort: PromptCohort,
    rows: Sequence[PairRow],
    image_only: Sequence[ImageRow],
    settings: PromptSettings,
    embedder: Embedder,
) -> list[Row]:
    """Return all rows of a table in order; the first is the one that the others are compared with."""
    reason = cohort.why_without_networks()
    found = [one for row in rows for one in prompt_rows(cohort, row, settings, embedder)]
    found += [one for row in rows for one in probe_rows(cohort, row, embedder, reason)]
    # Of a negative control; baselines are dear, and trainings times draws would be many.
    shuffles = max(settings.draws, *(len(grouped(row.pairs, row.together)) for row in rows))
    found += [image_row(cohort, one.row, embedder) for one in image_only]
    found += absent_images(image_only)
    found += connectome_rows(cohort, settings, shuffles, reason)
    found += simple_rows(cohort, shuffles)
    _check_names(cohort, found)
    return found


def _check_names(cohort: PromptCohort, rows: Sequence[Row]) -> None:
    """Raise PromptError for two rows whose scores would be kept in one file."""
    places: dict[Path, str] = {}
    for row in rows:
        path = score_path(Path(), RowKey(cohort.benchmark.name, row.name, 0))
        if path in places:
            raise PromptError(
                f"two rows of {cohort.benchmark.name} are called {places[path]!r} and {row.name!r}, which differ in no "
                "letter or digit; give one of yours another name"
            )
        places[path] = row.name


def prompt_rows(cohort: PromptCohort, row: PairRow, settings: PromptSettings, embedder: Embedder) -> list[Row]:
    """Return a row for each variant and share.

    Of all labelled connectomes there is one draw; a negative control shuffles its labels anew in as many as of others.
    """
    found, shuffled = [], cohort.benchmark.shuffle_seed is not None
    for share in settings.shares:
        for variant in settings.variants:
            draws = 1 if share == 1 and not shuffled else settings.draws
            prompts = [Prompt(variant, share, settings.k, seed=settings.seed + draw) for draw in range(draws)]
            seeds = [
                _prompt_seed(cohort, members, prompt, embedder)
                for members in grouped(row.pairs, row.together)
                for prompt in prompts
            ]
            name = f"{row.name}: {variant}, {100 * share:g} %"
            found.append(Row(name, tuple(seeds), "ours", variant=variant, share=share))
    return found


def _prompt_seed(cohort: PromptCohort, members: Sequence[PairSource], prompt: Prompt, embedder: Embedder) -> Seed:
    def predict(own: ProbeCohort) -> Floats:
        found = [
            prompt_folds(
                embedder.of(one, "image")[1],
                embedder.of(one, "network")[1],
                cohort.subjects(own),
                len(cohort.benchmark.classes),
                replace(prompt, temperature=one.temperature),
            )
            for one in members
        ]
        return np.mean(found, axis=0)

    settings = [prompt.variant, prompt.share, prompt.seed, prompt.k if prompt.variant == "knn" else 0]
    made_from = ["prompt", RULES_VERSION, [one.weights for one in members], settings, cohort.roles_digest]
    return Seed(made_from, predict, cohort.has_image)


def probe_rows(cohort: PromptCohort, row: PairRow, embedder: Embedder, reason: str) -> list[Row]:
    """Return the linear probes of frozen features: of the image, of the connectome, and of both side by side."""
    sides: dict[str, tuple[Side, ...]] = {
        "image probe": ("image",),
        "network probe": ("network",),
        "image+network probe": ("image", "network"),
    }
    found = []
    for words, names in sides.items():
        name = f"{row.name}: {words}"
        if "network" in names and reason:
            found.append(Row(name, kind="ours", absent=reason))
            continue
        here = cohort.has_both if len(names) > 1 else cohort.has_network if names == ("network",) else cohort.has_image

        def features(members: Sequence[PairSource], names: Sequence[Side] = names) -> list[Floats]:
            return [np.concatenate([embedder.of(one, side)[0] for side in names], axis=1) for one in members]

        seeds = [
            fitted_seed(
                cohort, name, ["probe", *names, [one.weights for one in members]], partial(features, members), here
            )
            for members in grouped(row.pairs, row.together)
        ]
        found.append(Row(name, tuple(seeds), "ours"))
    return found


def score_rows(
    cohort: PromptCohort, rows: Sequence[Row], workspace: Path, done: Callable[[str], None] = lambda name: None
) -> tuple[pd.DataFrame, int]:
    """Return the long-form scores of all rows that have seeds and how many were computed now; `done` is told names."""
    frames, fresh = [], 0
    for row in rows:
        if row.seeds:
            frame, computed = score_row(cohort.everybody, row.name, row.seeds, workspace / SCORES)
            frames.append(frame)
            fresh += computed
            done(row.name)
    return pd.concat(frames, ignore_index=True), fresh


def kinds_of(rows: Sequence[Row]) -> dict[str, str]:
    """Return `baseline` or `ceiling` of every scored row that is not ours."""
    return {row.name: row.kind for row in rows if row.seeds and row.kind != "ours"}


def absent_lines(cohort: PromptCohort, rows: Sequence[Row]) -> list[Line]:
    """Return a line without a number for every row that is not there, with the reason."""
    name = cohort.benchmark.name
    return [Line(benchmark=name, row=row.name, metric="", kind="absent", note=row.absent) for row in rows if row.absent]
