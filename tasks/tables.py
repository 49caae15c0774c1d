"""Benchmark tables as Markdown, CSV and LaTeX (booktabs), each saying n, interval, budget and how sure it is.

The digest of a table covers its content and not the date on which it was written.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from models.records import Record, digest_of
from tasks.benchmarks import Benchmark
from tasks.statistics import INTERVAL_METHOD, one_subject_points
from tasks.summary import MEAN, PRETRAINED, Line, primary_metric

METRIC_NAMES: dict[str, str] = {
    "dice": "Dice",
    "hd95": "HD95",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "f1": "macro F1",
}


class BenchmarkTable(Record):
    """Everything that one printed table shows."""

    benchmark: Benchmark
    lines: tuple[Line, ...]
    budget: str = ""
    """Same for every trained row."""
    provenance: tuple[tuple[str, str], ...] = ()
    """Name and digest of what it was made from."""
    date: str = ""
    """ISO date of writing; not part of the digest."""
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the content without the date; floats are rounded to 9 digits."""
        content = self.model_dump(mode="json", exclude={"date"})
        return digest_of(_rounded(content))

    @property
    def has_scores(self) -> bool:
        """Whether any number of ours is in it."""
        return any(line.kind not in {"no data", "published"} for line in self.lines)


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 9)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


def columns_of(table: BenchmarkTable) -> list[tuple[str, str]]:
    """Return the (metric, region) columns in order: those of the benchmark, then any that only published rows have."""
    found: list[tuple[str, str]] = []
    for line in table.lines:
        if line.metric and (line.metric, line.region) not in found:
            found.append((line.metric, line.region))
    order = {metric: k for k, metric in enumerate(METRIC_NAMES)}
    return sorted(found, key=lambda column: (order.get(column[0], 99), column[1] != MEAN))


def heading(metric: str, region: str) -> str:
    """Return the words above a column, e.g. `Dice ET` or `mean Dice`."""
    name = METRIC_NAMES.get(metric, metric)
    unit = " (mm)" if metric == "hd95" else ""
    return (f"mean {name}" if region == MEAN else f"{name} {region}".strip()) + unit


def number(value: float | None, metric: str) -> str:
    """Return a value as printed: three decimals for shares, one for millimetres, an en dash for none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:z.1f}" if metric == "hd95" else f"{value:z.3f}"


def cell(line: Line | None) -> str:
    """Return estimate and interval of a line as printed, e.g. `0.712 [0.650, 0.771]`."""
    if line is None or line.estimate is None:
        return "–"
    if line.kind == "published":
        return number(line.estimate, line.metric)
    if line.low is None or line.high is None:
        return f"{number(line.estimate, line.metric)} [no interval]"
    return f"{number(line.estimate, line.metric)} [{number(line.low, line.metric)}, {number(line.high, line.metric)}]"


def p_text(p: float | None) -> str:
    """Return a p-value as printed."""
    if p is None:
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _rows(table: BenchmarkTable) -> list[tuple[tuple[str, str, str], list[Line]]]:
    """Return (row, kind, source) with its lines; published rows of one method but another source stay apart."""
    grouped: dict[tuple[str, str, str], list[Line]] = {}
    for line in table.lines:
        if line.kind != "no data":
            grouped.setdefault((line.row, line.kind, line.source), []).append(line)
    return list(grouped.items())


def grid(table: BenchmarkTable) -> tuple[list[str], list[list[str]]]:
    """Return the header and the printed cells of a table. Every cell is a string; no NaN can appear."""
    columns = columns_of(table)
    main = primary_metric(table.benchmark)
    header = ["row", "n", "seeds", *(heading(*column) for column in columns), f"p (Holm), {heading(*main)}", "basis"]
    body: list[list[str]] = []
    if not table.has_scores:
        body.append(["no data", "–", "–", *(["–"] * len(columns)), "–", table.benchmark.basis])
    for (row, kind, source), lines in _rows(table):
        by_column = {(line.metric, line.region): line for line in lines}
        name = f"{row} (published: {source})" if kind == "published" else row
        test = by_column.get(main)
        seeds = str(lines[0].seeds) if lines[0].seeds else "–"
        cells = [cell(by_column.get(column)) for column in columns]
        body.append(
            [name, str(lines[0].n or "–"), seeds, *cells, p_text(test.p_holm if test else None), lines[0].basis or "–"]
        )
    return header, body


def statements(table: BenchmarkTable) -> list[str]:
    """Return the sentences under a table: n, worth of a subject, interval, tests, budget, undefined scores, basis."""
    found = [f"Basis of the protocol: {table.benchmark.basis}."]
    if table.benchmark.note:
        found.append(f"About the data: {table.benchmark.note}.")
    if table.has_scores:
        n = max(line.n for line in table.lines if line.kind != "published")
        found += [
            f"n = {n} test subjects; one subject is worth {one_subject_points(n):.2f} points of a mean or an accuracy.",
            f"Brackets: {INTERVAL_METHOD}.",
            f"p: paired bootstrap of {PRETRAINED} against the row, over subjects, Holm-corrected over all such rows.",
            f"Budget of every trained row: {table.budget or 'none trained'}.",
            *_seed_statements(table),
            *_undefined_statements(table),
            *_interval_statements(table),
        ]
    if any(line.kind == "published" for line in table.lines):
        found.append("Published rows are other people's numbers on their own splits: shown, never tested against.")
    if table.benchmark.control:
        meaning = {
            "positive": "Positive control: a strong effect that must be found.",
            "negative": "Negative control: labels shuffled anew for every seed, so AUROC intervals should contain 0.5.",
        }
        found.append(meaning[table.benchmark.control])
    return [*found, *table.notes]


def _undefined_statements(table: BenchmarkTable) -> list[str]:
    counts = [
        f"{line.row} {line.region}: {line.undefined}"
        for line in table.lines
        if line.metric == "hd95" and line.undefined and line.region != MEAN
    ]
    rule = "HD95 is undefined where a mask is empty; such cases (counted over all seeds) are left out of its mean"
    return [f"{rule}: {', '.join(counts)}."] if counts else []


def _interval_statements(table: BenchmarkTable) -> list[str]:
    """Return one sentence a note, naming the rows and columns that it is about."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in table.lines:
        if line.note:
            found.setdefault(line.note, {}).setdefault(line.row, []).append(heading(line.metric, line.region))
    about = {
        note: "; ".join(f"{row} ({', '.join(names)})" for row, names in rows.items()) for note, rows in found.items()
    }
    return [f"{note[0].upper()}{note[1:]}: {about[note]}." for note in sorted(about)]


