"""The quality report of a store: one self-contained HTML page, a table of all measures, and a page for the UI."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from infra import storage
from models.store_layout import BUILD, CASES
from tasks.catalog_report import markdown_table
from tasks.markdown_text import alt_text
from tasks.qc_chart import HEIGHT, REACH, WIDTH, place
from tasks.qc_content import MOSAICS, StoreQuality
from tasks.qc_outliers import COMMON, FACT_Z, MIN_CASES, OUTLIER_Z
from tasks.report import page_template

PER_PAGE = 6
"""Mosaics on one page of a dataset."""
SHOWN_CASES = 5000
"""Lines of a dataset's table in the HTML page; the CSV has all."""
UI_BYTES = 1_500_000
"""All pictures in the UI together: Prefect keeps an artifact twice in its database."""
UI_ROWS = 30
SORT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const compare = (a, b) => a === "" || b === "" ? (a === "") - (b === "")
        : (down ? -1 : 1) * a.localeCompare(b, undefined, {numeric: true});
      body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
    });
  });
}
"""
"""Sorts a table by a column. Without scripts the tables are plain."""


def report_urls(store_url: str) -> tuple[str, str]:
    """Return where the report of a store lies: `<store>-qc.html` and `<store>-qc.csv` beside it."""
    path = store_url.rstrip("/") if not storage.is_local(store_url) else str(storage.local_path(store_url))
    folder, _, name = path.rpartition("/")
    stem = name.removesuffix(".zarr")
    return f"{folder}/{stem}-qc.html", f"{folder}/{stem}-qc.csv"


def write_qc(store_url: str, found: StoreQuality, out: str | Path | None = None) -> tuple[str, str]:
    """Write the page and the table beside the store, or as the same names into the folder `out`; returns their URLs."""
    page, table = report_urls(store_url)
    if out is not None:
        page, table = (storage.join(out, url.rpartition("/")[2]) for url in (page, table))
    storage.write_bytes(page, render_qc(found).encode())
    storage.write_bytes(table, qc_csv(found).encode())
    return page, table


def qc_stamp(store_url: str, quarantine: Sequence[Mapping[str, Any]]) -> str:
    """Return what the report is made from as a digest: our version, the table of cases, and what is not used."""
    cases = storage.read_bytes(storage.join(store_url, CASES))
    unused = json.dumps([version("brainloom"), *(dict(row) for row in quarantine)])
    return hashlib.sha256(cases + unused.encode()).hexdigest()


def kept_page(store_url: str, stamp: str) -> str | None:
    """Return the Markdown page that was made from this, or None when it or the report beside the store is missing."""
    if not all(storage.exists(url) for url in report_urls(store_url)):
        return None
    try:
        kept = storage.read_json(_page_url(store_url))
    except (FileNotFoundError, ValueError):
        return None
    return str(kept["page"]) if kept["stamp"] == stamp else None


def keep_page(store_url: str, stamp: str, page: str) -> None:
    """Keep the Markdown page for the next flow run: making it reads all cases."""
    storage.write_json(_page_url(store_url), {"stamp": stamp, "page": page})


def _page_url(store_url: str) -> str:
    return storage.join(store_url, BUILD, "qc.json")


def remove_qc(store_url: str) -> None:
    """Delete the report beside a store and the kept page, which name subjects and show them."""
    for url in (*report_urls(store_url), _page_url(store_url)):
        storage.delete(url)


def render_qc(found: StoreQuality) -> str:
    """Return the HTML page."""
    digest = base64.b64encode(hashlib.sha256(SORT.encode()).digest()).decode()
    return page_template("qc.html").render(
        found=found,
        measures=list(dict.fromkeys(column.measure for column in found.ranking.columns.values())),
        sort=SORT,
        script=f"'sha256-{digest}'",
        limits={"z": OUTLIER_Z, "fact": FACT_Z, "cases": MIN_CASES, "common": f"{COMMON:.0%}", "shown": SHOWN_CASES},
        chart={"width": WIDTH, "height": HEIGHT, "reach": REACH, "ticks": {n: place(n) for n in (-8, -4, 0, 4, 8)}},
        pages={
            dataset.name: [dataset.pictures[n : n + PER_PAGE] for n in range(0, len(dataset.pictures), PER_PAGE)]
            for dataset in found.datasets
        },
        per_page=PER_PAGE,
    )


def qc_csv(found: StoreQuality) -> str:
    """Return all stored cases with all measures and what was found, as CSV; in the order of the report."""
    ranking = found.ranking
    table = ranking.cases[["dataset", "case", "subject", "score"]].assign(
        reasons=["; ".join(reasons) for reasons in ranking.cases["reasons"]],
        missing=[" ".join(names) for names in ranking.cases["missing"]],
        flags=["; ".join(facts.values()) for facts in ranking.cases["facts"]],
    )
    return table.join(ranking.values).to_csv(index=False, float_format="%.5g", lineterminator="\n")


def qc_page(found: StoreQuality, page: str = "") -> str:
    """Return the report as Markdown for the UI, its pictures within UI_BYTES; page: where the HTML page lies."""
    counts = [{"dataset": dataset.name, **dataset.counts} for dataset in found.datasets]
    where = [f"Everything: `{page.rpartition('/')[2]}` beside the store.", ""] if page else []
    return "\n".join(
        [
            *["### Cases", "", *markdown_table(counts), "", *where],
            *["### Pictures", "", *_pictures(found)],
            *["### Cases that stand out", "", *_outliers(found)],
            *["### Flags", "", *markdown_table(_flags(found)), ""],
            *["### Left out and quarantined", "", *_shortened([dict(row) for row in found.quarantine])],
            *["### Subjects that look alike", "", *_shortened(found.pairs)],
        ]
    )


def _pictures(found: StoreQuality) -> list[str]:
    wanted = found.first_pictures(MOSAICS)
    lines: list[str] = []
    size = 0
    for shown, picture in enumerate(wanted):
        size += len(picture.uri)
        if size > UI_BYTES:
            return [*lines, f"{len(wanted) - shown} more are in the HTML page.", ""]
        lines += [f"![{alt_text(picture.alt)}]({picture.uri})", ""]
    return lines or ["none", ""]


def _outliers(found: StoreQuality) -> list[str]:
    rows = [
        {
            "dataset": case["dataset"],
            "case": case["case"],
            "deviation": case["deviation"],
            "why": "; ".join(case["why"][:3]) + (f"; and {len(case['why']) - 3} more" if len(case["why"]) > 3 else ""),
        }
        for case in found.outliers
    ]
    notes = [line for dataset in found.datasets if dataset.ranked for line in (dataset.ranked, "")]
    rule = f"More than {OUTLIER_Z} robust deviations from the dataset on a bad side, or something rare in it."
    return [rule, "", *notes, *_shortened(rows)]


def _flags(found: StoreQuality) -> list[dict[str, object]]:
    return [
        {"dataset": dataset.name, "flag (of one case)": words, "cases": count}
        for dataset in found.datasets
        for words, count in dataset.facts
    ][:UI_ROWS]


def _shortened(rows: list[dict[str, object]]) -> list[str]:
    more = len(rows) - UI_ROWS
    return [*markdown_table(rows[:UI_ROWS]), "", *([f"... and {more:,} more.", ""] if more > 0 else [])]
