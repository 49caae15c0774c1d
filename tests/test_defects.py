"""Pages name a test, or a reason, for every known defect of the references and every trap; the tests must exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COUNTS = {"brainmvp": 29, "anatcl": 5, "faults": 23}


def _rows(page: str) -> dict[int, str]:
    lines = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8").splitlines()
    return {int(match[1]): match[2] for line in lines if (match := re.match(r"\| (\d+) \| .* \| (.*) \|$", line))}


ROWS = {(page, number): row for page in COUNTS for number, row in _rows(page).items()}


def test_every_defect_has_a_line() -> None:
    assert list(ROWS) == [(page, number) for page, count in COUNTS.items() for number in range(1, count + 1)]


@pytest.mark.parametrize(("page", "number"), ROWS)
def test_named_tests_exist(page: str, number: int) -> None:
    row = ROWS[page, number]
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
    assert named or row.startswith("cannot occur: ")
    for path, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), f"{path} has no {test}"
