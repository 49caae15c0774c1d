"""Pictures of prompting: they are made of what they are given, and say what they lack."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.curve_figures import reliability_figure, share_figure
from tasks.figures import chance_of
from tasks.metrics_weighted import reliability
from tasks.prompt_figures import similarity_figure
from tasks.report import PNG_SIGNATURE
from tasks.summary import Line

RNG = np.random.default_rng(0)


def test_a_support_curve_needs_a_number() -> None:
    line = Line(benchmark="x", row="a", metric="accuracy", estimate=0.6, low=0.5, high=0.7)
    curves = {"mean": [(1.0, line), (0.1, line.replace(low=None, high=None))], "knn": [(0.5, line)]}
    drawn = share_figure(curves, 0.5, "x")
    assert drawn.startswith(PNG_SIGNATURE)
    assert share_figure(curves, None, "x") != drawn, "the majority line is drawn"
    with pytest.raises(ValueError, match="support curve 'x': no row of prompting has a number"):
        share_figure({"mean": []}, 0.5, "x")


def test_reliability_curves_stand_beside_each_other() -> None:
    curve = reliability(RNG.integers(0, 2, 40), RNG.dirichlet([1, 1], 40))
    one = reliability_figure({"mean": curve}, {"mean": 0.1}, "x")
    two = reliability_figure({"mean": curve, "knn": curve}, {"mean": 0.1, "knn": 0.2}, "x")
    assert one.startswith(PNG_SIGNATURE)
    assert len(two) > len(one)
    with pytest.raises(ValueError, match="reliability curves 'x': no row to draw"):
        reliability_figure({}, {}, "x")


def test_similarities_are_sorted_by_class_whatever_the_order() -> None:
    images, networks, classes = RNG.standard_normal((9, 3)), RNG.standard_normal((9, 3)), np.arange(9) % 2
    order = np.argsort(classes, kind="stable")
    drawn = similarity_figure(images, networks, classes, ("a", "b"), "x")
    assert drawn.startswith(PNG_SIGNATURE)
    assert drawn == similarity_figure(images[order], networks[order], classes[order], ("a", "b"), "x")


def test_chance_depends_on_the_number_of_classes() -> None:
    assert chance_of("balanced_accuracy", 4) == 0.25
    assert chance_of("balanced_accuracy", 0) == chance_of("auroc", 4) == 0.5
    assert chance_of("accuracy", 2) is None
