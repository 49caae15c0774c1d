"""Names of others in Markdown: they are shown, and do nothing."""

from __future__ import annotations

import pytest
from rich.console import Console

from brainloom.terminal import markdown_tables
from tasks.catalog_report import markdown_table
from tasks.markdown_text import alt_text, cell_text, told_by_cell

HOSTILE = "a|b](javascript:alert(1))![x](y) <img src=x onerror=alert(1)> </td> <!-- "


def test_a_cell_is_neither_a_link_nor_html_nor_two_cells() -> None:
    cell = cell_text(HOSTILE)
    assert cell == (r"a\|b]\(javascript:alert(1))\![x]\(y) \<img src=x onerror=alert(1)> \</td> \<!-- ")
    assert told_by_cell(cell) == HOSTILE


@pytest.mark.parametrize("text", ["0.42 [0.31, 0.53]", "p < 0.05", "`code`", "a (b)", "2 <3", "ok!"])
def test_what_tables_say_reads_as_before(text: str) -> None:
    assert cell_text(text) == text


def test_a_line_break_does_not_end_the_table() -> None:
    assert cell_text("a\nb") == "a b"


def test_the_terminal_shows_what_was_meant() -> None:
    (table,) = markdown_tables("\n".join(markdown_table([{"case": HOSTILE.strip(), "n": 1}])))
    console = Console(width=200, highlight=False)
    with console.capture() as shown:
        console.print(table)
    assert HOSTILE.strip() in shown.get()


def test_a_picture_cannot_be_ended_by_its_words() -> None:
    assert alt_text("host a](javascript:alert(1))[x <img>\n") == "host a (javascript:alert(1)) x  img  "
