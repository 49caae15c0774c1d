"""The page of a comparison: rows against benchmarks, read from the tables that the flows wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.benchmark_summary import PROTOCOLS, find_any, read_part, to_html, to_markdown
from tasks.summary import Line
from tasks.tables import BenchmarkTable, to_csv

NAMES = ("phantom-diagnosis", "phantom-control", "adni")


def line(benchmark: str, row: str, estimate: float, kind: str = "ours", **more: float) -> Line:
    ends = {"low": estimate - 0.1, "high": estimate + 0.1, "n": 12}
    return Line(benchmark=benchmark, row=row, metric="auroc", kind=kind, estimate=estimate, **ends, **more)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    tables = {
        "phantom-diagnosis": [
            line("phantom-diagnosis", "A", 0.8),
            line("phantom-diagnosis", "scratch", 0.6, p_holm=0.01),
            line("phantom-diagnosis", "elsewhere", 0.9, kind="published"),
            Line(benchmark="phantom-diagnosis", row="A", metric="f1", estimate=0.1),
        ],
        "phantom-control": [line("phantom-control", "A", 0.7), line("phantom-control", "majority", 0.5, p_holm=0.2)],
        "adni": [Line(benchmark="adni", row="no data", metric="", kind="no data")],
    }
    folder = tmp_path / "tables"
    folder.mkdir()
    for name, lines in tables.items():
        table = BenchmarkTable(benchmark=find_any(name), lines=tuple(lines))
        (folder / f"{name}.csv").write_text(to_csv(table))
    return tmp_path


def test_rows_against_benchmarks(workspace: Path) -> None:
    part = read_part(workspace, "fine-tune", NAMES)
    assert part.header == ["row", "Phantom diagnosis: AUROC (n = 12)", part.header[2], "ADNI MCI vs HC: AUROC"]
    assert part.body == [
        ["A", "0.800 [0.700, 0.900]", "0.700 [0.600, 0.800]", "–"],
        ["scratch", "0.600* [0.500, 0.700]", "–", "–"],
        ["majority", "–", "0.500 [0.400, 0.600]", "–"],
    ]
    assert part.statements[1:] == [
        "*: differs from the first row, p < 0.05 after Holm's correction inside a benchmark.",
        "No data in the store: ADNI MCI vs HC.",
    ]


def test_the_page_says_where_everything_lies(workspace: Path) -> None:
    parts = [read_part(workspace, "fine-tune", NAMES)]
    text = to_markdown("brainloom benchmark: A", parts)
    assert text.startswith("# brainloom benchmark: A\n\n## Fine-tuning\n\n| row |")
    assert "Report: `report/index.html`; tables: `tables/`; scores of every case: `scores.parquet`." in text
    page = to_html("<A>", parts, "2026-01-01")
    assert "<h1>&lt;A&gt;</h1>" in page
    assert '<a href="../report/index.html#phantom-control">' in page
    assert '<td>0.600* <span class="interval">[0.500, 0.700]</span></td>' in page


def test_predictions_of_others_are_marked(workspace: Path) -> None:
    lines = [line("phantom-tumour", "A", 0.8), line("phantom-tumour", "nnU-Net", 0.9, kind="others")]
    primary = tuple(one.replace(metric="dice", region="mean") for one in lines)
    table = BenchmarkTable(benchmark=find_any("phantom-tumour"), lines=primary)
    (workspace / "tables" / "phantom-tumour.csv").write_text(to_csv(table))
    part = read_part(workspace, "fine-tune", ["phantom-tumour", "phantom-control"])
    assert [cells[0] for cells in part.body] == ["A", "nnU-Net (predictions of others)", "majority"]
    assert part.body[1][1] == "0.900 [0.800, 1.000]"
    assert part.statements[-1].startswith("Predictions of others: nnU-Net. How and on whom their networks were trained")


def test_without_any_data(workspace: Path) -> None:
    part = read_part(workspace, "fine-tune", ["adni"])
    assert part.body == [["no data", "–"]]
    assert part.statements[1:] == ["No data in the store: ADNI MCI vs HC."]


def test_every_protocol_is_known() -> None:
    assert set(PROTOCOLS) == {"fine-tune", "probe", "prompt"}
    with pytest.raises(ValueError, match=r"unknown benchmark 'x'; known: phantom-tumour, .*openbhb-age"):
        find_any("x")
