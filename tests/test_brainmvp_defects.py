"""docs/brainmvp.md names a test, or a reason, for every known defect of the reference; the tests must exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "docs" / "brainmvp.md").read_text(encoding="utf-8").splitlines()
ROWS = {int(match[1]): match[2] for line in LINES if (match := re.match(r"\| (\d+) \| .* \| (.*) \|$", line))}


def test_every_defect_has_a_line() -> None:
    assert list(ROWS) == list(range(1, 30))


@pytest.mark.parametrize("number", ROWS)
def test_named_tests_exist(number: int) -> None:
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", ROWS[number])
    assert named or ROWS[number].startswith("cannot occur: ")
    for path, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), f"{path} has no {test}"
