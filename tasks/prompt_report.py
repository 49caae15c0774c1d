"""What stands around a prompting table: sentences, pictures, and how well calibrated prompting is without labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from tasks.benchmarks import Benchmark
from tasks.curve_figures import reliability_figure, share_figure
from tasks.fold_statistics import INTERVAL_METHOD
from tasks.metrics_weighted import reliability
from tasks.probe_cohort import ProbeCohort
from tasks.probe_report import forest_picture
from tasks.probe_summary import class_metric, fold_parts, make_table
from tasks.probes import Floats, Ints
from tasks.prompt_baselines import CONNECTOME, MAE, MAJORITY, NETWORK, SUPERVISED, TANGENT
from tasks.prompt_cohort import PromptCohort
from tasks.prompt_figures import similarity_figure
from tasks.prompt_rows import absent_lines, kinds_of
from tasks.prompt_seeds import Embedder, PairRow, PromptSettings, Row
from tasks.prompting import unit
from tasks.report import Picture, TableSection
from tasks.statistics import one_subject_points
from tasks.summary import Line, reliability_curves
from tasks.tables import BenchmarkTable

SHOWN = 80
"""Subjects of each side in the picture of similarities, evenly taken."""
Facts = Sequence[tuple[str, str]]


def prompt_section(
    cohort: PromptCohort,
    pairs: Sequence[PairRow],
    rows: Sequence[Row],
    scores: pd.DataFrame,
    settings: PromptSettings,
    embedder: Embedder,
    notes: Sequence[str],
    facts: Facts,
    date: str,
) -> TableSection:
    """Return table, pictures and reliability curves of a task with data."""
    prompted = [row for row in rows if row.variant]
    sentences = [*_statements(cohort, pairs, scores, settings), *_calibration(cohort.benchmark, prompted, scores)]
    table = make_table(
        cohort.everybody,
        scores,
        kinds_of(rows),
        absent_lines(cohort, rows),
        [*sentences, *cohort.everybody.notes, *notes],
        facts,
        date,
    )
    pictures = [
        forest_picture(table),
        support_picture(table, prompted),
        reliability_picture(cohort.benchmark, prompted, scores),
    ]
    if (similar := similarity_picture(cohort, pairs[0], embedder)) is not None:
        pictures.append(similar)
    of_prompting = scores[scores["row"].isin([row.name for row in prompted])]
    return TableSection(table, pictures, reliability=reliability_curves(of_prompting, cohort.benchmark))


def empty_section(cohort: ProbeCohort, date: str) -> TableSection:
    """Return the table of a task without data: `no data`, beside what was published."""
    return TableSection(make_table(cohort, pd.DataFrame(), {}, (), cohort.notes, (), date))


def _statements(
    cohort: PromptCohort, pairs: Sequence[PairRow], scores: pd.DataFrame, settings: PromptSettings
) -> list[str]:
    own = cohort.everybody
    n, folds = int(cohort.has_image.sum()), int(own.fold.max()) + 1
    targets = pd.Series([case.target for case in own.part(cohort.has_image).cases]).value_counts()
    classes = ", ".join(f"{targets[name]} {name}" for name in cohort.benchmark.classes)
    first = str(scores["row"].iloc[0])
    temperatures = {one.name: one.temperature for row in pairs for one in row.pairs}
    words = ", ".join(f"{value:.4g} ({name})" for name, value in temperatures.items())
    return [
        f"n = {n} queries, each tested once ({classes}); one subject is worth {one_subject_points(n):.2f} points of an "
        f"accuracy. {folds} folds by subject, stratified by target and site; one case a subject.",
        "Prompting: the class whose labelled connectomes of the other folds are most like the image, by cosine in the "
        f"trained space; of the query only the image is seen. {_variants(settings)}",
        f"Supports are drawn by class, {settings.draws} times where they are a part of all; nobody, and no two who "
        "look like one person, is query and support at once. Seeds are trainings times draws.",
        f"Pseudo-probabilities: softmax over cosines at the temperature that each training ended with, {words}; "
        "nothing is fitted to labels.",
        "Probes: logistic regression, strength by inner cross-validation. Rows that see the connectome of who is "
        f"tested, which prompting does not: probes of the network, {CONNECTOME}, {TANGENT}, {NETWORK}.",
        f"Rows of images alone are linear probes of frozen encoders: {MAE} of trainings of recipe image_mae, "
        f"{SUPERVISED} of the evaluate flow's classifiers from scratch; who they were trained on is left out.",
        f"Brackets: {INTERVAL_METHOD}; they can reach beyond what the metric can be.",
        f"p: {first} against the row, t-test over folds with the same correction, Holm-corrected over all such rows.",
    ]


def _variants(settings: PromptSettings) -> str:
    meaning = {
        "mean": "mean: cosine to the mean of a class's unit embeddings",
        "nearest": "nearest: to the most similar one of a class",
        "knn": f"knn: the mean of the {settings.k} highest cosines of a class",
    }
    return "; ".join(meaning[variant] for variant in settings.variants) + "."


def pooled(scores: pd.DataFrame, benchmark: Benchmark, row: str) -> list[tuple[Ints, Floats]]:
    """Return the targets and probabilities of a row over all folds, seed by seed."""
    parts = fold_parts(scores[scores["row"] == row], benchmark)
    return [tuple(np.concatenate(arrays) for arrays in zip(*folds, strict=True)) for folds in parts]  # type: ignore[misc]


def calibration_errors(scores: pd.DataFrame, benchmark: Benchmark, rows: Iterable[Row]) -> dict[str, float]:
    """Return the expected calibration error of each row: over the queries of all folds, averaged over seeds."""
    return {
        row.name: float(np.mean([class_metric("ece", *one) for one in pooled(scores, benchmark, row.name)]))
        for row in rows
    }


def _largest(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the largest support."""
    share = max(row.share for row in rows)
    return [row for row in rows if row.share == share]


