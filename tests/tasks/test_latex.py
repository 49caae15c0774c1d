"""LaTeX fragments: what is escaped, how wide tables are divided, and, in the full tests, that pdflatex sets them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from tasks.latex import LINES, ROWS, WIDTH, Tabular, floats, latex_text, tabulars
from tasks.registry import REGISTERED
from tasks.summary import summarise
from tasks.tables import BenchmarkTable, to_latex


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (r"50 % of a_b & {c} \ <", r"50 \% of a\_b \& \{c\} \textbackslash{} \textless{}"),
        ("#1 $2 ~3 ^4 5|6>7", r"\#1 \$2 \textasciitilde{}3 \textasciicircum{}4 5\textbar{}6\textgreater{}7"),
        ("0.1–0.2, −1 ≤ 2, 3 × 4 ± 5 µm³", "0.1--0.2, $-$1 $\\leq$ 2, 3 × 4 ± 5 µm³"),
        ("Köln, Łódź, e\u0301, „quoted“ «so»", "Köln, Łódź, é, \\texttt{U+201E}quoted“ “so”"),
        ("α, λ, ς, Ω, Α", "$\\alpha$, $\\lambda$, \\texttt{U+03C2}, $\\Omega$, \\texttt{U+0391}"),
        ("ą 中 😀", "\\texttt{U+0105} \\texttt{U+4E2D} \\texttt{U+1F600}"),
    ],
)
def test_text_is_what_pdflatex_can_set(text: str, wanted: str) -> None:
    assert latex_text(text) == wanted


def texts(header: list[str], rows: list[list[str]], ruled: Sequence[int] = ()) -> list[str]:
    return [one.text for one in tabulars(header, rows, ruled)]


def test_wide_tables_are_divided_and_every_part_names_the_rows() -> None:
    header = ["row", "n", *(f"mean Dice of region {k}" for k in range(9))]
    found = texts(header, [["ours", "20", *["0.712 [0.650, 0.771]"] * 9], ["scratch", *["–"] * 10]], ruled=[1])
    assert len(found) > 1
    assert sum(text.count("mean Dice") for text in found) == 9
    for text in found:
        assert "\nours & " in text
        assert text.count("\\midrule") == 2
        assert r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi" in text
    assert r"\shortstack[r]{0.712\\{\scriptsize [0.650, 0.771]}}" in found[0]
    assert len(texts(["row", "n"], [["ours", "2"]])) == 1
    assert len(texts(["row", "n"], [["ours", "x" * 2 * WIDTH]])) == 1, "nothing to divide: it is scaled down"


def test_long_names_are_broken() -> None:
    (text,) = texts(["row", "n"], [["BrainMVP (published: third-party summary of the paper)", "–"]])
    assert r"\begin{tabular}{p{0.32\linewidth}r}" in text
    assert r"\raggedright BrainMVP (published" in text


@pytest.mark.parametrize("name", ["[2 mm] ours", "*ours"])
def test_no_row_name_is_read_as_an_option(name: str) -> None:
    (text,) = texts(["row", "n"], [["a", "1"], [name, "2"]])
    assert f"\\tabularnewline\n{{}}{name} & 2 \\tabularnewline" in text


def test_floats_have_caption_label_and_notes() -> None:
    text = floats("A & B.", [Tabular("x", 3), Tabular("y", 3)], ["95 % of it."], "a")
    assert text.count(r"\begin{table}") == 1
    assert "\\caption{A \\& B.}\\label{tab:a}" in text
    assert "\\raggedright 95 \\% of it.}" in text
    assert "\\parbox" not in floats("A.", [Tabular("x", 3)], [], "a")


def test_what_is_longer_than_a_page_is_continued() -> None:
    text = floats("A.", [Tabular("x", LINES - 1), Tabular("y", 4)], ["n"], "a")
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2
    assert "\\caption{A. Continued.}\\label{tab:a-2}" in text
    found = tabulars(["row", "n"], [[f"r{k}", "1"] for k in range(ROWS + 2)], ruled=[ROWS + 1])
    assert [one.text.count("tabularnewline") for one in found] == [ROWS + 1, 3]
    assert [one.text.count("midrule") for one in found] == [1, 2]


ODD = 'CINP_α & co #3, 50 % ± 2 × 3 µm³ ~^{}\\ "ß" 中'


def fragments() -> dict[str, str]:
    """Return every registered benchmark without data, and tables with many rows, columns and odd characters."""
    found = {}
    for name, benchmark in REGISTERED.items():
        lines = summarise(pd.DataFrame(), benchmark, {})
        found[name] = to_latex(BenchmarkTable(benchmark=benchmark, lines=tuple(lines), budget="", provenance=()))
    header = ["row", "n", *(f"mean HD95 of region {k} (mm)" for k in range(12))]
    rows = [[f"run {k}", "238", *["0.712 [0.650, 0.771]"] * 12] for k in range(2 * ROWS)]
    rows[1][0] = ODD
    found["wide"] = floats(ODD, tabulars(header, rows, ruled=[ROWS + 2]), [f"{ODD}."] * 40, "wide")
    huge = tabulars(["row", "what"], [["a", "x" * 3 * WIDTH]])
    return {**found, "huge": floats("Scaled.", huge, [], "huge")}


# Not skipped where TeX is absent: it is not there then, and the text of fragments is tested above.
if shutil.which("pdflatex"):

    @pytest.mark.full
    def test_pdflatex_sets_every_table_within_the_page(tmp_path: Path) -> None:
        found = fragments()
        for name, text in found.items():
            (tmp_path / f"{name}.tex").write_text(text, encoding="utf-8")
        letters = filter(str.isprintable, map(chr, range(0x20, 0x180)))
        words = " ".join(map(latex_text, letters))
        body = "\n".join(rf"\input{{{name}}}\clearpage" for name in found)
        head = "\\documentclass[a4paper]{article}\n\\usepackage{booktabs,graphicx}\n\\begin{document}\n\\raggedright\n"
        (tmp_path / "all.tex").write_text(f"{head}{words}\n\n{body}\n\\end{{document}}\n", encoding="utf-8")
        command = ["pdflatex", "-no-shell-escape", "-interaction=nonstopmode", "all.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
        log = done.stdout.decode("utf-8", "replace")
        assert done.returncode == 0, log[-3000:]
        wrong = [line for line in log.splitlines() if line.startswith(("!", "Overfull \\hbox", "Missing character"))]
        assert wrong == []
        assert "Float too large" not in log
        assert "multiply defined" not in log