def _seed_statements(table: BenchmarkTable) -> list[str]:
    """Return how much the seeds alone move the primary metric: intervals hold the seeds fixed."""
    column = primary_metric(table.benchmark)
    spread = [
        f"{line.row} {line.seed_sd:.3f}"
        for line in table.lines
        if line.seed_sd is not None and (line.metric, line.region) == column
    ]
    words = f"Intervals hold the trained seeds fixed; standard deviation between seeds of {heading(*column)}"
    return [f"{words}: {', '.join(spread)}."] if spread else []


def to_markdown(table: BenchmarkTable, title_level: int = 2) -> str:
    """Return the table as Markdown with its statements."""
    lines = [f"{'#' * title_level} {table.benchmark.title}", ""]
    for header, body in _narrow_grids(table):
        lines += [*markdown_rows(header, body), ""]
    lines += [f"- {sentence}" for sentence in statements(table)]
    lines += [f"- {name}: `{digest}`" for name, digest in (*table.provenance, ("table digest", table.digest[:16]))]
    lines += [f"- Written on {table.date}."] if table.date else []
    return "\n".join(lines) + "\n"


def _narrow_grids(table: BenchmarkTable) -> list[tuple[list[str], list[list[str]]]]:
    """Return the grid as one of Dice and one of HD95, for pages of limited width; one grid for a classification.

    The basis is left out: a sentence under the table says it. Rows without a number in the second grid are left out.
    """
    header, body = grid(table)
    millimetres = [k for k, name in enumerate(header) if name.endswith("(mm)")]
    first = [k for k in range(len(header) - 1) if k not in millimetres]
    found = [([header[k] for k in first], [[row[k] for k in first] for row in body])]
    if rows := [row for row in body if any(row[k] != "–" for k in millimetres)]:
        second = [0, 1, 2, *millimetres]
        found.append(([header[k] for k in second], [[row[k] for k in second] for row in rows]))
    return found


def markdown_rows(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [_markdown_row(header), _markdown_row(["---"] * len(header)), *map(_markdown_row, body)]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in cells) + " |"


def to_csv(table: BenchmarkTable) -> str:
    """Return every line in full precision, one number a line, as CSV; empty where there is no number."""
    names = list(Line.model_fields)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    for line in table.lines:
        writer.writerow({name: "" if value is None else value for name, value in line.model_dump().items()})
    return buffer.getvalue()


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def latex_text(text: str) -> str:
    """Return text with LaTeX's special characters escaped."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def to_latex(table: BenchmarkTable) -> str:
    """Return the table as a LaTeX `table` with booktabs rules; published rows follow a rule of their own."""
    header, body = grid(table)
    kinds = (["no data"] if not table.has_scores else []) + [kind for (_, kind, _), _ in _rows(table)]
    rows: list[str] = []
    for k, (cells, kind) in enumerate(zip(body, kinds, strict=True)):
        if kind == "published" and k and kinds[k - 1] != "published":
            rows.append(r"\midrule")
        rows.append(" & ".join(map(latex_text, cells)) + r" \\")
    caption = " ".join([f"{table.benchmark.title}.", *statements(table)])
    return "\n".join(
        [
            r"\begin{table}", r"\centering\small", rf"\begin{{tabular}}{{l{'r' * (len(header) - 2)}l}}", r"\toprule",
            " & ".join(map(latex_text, header)) + r" \\", r"\midrule", *rows, r"\bottomrule", r"\end{tabular}",
            rf"\caption{{{latex_text(caption)}}}", rf"\label{{tab:{table.benchmark.name}}}", r"\end{table}", "",
        ]
    )  # fmt: skip


def artifact_rows(table: BenchmarkTable) -> list[dict[str, str]]:
    """Return the printed cells as rows for a Prefect table artifact: strings only, so nothing in it is infinite.

    The artifact's page is narrow: of several regions only the mean is shown, and the basis is left out.
    """
    header, body = grid(table)
    columns = columns_of(table)
    means = {metric for metric, region in columns if region == MEAN}
    hidden = {heading(*column) for column in columns if column[0] in means and column[1] != MEAN} | {"basis"}
    return [{name: text for name, text in zip(header, row, strict=True) if name not in hidden} for row in body]
