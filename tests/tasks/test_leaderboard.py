"""The leaderboard: mean places by hand, what counts, how stable it is, and its files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from flows.results import publish_tables, write_leaderboard
from tasks.benchmarks import BENCHMARKS
from tasks.leaderboard import Leaderboard, leaderboard
from tasks.report import ReportContent, render_report

STROKE, SCHWANNOMA = BENCHMARKS["isles22"], BENCHMARKS["vsseg"]
LEVELS = {"A": (0.9, 0.5), "B": (0.7, 0.51), "C": (0.2, 0.1)}
"""Mean Dice of each row on both benchmarks: A and B are apart on the first and close on the second."""


def scores_of(levels: dict[str, tuple[float, float]], spread: float = 0.02) -> pd.DataFrame:
    rng, lines = np.random.default_rng(0), []
    for place, benchmark in enumerate((STROKE, SCHWANNOMA)):
        noise = rng.normal(0, spread, (len(levels), 20))
        for row, (name, level) in enumerate(levels.items()):
            common = {"benchmark": benchmark.name, "row": name, "seed": 0, "metric": "dice", "target": "", "note": ""}
            lines += [
                {**common, "dataset": benchmark.name, "subject": f"s{n}", "case": f"c{n}"}
                | {"region": benchmark.regions[0].name, "value": level[place] + noise[row, n] - noise[row].mean()}
                for n in range(20)
            ]
    return pd.DataFrame(lines)


@pytest.fixture(scope="module")
def board() -> Leaderboard:
    extra = scores_of({"lonely": (0.6, 0.6), "ceiling": (1.0, 1.0)})
    lonely = extra[(extra["row"] == "lonely") & (extra["benchmark"] == STROKE.name)]
    scores = pd.concat([scores_of(LEVELS), lonely, extra[extra["row"] == "ceiling"]])
    control = BENCHMARKS["phantom-control"]
    found = leaderboard(scores, [STROKE, SCHWANNOMA, control, BENCHMARKS["adni"]], {"ceiling": "ceiling"}, 400)
    assert found is not None
    return found


def test_places_are_averaged_over_benchmarks_that_all_rows_share(board: Leaderboard) -> None:
    assert [line.row for line in board.lines] == ["A", "B", "C"]
    assert [line.places for line in board.lines] == [(1, 2), (2, 1), (3, 3)]
    assert [line.place for line in board.lines] == [1.5, 1.5, 3]
    assert (board.others, len(board.benchmarks)) == (("lonely",), 2)
    assert board.header[4:] == ["ISLES22: Dice stroke (n = 20)", "VSseg: Dice schwannoma (n = 20)"]


def test_the_bootstrap_says_how_often_the_order_turns(board: Leaderboard) -> None:
    a, b, c = board.lines
    # On the first benchmark A is always ahead, on the second rarely: then it is first alone, else both share.
    assert (c.low, c.high, c.first) == (3, 3, 0)
    assert a.first > b.first > 0.3
    assert (a.low, a.high) == (1, 1.5)
    assert a.first + b.first == pytest.approx(1)


def test_predictions_of_others_are_marked(board: Leaderboard) -> None:
    assert "of others" not in board.to_markdown()
    found = leaderboard(scores_of(LEVELS), [STROKE, SCHWANNOMA], {"A": "others"}, 50)
    assert found is not None
    assert [line[0] for line in found.body] == ["A (predictions of others)", "B", "C"]
    assert found.statements[-1].startswith(
        "Predictions of others: A. How and on whom their networks were trained is not known here: test subjects may be "
    )
    assert [line.split(",")[-1] for line in found.to_csv().splitlines()] == ["kind", "others", "", ""]


def test_without_two_rows_on_two_benchmarks_there_is_none() -> None:
    scores = scores_of(LEVELS)
    assert leaderboard(scores, [STROKE], {}, 50) is None
    assert leaderboard(scores[scores["row"] == "A"], [STROKE, SCHWANNOMA], {}, 50) is None
    assert leaderboard(pd.DataFrame(), [STROKE, SCHWANNOMA], {}, 50) is None
    assert leaderboard(scores, [STROKE, SCHWANNOMA.replace(control="negative")], {}, 50) is None


def test_one_test_subject_orders_nothing() -> None:
    scores = scores_of(LEVELS)
    alone = scores[(scores["benchmark"] == STROKE.name) | (scores["subject"] == "s0")]
    assert leaderboard(alone, [STROKE, SCHWANNOMA], {}, 50) is None, "a benchmark of one subject does not count"


def test_an_order_that_is_undefined_is_no_leaderboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.leaderboard.places_of", lambda metrics, weights: np.full((51, len(metrics)), np.nan))
    assert leaderboard(scores_of(LEVELS), [STROKE, SCHWANNOMA], {}, 50) is None


def test_files_artifact_and_page(board: Leaderboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published: dict[str, str] = {}
    monkeypatch.setattr("flows.results.publish_markdown", lambda key, text, *_: published.update({key: text}))
    write_leaderboard(board, tmp_path)
    publish_tables([], tmp_path)
    assert published["leaderboard"].startswith("### Leaderboard\n\n| row | mean place | 95 % | first | ISLES22")
    assert "| A | 1.50 | 1.00 to 1.50 |" in published["leaderboard"]
    assert "Not on every benchmark: lonely." in published["leaderboard"]
    assert (tmp_path / "leaderboard.csv").read_text().splitlines()[3].startswith("C,3.0,3.0,3.0,0.0,3.0,3.0")
    page = render_report(ReportContent("t", "d", (), (), leaderboard=board))
    assert '<h3 id="leaderboard">Leaderboard</h3>' in page
    write_leaderboard(None, tmp_path)
    assert not list(tmp_path.iterdir())
