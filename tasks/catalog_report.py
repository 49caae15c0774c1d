"""The catalog for readers: counts, modality combinations and what was left out, as Markdown and rows."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from models.records import Scan
from tasks.catalog import CATALOG_FILE, CHANNEL_ORDER, CatalogResult
from tasks.markdown_text import cell_text
from tasks.phenotypes import PHENOTYPES_FILE
from tasks.versions import version_url

_FOLDERS = re.compile(r"(?<![^\s'\"(=])(?:[a-z][a-z0-9+.-]*://|/)(?:[^/\s'\"]+/)+", re.IGNORECASE)
"""The folders of an absolute path or a URL inside a sentence."""
SHOWN = 200
"""Rows of the left-out table in the report; the catalog holds all."""


def left_out_table(scans: Iterable[Scan]) -> list[dict[str, str]]:
    """Return one row per scan that was left out: dataset, case, file, reason, detail."""
    return [
        {
            "dataset": scan.dataset,
            "case": scan.case,
            "file": scan.path.rsplit("/", 1)[-1],
            "reason": scan.reason,
            "detail": short_detail(scan.detail, scan.path.rsplit("/", 1)[-1]),
        }
        for scan in scans
        if scan.status != "ok"
    ]


def short_detail(detail: str, file: str) -> str:
    """Return a detail for a row that names the file already: without that name and without folders of this machine."""
    text = _FOLDERS.sub("", detail)
    return text.removeprefix(file).lstrip(": ") or text if file else text


def modality_combinations(scans: Iterable[Scan]) -> list[dict[str, Any]]:
    """Return how many cases of each dataset have which modalities, most frequent first."""
    cases: dict[tuple[str, str], set[str]] = defaultdict(set)
    for scan in scans:
        if scan.status == "ok":
            cases[scan.dataset, scan.case].add(scan.modality)
    counts = Counter((dataset, _combination(found)) for (dataset, _), found in cases.items())
    rows = sorted(counts.items(), key=lambda item: (item[0][0], -item[1], item[0][1]))
    return [{"dataset": dataset, "modalities": names, "cases": count} for (dataset, names), count in rows]


def _combination(found: set[str]) -> str:
    return " ".join(name for name in CHANNEL_ORDER if name in found)


def catalog_report(result: CatalogResult, name_files: bool = True) -> str:
    """Return the catalog in Markdown: counts, grids, cases by modality combination, what was left out and why.

    Without `name_files` no file and no case is named, so the page can be shown where subject ids must not be.
    """
    report = result.report
    lines = [
        f"**{report['cases']:,} cases, {report['scans']:,} scans, {report['labels']:,} labels** "
        f"in {len(report['datasets'])} datasets; {report['left_out']:,} files left out.",
        "",
        "### Datasets",
        "",
        *markdown_table(_dataset_rows(result)),
        "",
        "### Cases by modality combination",
        "",
        *markdown_table(modality_combinations(result.scans)),
    ]
    missing = left_out_table(result.scans)
    if missing and not name_files:
        lines += ["", "### Left out", "", *markdown_table(_reason_rows(result))]
        missing = []
    if missing:
        lines += ["", "### Left out", "", *markdown_table(missing[:SHOWN])]
    if len(missing) > SHOWN:
        lines += ["", f"... and {len(missing) - SHOWN:,} more; see `{CATALOG_FILE}`."]
    lines += _phenotype_lines(result, name_files)
    version = version_url(PHENOTYPES_FILE, report["phenotypes_digest"]).removeprefix("./")
    kept = f"phenotypes of {report['subjects']:,} subjects, kept as `{version}`"
    return "\n".join([*lines, "", f"Digest `{report['digest'][:16]}`; {kept}.", ""])


def _phenotype_lines(result: CatalogResult, name_subjects: bool) -> list[str]:
    """Return the section about phenotype tables; empty when nothing is wrong with them."""
    if not result.issues:
        return []
    if name_subjects:
        rows: list[dict[str, Any]] = [asdict(issue) for issue in result.issues[:SHOWN]]
    else:
        counts = Counter((issue.dataset, issue.problem) for issue in result.issues)
        rows = [{"dataset": dataset, "problem": problem, "subjects": n} for (dataset, problem), n in counts.items()]
    more = len(result.issues) - SHOWN
    return ["", "### Phenotypes", "", *markdown_table(rows), *(["", f"... and {more:,} more."] if more > 0 else [])]


def _reason_rows(result: CatalogResult) -> list[dict[str, Any]]:
    datasets = result.report["datasets"]
    return [
        {"dataset": name, "reason": reason, "files": count}
        for name, counts in datasets.items()
        for reason, count in counts["reasons"].items()
    ]


def _dataset_rows(result: CatalogResult) -> list[dict[str, Any]]:
    rows = []
    for name, counts in result.report["datasets"].items():
        images = [scan for scan in result.scans if scan.dataset == name and scan.status == "ok"]
        rows.append(
            {
                "dataset": name,
                "cases": counts["cases"],
                "scans": counts["scans"],
                "labels": counts["labels"],
                "left out": counts["left_out"],
                "MB": round(sum(scan.size_bytes for scan in images) / 1e6, 1),
                "voxel size (mm)": _span([edge for scan in images for edge in scan.spacing_mm]),
                "shape": _commonest(images),
            }
        )
    return rows


def _span(values: list[float]) -> str:
    return f"{min(values):.2g} to {max(values):.2g}" if values else ""


def _commonest(scans: list[Scan]) -> str:
    shapes = Counter(scan.shape for scan in scans if scan.shape).most_common()
    if not shapes:
        return ""
    text = " x ".join(map(str, shapes[0][0]))
    return text if len(shapes) == 1 else f"{text} and {len(shapes) - 1} others"


def markdown_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table; the first row names the columns. No rows: a line that says so."""
    if not rows:
        return ["none"]

    def cell(value: Any) -> str:
        return cell_text(f"{value:,}" if isinstance(value, int) else str(value))

    names = list(rows[0])
    body = ["| " + " | ".join(cell(row[name]) for name in names) + " |" for row in rows]
    return ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names), *body]
