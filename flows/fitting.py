"""Tables that fit the page of an artifact.

Prefect's UI never breaks the line of a cell: what is wider than the page is cut off behind a scroll bar. So the widest
cells are broken here, between words.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

PAGE_PX = 868
"""Room for a table in a window of 1440 pixels."""
LETTER_PX, PADDING_PX = 7.2, 24
"""Of a letter on average, and of a cell's left and right."""
WIDE, NARROWED = 36, 24
"""Letters from which a column counts as prose, and how many of it stay in a line at least."""
TABLE_CELL = 44
"""Letters in a line of a table artifact: its cells are data for programs too, so only long prose is broken."""
_UNBROKEN = re.compile(r"`[^`]*`|!?\[[^\]]*\](?:\([^)]*\))?")
"""Code, links and intervals: spaces inside them are no place for a line break."""
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_RULE = re.compile(r"\|(?:\s*:?-+:?\s*\|)+")
_SPACE = "\0"


def fit_cell(text: str) -> str:
    """Return a cell of a table artifact with prose broken into lines."""
    return "\n".join(_broken(text, TABLE_CELL)) if len(text) > TABLE_CELL else text


def fit_markdown(markdown: str) -> str:
    """Return Markdown whose tables are broken by `<br>` as far as they are wider than the page, all else as it is."""
    found: list[str] = []
    table: list[str] = []
    for line in [*markdown.split("\n"), ""]:
        if line.startswith("|"):
            table.append(line)
            continue
        found += _fit_table(table)
        table = []
        found.append(line)
    return "\n".join(found[:-1])


def _fit_table(lines: Sequence[str]) -> Sequence[str]:
    """Return the lines of a Markdown table that fits the page; lines that are no table come back as they are."""
    if len(lines) < 3 or not _RULE.fullmatch(lines[1].strip()):
        return lines
    rows = [_cells(line) for line in (lines[0], *lines[2:])]
    if len({len(row) for row in rows}) > 1:
        return lines
    columns = [list(column) for column in zip(*rows, strict=True)]
    limits = _limits(columns)
    fitted = [["<br>".join(_broken(text, limits[k])) for text in column] for k, column in enumerate(columns)]
    head, *body = ["| " + " | ".join(row) + " |" for row in zip(*fitted, strict=True)]
    return [head, lines[1], *body]


def _limits(columns: Sequence[Sequence[str]]) -> list[int]:
    """Return how many letters a line of each column may have: the widest ones give way until the page is filled."""
    limits = [max(len(_seen(text)) for text in column) for column in columns]
    least = []
    for column, width in zip(columns, limits, strict=True):
        word = max((len(_seen(part)) for text in column for part in _protected(text).split(" ")), default=1)
        least.append(max(word, min(width, NARROWED if width > WIDE else 1)))
    while sum(limits) * LETTER_PX + len(limits) * PADDING_PX > PAGE_PX:
        yielding = [k for k, width in enumerate(limits) if width > least[k]]
        if not yielding:
            break
        limits[max(yielding, key=limits.__getitem__)] -= 1
    return limits


def _broken(text: str, width: int) -> list[str]:
    if len(_seen(text)) <= width:
        return [text]
    lines = textwrap.wrap(_protected(text), max(1, width), break_long_words=False, break_on_hyphens=False)
    return [line.replace(_SPACE, " ") for line in lines]


def _protected(text: str) -> str:
    return _UNBROKEN.sub(lambda found: found[0].replace(" ", _SPACE), text)


def _seen(text: str) -> str:
    """Return what is painted of a cell."""
    return _LINK.sub(r"\1", text).replace("`", "")


def _cells(line: str) -> list[str]:
    return [text.strip() for text in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
