"""The report is one file without outside resources, escapes everything, and says that it is not for the clinic."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from models.metrics import append_metrics
from tasks.benchmarks import BENCHMARKS
from tasks.figures import forest_plot
from tasks.missing import missing_table
from tasks.report import Picture, ReportContent, TableSection, render_report, training_section, write_report
from tasks.summary import Line, summarise
from tasks.tables import BenchmarkTable

PNG = forest_plot([Line(benchmark="b", row="r", metric="auroc", estimate=0.5, low=0.4, high=0.6)], "x")
EVIL = "<script>alert('x')</script>"


def section(name: str) -> TableSection:
    benchmark = BENCHMARKS[name]
    return TableSection(BenchmarkTable(benchmark=benchmark, lines=tuple(summarise(pd.DataFrame(), benchmark, {}))))


def content(**changes: object) -> ReportContent:
    values = {
        "title": "brainloom report",
        "date": "2026-01-01",
        "summary": [("cases", "12")],
        "provenance": [("store digest", "abc")],
    }
    return ReportContent(**{**values, **changes})  # type: ignore[arg-type]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href"}]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_one_file_with_no_outside_resource_and_balanced_tags(tmp_path: Path) -> None:
    page = content(
        qc=[Picture(PNG, "mosaic")],
        quarantine=[{"case": "c", "reason": "unreadable"}],
        absent=[section("adni")],
        benchmarks=[TableSection(section("abide-i").table, [Picture(PNG, "forest", "caption")])],
    )
    text = write_report(page, tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in tags.links)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "Not for clinical use" in text
    assert text.count("data:image/png") == 2


def test_everything_is_escaped() -> None:
    text = render_report(
        content(
            title=EVIL,
            notes=[EVIL],
            summary=[(EVIL, EVIL)],
            provenance=[(EVIL, EVIL)],
            quarantine=[{EVIL: EVIL}],
            qc=[Picture(PNG, EVIL + '" onerror="x', EVIL)],
        )
    )
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert 'alt="&lt;script&gt;' in text
    assert '" onerror' not in text


def test_empty_parts_say_so() -> None:
    text = render_report(content())
    for words in (
        "No benchmark has been scored yet.",
        "No training has been finished yet.",
        "Nothing was quarantined.",
    ):
        assert words in text


def test_only_pngs_are_embedded() -> None:
    with pytest.raises(ValueError, match=r"picture 'x' is no PNG: it starts with b'<svg"):
        render_report(content(qc=[Picture(b"<svg onload=1>", "x")]))


def test_a_training_shows_its_curves_and_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "brainmvp_tiny"
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "reconstruction.png").write_bytes(PNG)
    append_metrics(folder, {"kind": "train", "step": 1, "epoch": 0, "losses": {"loss": 1.0}})
    found = training_section(folder, {"recipe": "brainmvp_tiny"})
    assert [picture.alt for picture in found.pictures] == [
        "loss curves of brainmvp_tiny",
        "reconstruction of brainmvp_tiny",
    ]
    assert "brainmvp_tiny" in render_report(content(trainings=[found]))


def test_scores_without_a_modality_stand_below_their_benchmark() -> None:
    lines = [
        {"row": EVIL, "seed": 0, "dropped": "t1", "filling": filling, "region": "WT"}
        | {"dataset": "d", "subject": f"s{k}", "case": f"s{k}", "value": 0.1 * k}
        for filling in ("zero", "template")
        for k in range(4)
    ]
    missing = missing_table("Tumours without one modality", pd.DataFrame(lines), replicates=200)
    text = render_report(content(benchmarks=[TableSection(section("vsseg").table, further={"missing": missing})]))
    Tags().feed(text)
    assert text.index("VSseg") < text.index("<h4>Tumours without one modality</h4>")
    assert '<td>0.150 <span class="interval">[' in text
    assert EVIL not in text
