r"""Tables as LaTeX fragments for pdflatex: escaped text, and tabulars that fit the width of a page.

A fragment needs `\usepackage{booktabs,graphicx}` alone. Columns that do not fit side by side are divided into
several tabulars, each with the name of the row; intervals stand below their estimates; what is still too wide is scaled
down to the line. Which characters pdflatex can set without further packages was found by compiling them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 104
r"""Characters of \small that fit a line of A4 paper with usual margins, about."""
NAME_WIDTH = 30
"""Of a row; longer names are broken."""
NOTE_WIDTH = 110
"""Characters of a line of notes."""
LINES, ROWS = 42, 18
"""Of print on a page without its caption, and of a tabular that then fits."""
APART = 3
"""Characters that the space between two columns takes."""
_ESCAPED = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "−": "$-$", "≤": r"$\leq$", "≥": r"$\geq$", "≈": r"$\approx$", "«": "“", "»": "”",
}  # fmt: skip
_SET = frozenset("¡¢£¤¥§©ª¬®°±²³µ¶·¹º¿Æ×Øßæ÷øıŁłŒœ→—‘’“”…†")
"""Characters beyond ASCII that pdflatex sets as they are, beside letters with an accent."""
_ACCENTS = frozenset("\u0300\u0301\u0302\u0303\u0304\u0306\u0307\u0308\u030a\u030b\u030c\u0327")
"""Combining marks of which the same holds; the ogonek is none of them."""
_CAPITALS = frozenset(("Gamma", "Delta", "Theta", "Lambda", "Xi", "Pi", "Sigma", "Upsilon", "Phi", "Psi", "Omega"))
_INTERVAL = re.compile(r"^(\S+) (\[.*\])$")


def latex_text(text: str) -> str:
    """Return text that pdflatex sets: special characters escaped, Greek letters as formulas, what it has no character
    for as its number, e.g. `U+4E2D`."""
    return "".join(map(_letter, unicodedata.normalize("NFC", text)))


def _letter(letter: str) -> str:
    if letter in _ESCAPED:
        return _ESCAPED[letter]
    if letter.isascii() or letter in _SET:
        return letter
    parts = unicodedata.normalize("NFD", letter)
    if parts[0].isascii() and len(parts) == 2 and parts[1] in _ACCENTS:
        return letter
    return _greek(letter) or rf"\texttt{{U+{ord(letter):04X}}}"


def _greek(letter: str) -> str:
    """Return a Greek letter as a formula; empty for others, and for those that look like Latin ones."""
    found = re.fullmatch(r"GREEK (SMALL|CAPITAL) LETTER (\w+)", unicodedata.name(letter, ""))
    if not found:
        return ""
    name = found[2].lower().replace("lamda", "lambda")
    if found[1] == "CAPITAL":
        return rf"$\{name.capitalize()}$" if name.capitalize() in _CAPITALS else ""
    return rf"$\{name}$" if name != "omicron" else ""


@dataclass(frozen=True)
class Tabular:
    """A tabular that is at most as wide as a line."""

    text: str
    lines: int
    """Of print that it takes, about."""


def floats(title: str, found: Sequence[Tabular], notes: Sequence[str], label: str) -> str:
    """Return as many floats as it takes: tabulars one below the other, captions, the notes below the last of them."""
    below = " ".join(map(latex_text, notes))
    rest = Tabular(rf"\parbox{{\linewidth}}{{\scriptsize\raggedright {below}}}", 2 + len(below) // NOTE_WIDTH)
    pages: list[list[Tabular]] = [[]]
    for one in [*found, *([rest] if notes else [])]:
        if pages[-1] and sum(other.lines for other in pages[-1]) + one.lines > LINES:
            pages.append([])
        pages[-1].append(one)
    return "\n".join(_float(title, page, label, k) for k, page in enumerate(pages))


def _float(title: str, page: Sequence[Tabular], label: str, number: int) -> str:
    body = "\n\\par\\medskip\n".join(one.text for one in page)
    caption = latex_text(title if not number else f"{title} Continued.")
    lines = [r"\begin{table}[p]", rf"\caption{{{caption}}}\label{{tab:{label}{f'-{number + 1}' if number else ''}}}"]
    return "\n".join([*lines, r"\centering\small\setlength{\tabcolsep}{3pt}", body, r"\end{table}", ""])


def tabulars(header: Sequence[str], rows: Sequence[Sequence[str]], ruled: Sequence[int] = ()) -> list[Tabular]:
    """Return one tabular, or several where columns do not fit side by side, or rows on a page.

    ruled: numbers of rows above which a rule stands.
    """
    found = []
    for part in _parts(header, rows):
        for begin in range(0, len(rows), ROWS):
            some = [[row[k] for k in part] for row in rows[begin : begin + ROWS]]
            text = _tabular([header[k] for k in part], some, [k - begin for k in ruled])
            found.append(Tabular(text, 3 + sum(max(len(_lines(text)) for text in row[1:]) for row in some)))
    return found


def _parts(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[int]]:
    """Return the numbers of the columns of each tabular: the first column is in all of them."""
    first = min(NAME_WIDTH, max(len(line[0]) for line in (header, *rows))) + APART
    parts, used = [[0]], first
    for k in range(1, len(header)):
        width = max(_width(line[k]) for line in (header, *rows)) + APART
        if used + width > WIDTH and len(parts[-1]) > 1:
            parts, used = [*parts, [0]], first
        parts[-1].append(k)
        used += width
    return parts


def _width(text: str) -> int:
    return max(map(len, _lines(text)))


def _lines(text: str) -> list[str]:
    """Return an interval below its estimate, and the words of a heading below one another in two lines."""
    if found := _INTERVAL.match(text):
        return [found[1], found[2]]
    words = text.split(" ")
    half = min(range(1, len(words)), key=lambda k: max(len(" ".join(words[:k])), len(" ".join(words[k:]))), default=0)
    return [" ".join(words[:half]), " ".join(words[half:])] if half and len(text) > APART * 3 else [text]


def _tabular(header: Sequence[str], rows: Sequence[Sequence[str]], ruled: Sequence[int]) -> str:
    long = max(len(row[0]) for row in (header, *rows)) > NAME_WIDTH
    lines: list[str] = []
    for k, row in enumerate(rows):
        lines += [r"\midrule"] if k in ruled else []
        lines.append(_row(row, long))
    columns = ("p{0.32\\linewidth}" if long else "l") + "r" * (len(header) - 1)
    parts = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _row(header, long), r"\midrule", *lines]
    inner = "\n".join([*parts, r"\bottomrule", r"\end{tabular}"])
    # Measured first: scaling would enlarge what is narrower than the line.
    return rf"\sbox0{{{inner}}}" + "\n" + r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi"


def _row(cells: Sequence[str], long: bool) -> str:
    """Return a line of a tabular; the rule or line break before it must not read its first letter as an option."""
    name = rf"\raggedright {latex_text(cells[0])}" if long else latex_text(cells[0])
    text = " & ".join([name, *map(_cell, cells[1:])]) + r" \tabularnewline"
    return f"{{}}{text}" if text.startswith(("[", "*")) else text


def _cell(text: str) -> str:
    lines = [*map(latex_text, _lines(text))]
    if len(lines) == 1:
        return lines[0]
    small = r"\scriptsize " if _INTERVAL.match(text) else ""
    return rf"\shortstack[r]{{{lines[0]}\\{{{small}{lines[1]}}}}}"
