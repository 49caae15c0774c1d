"""Confusion matrices: counts against scikit-learn for two and more classes, ties, seeds, the picture, the section."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from classifications import simulated
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix

from tasks.benchmarks import BENCHMARKS, Benchmark
from tasks.confusion import confusion_counts, confusion_figure, matrix_of, with_confusion
from tasks.report import TableSection
from tasks.scores import ScoreError
from tasks.summary import Line
from tasks.tables import BenchmarkTable

TWO = BENCHMARKS["phantom-diagnosis"]
THREE = TWO.replace(name="three", classes=("a", "b", "c"))


def scores_of(benchmark: Benchmark, target: np.ndarray, probabilities: np.ndarray, row: str, seed: int) -> pd.DataFrame:
    names = benchmark.classes
    return pd.DataFrame(
        [
            {"row": row, "seed": seed, "dataset": "d", "subject": f"s{n}", "case": f"c{n}", "metric": "probability"}
            | {"target": names[target[n]], "region": names[k], "value": probabilities[n, k]}
            for n in range(len(target))
            for k in range(len(names))
        ]
    )


@pytest.mark.parametrize("benchmark", [TWO, THREE])
def test_counts_are_those_of_scikit_learn_seed_by_seed_and_summed(benchmark: Benchmark) -> None:
    rng, sum_of = np.random.default_rng(0), 0
    drawn = [simulated(rng, 41, classes=len(benchmark.classes)) for _ in range(2)]
    frames = [scores_of(benchmark, *one, "ours", seed) for seed, one in enumerate(drawn)]
    counts = confusion_counts(pd.concat(frames), benchmark)
    for seed, (target, probabilities) in enumerate(drawn):
        expected = confusion_matrix(target, probabilities.argmax(axis=1), labels=range(len(benchmark.classes)))
        np.testing.assert_array_equal(matrix_of(counts, "ours", benchmark.classes, str(seed)), expected)
        sum_of = sum_of + expected
    np.testing.assert_array_equal(matrix_of(counts, "ours", benchmark.classes), sum_of)
    assert counts["seed"].unique().tolist() == ["0", "1", "all"]
    assert counts.query("seed == 'all'")["cases"].sum() == 2 * 41


def test_equal_probabilities_are_the_first_class_and_empty_pairs_are_zero() -> None:
    counts = confusion_counts(scores_of(TWO, np.array([0, 1, 1]), np.full((3, 2), 0.5), "constant", 0), TWO)
    assert matrix_of(counts, "constant", TWO.classes).tolist() == [[1, 0], [2, 0]]
    broken = scores_of(TWO, np.array([0, 1]), np.array([[0.5, 0.5], [0.2, np.nan]]), "broken", 3)
    with pytest.raises(ScoreError, match="phantom-diagnosis: row 'broken', seed 3, case c1: a class has no finite"):
        confusion_counts(broken, TWO)


def test_the_section_of_a_classification_gets_picture_and_file() -> None:
    rng = np.random.default_rng(1)
    scores = pd.concat([scores_of(TWO, *simulated(rng, 12), f"row {k}", 0) for k in range(9)])
    line = Line(benchmark=TWO.name, row="row 0", metric="auroc", estimate=0.5)
    found = with_confusion(TableSection(BenchmarkTable(benchmark=TWO, lines=(line,))), scores)
    assert found.confusion is not None
    assert (len(found.confusion), len(found.pictures)) == (9 * 2 * 4, 1)
    assert found.pictures[0].png.startswith(b"\x89PNG")
    assert found.pictures[0].caption.endswith("share of the true class; 1 more rows are in the file")
    empty = TableSection(BenchmarkTable(benchmark=TWO, lines=()))
    assert with_confusion(empty, pd.DataFrame()) is empty
    tumour = TableSection(BenchmarkTable(benchmark=BENCHMARKS["phantom-tumour"], lines=(line,)))
    assert with_confusion(tumour, scores) is tumour
    with pytest.raises(ValueError, match="confusion matrices 'x': no row to draw"):
        confusion_figure({}, TWO.classes, "x")


def test_panels_do_not_touch_and_sums_of_more_seeds_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []

    def keep(figure: Figure) -> bytes:
        figures.append(figure)
        return b""

    monkeypatch.setattr("tasks.confusion.png_of", keep)
    rng, names = np.random.default_rng(4), [f"pre-trained on sixteen thousand scans of {k} datasets" for k in range(4)]
    drawn = [(name, 0) for name in names] + [("ours", 0), ("ours", 1)]
    scores = pd.concat([scores_of(TWO, *simulated(rng, 12), name, seed) for name, seed in drawn])
    line = Line(benchmark=TWO.name, row="ours", metric="auroc", estimate=0.5)
    with_confusion(TableSection(BenchmarkTable(benchmark=TWO, lines=(line,))), scores)
    (figure,) = figures
    FigureCanvasAgg(figure).draw()
    panels, below = figure.axes[:4], figure.axes[4]
    boxes = [panel.title.axes.get_tightbbox() for panel in panels]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert min(box.y0 for box in boxes) > below.get_tightbbox().y1 + 5
    assert panels[0].get_title(loc="left").replace("\n", " ") == f"{names[0]} (1 seed)"
    assert below.get_title(loc="left") == "ours (2 seeds, summed)"


def test_many_classes_have_a_file_and_no_picture() -> None:
    many = TWO.replace(name="many", classes=tuple(f"site {k}" for k in range(11)))
    scores = scores_of(many, *simulated(np.random.default_rng(2), 22, classes=11), "ours", 0)
    line = Line(benchmark=many.name, row="ours", metric="auroc", estimate=0.5)
    found = with_confusion(TableSection(BenchmarkTable(benchmark=many, lines=(line,))), scores)
    assert found.confusion is not None
    assert (len(found.confusion), list(found.pictures)) == (2 * 121, [])
