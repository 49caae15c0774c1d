"""One file with everything in it and nothing outside; the same for the UI within its limits."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from qc_phantoms import DEFECTS, write_qc_store

from models.store import StoredDataset
from tasks import qc_report
from tasks.forget import forget
from tasks.qc_content import StoreQuality, gather
from tasks.qc_measures import MEASURES
from tasks.qc_report import (
    keep_page,
    kept_page,
    qc_csv,
    qc_page,
    qc_stamp,
    remove_qc,
    render_qc,
    report_urls,
    write_qc,
)

EVIL = "<script>alert('x')</script>"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced, and collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_qc_store(tmp_path_factory.mktemp("report"), clean=10)


def lost(count: int, detail: str = "truncated") -> list[dict[str, str]]:
    line = {"dataset": "phantom", "reason": "unreadable", "detail": detail}
    return [line | {"case": f"lost-{n}", "file": f"lost-{n}_t1.nii.gz"} for n in range(count)]


@pytest.fixture(scope="module")
def found(store: str) -> StoreQuality:
    return gather(store, lost(60), mosaics=8)


def test_one_file_without_outside_resources(store: str, found: StoreQuality) -> None:
    text = render_qc(found)
    page = Page(text)
    sources = [attributes.get("src") for attributes in page.all("img") + page.all("script")]
    assert all(source is None or source.startswith("data:image/png;base64,") for source in sources)
    links = [attributes["href"] for attributes in page.all("a")]
    ids = {attributes.get("id") for _, attributes in page.tags}
    assert links
    assert all(link and link.startswith("#") and link[1:] in ids for link in links)
    assert not page.all("link")
    assert not re.search(r"url\(|@import|https?://", re.sub(r"base64,[^\"]*", "", text))
    folder = str(Path(store).parent)
    assert folder not in text + qc_csv(found) + qc_page(found)


def test_the_only_script_is_the_one_that_the_policy_names(found: StoreQuality) -> None:
    text = render_qc(found)
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text


def test_it_names_every_case_that_is_out_and_why(found: StoreQuality) -> None:
    text = render_qc(found)
    assert all(f"<td>lost-{n}</td>" in text for n in range(60))
    assert {case["case"] for case in found.outliers} == set(DEFECTS)
    for case in found.outliers:
        assert all(reason in text for reason in case["why"])
    assert all(measure.means in unescape(text) for measure in MEASURES)


def test_mosaics_come_in_pages_the_worst_first(found: StoreQuality) -> None:
    page = Page(render_qc(found))
    names = [attributes["alt"] for attributes in page.all("img")]
    worst = [case["case"] for case in found.outliers]
    assert names[: len(worst)] == [f"Slices of phantom {case}" for case in worst]
    assert len(names) == 8
    text = render_qc(found)
    assert "Page 1 of 2: cases 1 to 6" in text
    assert "Page 2 of 2: cases 7 to 8" in text


def test_pictures_and_charts_have_words_and_tables_have_heads(found: StoreQuality) -> None:
    page = Page(render_qc(found))
    assert all(attributes["alt"] for attributes in page.all("img"))
    assert all(attributes["aria-label"] for attributes in page.all("svg"))
    assert all(attributes.get("scope") in {"col", "row"} for attributes in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))


def test_texts_are_escaped(store: str) -> None:
    bad = gather(store, lost(1, detail=EVIL), mosaics=0)
    assert EVIL not in render_qc(bad)
    assert "&lt;script&gt;" in render_qc(bad)


def test_without_mosaics_no_voxel_is_read(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StoredDataset, "read_crop", lambda *_: pytest.fail("a voxel was read"))
    assert "<img" not in render_qc(gather(store, [], mosaics=0))


def test_the_table_holds_all_cases_and_measures(found: StoreQuality) -> None:
    rows = list(csv.DictReader(io.StringIO(qc_csv(found))))
    assert len(rows) == 10 + len(DEFECTS)
    assert {row["case"] for row in rows[: len(DEFECTS)]} == set(DEFECTS)
    assert {"score", "reasons", "missing", "flags", "snr_t1", "drift_t2", "label_ml"} <= set(rows[0])
    (row,) = (row for row in rows if row["case"] == "incomplete")
    assert (row["missing"], row["snr_t2"]) == ("t2", "")
    assert float(row["snr_t1"]) > 0


def test_the_page_for_the_ui_says_the_same_in_less(found: StoreQuality, monkeypatch: pytest.MonkeyPatch) -> None:
    text = qc_page(found, "/x/qc-qc.html")
    assert text.count("](data:image/png;base64,") == 3
    assert "Everything: `qc-qc.html` beside the store." in text
    assert "| phantom | 16 | 0 | 0 |" in text
    for case in found.outliers:
        assert f"| phantom | {case['case']} | {case['deviation']} | {case['why'][0]}" in text
    assert "lost-29" in text
    assert "... and 30 more." in text
    monkeypatch.setattr(qc_report, "UI_BYTES", int(1.5 * len(found.datasets[0].pictures[0].uri)))
    text = qc_page(found)
    assert text.count("](data:image/png;base64,") == 1
    assert "2 more are in the HTML page." in text


def test_equal_stores_give_equal_bytes(store: str, found: StoreQuality) -> None:
    assert render_qc(gather(store, lost(60), mosaics=8)) == render_qc(found)


def test_it_lies_beside_the_store_or_where_it_is_told(store: str, found: StoreQuality, tmp_path: Path) -> None:
    page, table = write_qc(store, found)
    folder = Path(store).parent
    assert (page, table) == (str(folder / "qc-qc.html"), str(folder / "qc-qc.csv"))
    assert Path(page).read_text(encoding="utf-8") == render_qc(found)
    remove_qc(store)
    assert not Path(page).exists()
    assert not Path(table).exists()
    page, _ = write_qc(store, found, tmp_path / "new")
    assert Path(page) == tmp_path / "new" / "qc-qc.html"
    assert Path(page).exists()
    assert report_urls("s3://bucket/a/x.zarr/") == ("s3://bucket/a/x-qc.html", "s3://bucket/a/x-qc.csv")


def test_a_page_is_kept_until_the_cases_or_the_quarantine_change(store: str, found: StoreQuality) -> None:
    stamp = qc_stamp(store, lost(2))
    assert stamp == qc_stamp(store, lost(2)) != qc_stamp(store, lost(3))
    write_qc(store, found)
    assert kept_page(store, stamp) is None
    keep_page(store, stamp, "the page")
    assert kept_page(store, stamp) == "the page"
    assert kept_page(store, qc_stamp(store, lost(3))) is None
    Path(report_urls(store)[0]).unlink()
    assert kept_page(store, stamp) is None
    remove_qc(store)
    assert not (Path(store) / "_build" / "qc.json").exists()


def test_forgetting_a_subject_takes_the_report_with_it(tmp_path: Path) -> None:
    url = write_qc_store(tmp_path, clean=2, defects=False)
    written = [Path(path) for path in write_qc(url, gather(url, [], mosaics=1))]
    forget(url, "phantom", "c01")
    assert [path.exists() for path in written] == [False, False]
    assert "c01" not in render_qc(gather(url, [], mosaics=1))
