"""Pictures are PNGs of a sensible size, and say what they cannot draw."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tasks import figures
from tasks.figures import OverlayCase, _draw_panel, _panels, forest_plot, loss_curves, loss_series, overlays
from tasks.summary import Line


def size_of(png: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return image.size


def line(row: str, kind: str = "ours", **numbers: float) -> Line:
    return Line(benchmark="b", row=row, metric="auroc", kind=kind, n=20, **numbers)  # type: ignore[arg-type]


def test_forest_plot_grows_with_its_rows() -> None:
    rows = [line("pre-trained", estimate=0.8, low=0.7, high=0.9), line("scratch", estimate=0.6)]
    rows.append(line("BrainMVP", "published", estimate=0.9))
    small, large = size_of(forest_plot(rows[:1], "x")), size_of(forest_plot(rows, "x"))
    assert small[0] == large[0]
    assert large[1] > small[1]
    with pytest.raises(ValueError, match="forest plot 'x': no line has a number"):
        forest_plot([line("scratch")], "x")


def test_dollars_in_names_are_no_formulas() -> None:
    assert size_of(forest_plot([line(r"$\nonsense{$", estimate=0.8)], "$x_$"))[0] > 200
    assert size_of(loss_curves([{"kind": "train", "step": 1, "losses": {"loss": 1.0}}], "$x_$"))[0] > 200


def test_every_picture_of_results_has_the_style() -> None:
    for path in Path(figures.__file__).parent.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert source.count(" Figure(") == source.count("with rc_context(STYLE):"), path.name


def test_pictures_are_reproducible() -> None:
    rows = [line("pre-trained", estimate=0.8, low=0.7, high=0.9)]
    assert forest_plot(rows, "x") == forest_plot(rows, "x")


def test_loss_curves_of_training_and_validation() -> None:
    records = [{"kind": "train", "step": k, "losses": {"loss": 1 / k, "contrast": float("nan")}} for k in range(1, 60)]
    records.append({"kind": "val", "step": 50, "metrics": {"loss": 0.3}})
    series = loss_series(records)
    assert set(series) == {"loss"}
    assert series["loss"]["val"] == [(50, 0.3)]
    assert size_of(loss_curves(records, "t"))[0] > 200
    with pytest.raises(ValueError, match=r"loss curves 't': metrics\.jsonl has no finite loss yet"):
        loss_curves([], "t")


def test_metrics_of_one_group_share_a_panel_and_one_point_has_limits_around_it() -> None:
    values = {"psnr_model": 20.0, "psnr_mean": 14.0, "embedding_rank": 3.0, "loss": 0.3}
    panels = _panels(loss_series([{"kind": "val", "step": 4, "metrics": values}]))
    assert list(panels) == ["loss", "embedding, validation", "PSNR (dB), validation"]
    assert [label for label, _, _ in panels["PSNR (dB), validation"]] == ["mean", "model"]
    axes = Figure().add_subplot()
    _draw_panel(axes, "loss", panels["loss"])
    assert axes.get_xlim() == (3, 5)
    assert axes.get_ylim() == pytest.approx((0.15, 0.45))
    assert all(tick == round(tick) for tick in axes.get_xticks())


def test_overlays_show_one_panel_a_case_and_survive_empty_masks() -> None:
    image = np.random.default_rng(0).random((20, 24, 16)).astype(np.float32)
    target, empty = np.zeros((2, 3, 20, 24, 16), bool)
    target[:, 5:10, 5:12, 7:9] = True
    case = OverlayCase("best", image, target, target)
    nothing = OverlayCase("worst", np.zeros_like(image), empty, empty)
    one, two = size_of(overlays([case], ["ET", "TC", "WT"], "x")), size_of(overlays([case, nothing], ["ET"], "x"))
    assert two[0] > one[0]
    with pytest.raises(ValueError, match="overlay 'x': no case to draw"):
        overlays([], ["ET"], "x")
