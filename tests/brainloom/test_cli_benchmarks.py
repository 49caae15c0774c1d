"""`brainloom benchmarks`: every task in one list, one of them with a catalog, and the page of the documentation."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from brainloom.cli import app
from tasks.registry import REGISTERED


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["benchmarks", *words])
    return result.exit_code, result.output


def test_the_list_names_every_benchmark_whole() -> None:
    code, text = run()
    assert code == 0
    assert {line.split()[0] for line in text.splitlines()[1:]} == set(REGISTERED)


def test_show_prints_numbers_with_their_basis_and_a_catalog() -> None:
    code, text = run("show", "isles22")
    assert code == 0
    for words in (
        "| BrainMVP | mean Dice | 0.866 | unverified | third-party summary of the paper |",
        "access: open; licence: unknown; confirmed",
        "split: 75 / 10 / 15 % by subject",
        "- kind: bids\n  dataset: isles22\n",
    ):
        assert words in text


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    code, text = run("show", "nope")
    assert code == 2
    assert "unknown benchmark 'nope'" in text


def test_page_prints_the_page_of_the_documentation() -> None:
    page = Path(__file__).parents[2] / "docs" / "benchmarks.md"
    assert run("page") == (0, page.read_text(encoding="utf-8"))
