"""The report's section of one benchmark: table, forest plot, overlays, reliability and confusion, further tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from tasks.confusion import with_confusion
from tasks.curve_figures import reliability_figure, share_figure
from tasks.evaluation import Cohort
from tasks.figures import OverlayCase, overlays
from tasks.finetune import TEMPLATES_AT_MOST, Finetuning, budget
from tasks.label_efficiency import LabelTable
from tasks.leaks import leak_note
from tasks.others import find_files, masks_of, others_notes
from tasks.report import Picture, TableSection, primary_picture
from tasks.scores import Predict, region_masks
from tasks.summary import MIXED, PRETRAINED, reliability_curves, summarise
from tasks.tables import BenchmarkTable, FurtherTable, heading
from tasks.trained_scores import trained_masks


def make_table(
    cohort: Cohort,
    scores: pd.DataFrame,
    trainings: Sequence[Finetuning],
    provenance: Sequence[tuple[str, str]],
    date: str,
    replicates: int,
    first: str = PRETRAINED,
    notes: Sequence[str] = (),
) -> BenchmarkTable:
    """Return the table of a benchmark; without scores it says `no data` beside the published rows.

    first: the row that the others are compared with. notes: further sentences under it.
    """
    lines = summarise(scores, cohort.benchmark, cohort.kinds, replicates=replicates, first=first)
    return BenchmarkTable(
        benchmark=cohort.benchmark,
        lines=tuple(lines),
        budget=_budgets(trainings, len(cohort.of_role("train"))),
        provenance=tuple(provenance),
        date=date,
        notes=(
            *_network_notes(trainings),
            *_mix_notes(trainings),
            *(NATIVE_NOTES if cohort.native else ()),
            *leak_note(cohort),
            *cohort.overlaps,
            *others_notes(cohort),
            *notes,
        ),
        first=first,
    )


def _budgets(trainings: Sequence[Finetuning], n_train: int) -> str:
    """Return the budget of all rows, and of those whose network needs images of another size beside it."""
    found: dict[str, dict[str, None]] = {}
    for one in trainings:
        if one.row != MIXED:
            found.setdefault(budget(one.config, n_train), {})[one.row] = None
    words = [text if k == 0 else f"{', '.join(rows)}: {text}" for k, (text, rows) in enumerate(found.items())]
    return "; ".join(words)


def _network_notes(trainings: Sequence[Finetuning]) -> tuple[str, ...]:
    """Return the sentence about which row has which network, where there are several."""
    found: dict[str, tuple[str, dict[str, None]]] = {}
    for one in trainings:
        network = one.config.network
        _, rows = found.setdefault(network.content_digest(), (network.kind, {}))
        rows[one.row] = None
    if len(found) < 2:
        return ()
    named = [f"{kind} ({', '.join(rows)})" for kind, rows in found.values()]
    return (f"Networks: {'; '.join(named)}.",)


NATIVE_NOTES: tuple[str, ...] = (
    "Scored on the grid of each label file, against the label as it was drawn: predicted masks moved there by nearest "
    "neighbour, distances and volumes in its voxels; nothing is predicted outside the stored extent.",
)


def _mix_notes(trainings: Sequence[Finetuning]) -> tuple[str, ...]:
    if all(one.row != MIXED for one in trainings):
        return ()
    return (
        f"{MIXED}: learned templates replace up to {TEMPLATES_AT_MOST} channels of two copies of every case, and stand "
        "in for absent ones. Same optimiser steps and crops a step as the other rows, so each case is visited half as "
        "often.",
    )


def make_section(
    table: BenchmarkTable, cohort: Cohort, trainings: Sequence[Finetuning], scores: pd.DataFrame
) -> TableSection:
    """Return the report's section of a benchmark: table, forest plot and, for a segmentation, overlays; for a
    classification, reliability curves and confusion matrices."""
    pictures: list[Picture] = []
    if table.has_scores:
        words = "Point: estimate; bar: 95 % interval over subjects; diamonds: published on other splits"
        pictures.append(primary_picture(table, words))
        shown = [training for training in trainings if training.row == table.first]
        if table.benchmark.kind == "segmentation" and not cohort.native:
            pictures += _overlay_pictures(cohort, shown[:1], scores)
    if not table.has_scores or table.benchmark.kind != "classification":
        return TableSection(table, pictures)
    curves = reliability_curves(scores, table.benchmark)
    named = list(dict.fromkeys(training.row for training in trainings))
    section = TableSection(table, [*pictures, *_reliability_pictures(table, curves, named)], reliability=curves)
    return with_confusion(section, scores)


def _reliability_pictures(table: BenchmarkTable, curves: pd.DataFrame, named: Sequence[str]) -> list[Picture]:
    """Return the reliability curves of the trained rows, first seed; nothing without the calibration error."""
    errors = {line.row: line.estimate for line in table.lines if line.metric == "ece" and line.estimate is not None}
    rows = [row for row in named if row in errors and (curves["row"] == row).any()]
    if not rows:
        return []
    first = curves[curves["seed"] == curves["seed"].min()]
    shown = {row: first[first["row"] == row] for row in rows}
    title = f"Calibration of {table.benchmark.title}"
    png = reliability_figure(shown, errors, title, "predicted probability")
    return [
        Picture(png, title, "Share of test cases that came true, by predicted probability, first seed; dashed: ideal")
    ]


def with_further(section: TableSection, further: Mapping[str, FurtherTable]) -> TableSection:
    """Return the section with further tables by kind, and the curve of fewer labels where it is among them."""
    section, labels = replace(section, further=dict(further)), further.get("labels")
    if not isinstance(labels, LabelTable):
        return section
    words = ("share of the labels, %", f"{heading(labels.metric, labels.region)}, 95 % interval over subjects")
    curve = share_figure(labels.curves(), None, labels.title, words)
    picture = Picture(
        curve, f"{labels.title}: curve", "As many optimiser steps at every share of the training subjects"
    )
    return replace(section, pictures=[*section.pictures, picture])


def ranked_cases(scores: pd.DataFrame, row: str, seed: int) -> list[tuple[str, str, float]]:
    """Return (dataset, case, mean Dice over regions) of one training, best first; ties by case."""
    mine = scores[(scores["row"] == row) & (scores["seed"] == seed) & (scores["metric"] == "dice")]
    means = mine.groupby(["dataset", "case"])["value"].mean().reset_index()
    means = means.sort_values(["value", "dataset", "case"], ascending=[False, True, True])
    return [(str(line.dataset), str(line.case), float(line.value)) for line in means.itertuples()]  # type: ignore[arg-type]


def _overlay_pictures(cohort: Cohort, trainings: Sequence[Finetuning], scores: pd.DataFrame) -> list[Picture]:
    """Return the overlays of some trainings and of all predictions of others."""
    pictures = []
    for one in trainings:
        read = partial(trained_masks, cohort, one.folder)
        pictures.append(_overlay_picture(cohort, one.row, one.seed, read, scores))
    for other in cohort.others:
        paths = {(case.dataset, case.case): path for case, path in find_files(other, cohort)}
        pictures.append(
            _overlay_picture(cohort, other.name, 0, partial(masks_of, cohort, paths), scores, f", {other.name}")
        )
    return pictures


def _overlay_picture(
    cohort: Cohort, row: str, seed: int, read: Predict, scores: pd.DataFrame, named: str = ""
) -> Picture:
    ranked = ranked_cases(scores, row, seed)
    places = dict.fromkeys([0, len(ranked) // 2, len(ranked) - 1])
    words = dict(zip([0, len(ranked) // 2, len(ranked) - 1], ("best", "median", "worst"), strict=True))
    by_name = {(case.dataset, case.case): case for case in cohort.of_role("test")}
    benchmark, shown = cohort.benchmark, []
    for place in places:
        dataset, name, value = ranked[place]
        case = by_name[dataset, name]
        image = cohort.image(case)
        # Oedema and whole lesions show best on FLAIR; any other modality where it was not taken.
        order = sorted(range(len(image)), key=lambda m: (not image[m].any(), benchmark.modalities[m] != "flair"))
        target = region_masks(cohort.label(case), benchmark.regions, benchmark.scheme, name)
        shown.append(
            OverlayCase(
                f"{words[place]}: {name}\nmean Dice {value:.2f}",
                np.where(cohort.hidden(case, image), 0, image[order[0]]),
                target,
                read(case).astype(bool),
            )
        )
    names = [region.name for region in benchmark.regions]
    whose = "predictions of others" if named else f"seed {seed}"
    title = f"{benchmark.title}, {row}, {whose}"
    caption = "Test cases of best, median and worst mean Dice: the axial slice with most target voxels"
    return Picture(overlays(shown, names, title), f"overlays of {benchmark.title}{named}", caption)
