"""Text in Markdown that stays text, whatever names, paths and reasons of others hold."""

from __future__ import annotations

import re

_MARKUP = re.compile(r"\||<(?=[A-Za-z/!?])|(?<=\])\(|!(?=\[)")
"""What ends a cell, begins HTML, makes a link of brackets, or a picture of a link. Intervals, `p < 0.05` and code are
left as they read."""
_ESCAPED = re.compile(r"\\([|<(!])")


def cell_text(text: str) -> str:
    """Return the text as a cell of a Markdown table: one line, and neither HTML nor a link."""
    return _MARKUP.sub(r"\\\g<0>", text.replace("\n", " "))


def told_by_cell(cell: str) -> str:
    """Return what a reader sees of a cell of `cell_text`."""
    return _ESCAPED.sub(r"\1", cell)


def alt_text(text: str) -> str:
    """Return the text as the alternative of a picture: without what could end it."""
    return re.sub(r"[\[\]<>\n]", " ", text)