def _calibration(benchmark: Benchmark, rows: Sequence[Row], scores: pd.DataFrame) -> list[str]:
    errors = calibration_errors(scores, benchmark, _largest(rows))
    words = ", ".join(f"{name} {error:.3f}" for name, error in errors.items())
    return [
        f"Calibration without a label fitted: expected calibration error over all queries, seeds averaged: {words}. "
        "Few queries make it too large, so it has no interval; the curves of every seed are in the file "
        f"{benchmark.name}.reliability.csv."
    ]


def support_picture(table: BenchmarkTable, rows: Sequence[Row]) -> Picture:
    """Return accuracy against the size of the support, with the majority class.

    All variants of the first row of trainings are drawn, of others the first variant.
    """
    lines = {line.row: line for line in table.lines if line.metric == "accuracy"}
    curves: dict[str, list[tuple[float, Line]]] = {}
    for row in rows:
        name, first = row.name.rsplit(",", 1)[0], rows[0].name.rsplit(": ", 1)[0]
        if name.startswith(f"{first}: ") or row.variant == rows[0].variant:
            curves.setdefault(name, []).append((row.share, lines[row.name]))
    majority = lines[MAJORITY].estimate if MAJORITY in lines else None
    png = share_figure(curves, majority, f"{table.benchmark.title}: support size")
    words = "Point: mean over folds and draws; bar: 95 % interval over folds; dashed: always the largest class"
    return Picture(png, f"accuracy by support size of {table.benchmark.title}", words)


def reliability_picture(benchmark: Benchmark, rows: Sequence[Row], scores: pd.DataFrame) -> Picture:
    """Return reliability curves of prompting with the largest support, of the first seed."""
    largest = _largest(rows)[:4]
    curves = {row.name: reliability(*pooled(scores, benchmark, row.name)[0]) for row in largest}
    errors = calibration_errors(scores, benchmark, largest)
    png = reliability_figure(curves, errors, f"{benchmark.title}: calibration without labels")
    words = (
        "Pseudo-probability of the "
        f"{'last class' if len(benchmark.classes) == 2 else 'most similar class'} against the share that came true; "
        "bar: 95 % Wilson interval; first seed, all folds; nothing was fitted to labels"
    )
    return Picture(png, f"reliability curves of {benchmark.title}", words)


def similarity_picture(cohort: PromptCohort, row: PairRow, embedder: Embedder) -> Picture | None:
    """Return the cosines between images and connectomes of whoever has both, by the first training; None for nobody."""
    places = np.flatnonzero(cohort.has_both)
    if not len(places):
        return None
    chosen = places[np.unique(np.linspace(0, len(places) - 1, min(SHOWN, len(places))).round().astype(int))]
    images, networks = (unit(embedder.of(row.pairs[0], side)[1][chosen], side) for side in ("image", "network"))
    title = f"{cohort.benchmark.title}: {row.pairs[0].name}"
    target = cohort.everybody.target[chosen]
    png = similarity_figure(images, networks, target, cohort.benchmark.classes, title)
    words = (
        f"Cosine of images (rows) and connectomes (columns) of {len(chosen)} subjects, sorted by class; an image meets "
        "its own connectome on the diagonal"
    )
    return Picture(png, f"similarities of {cohort.benchmark.title}", words)
