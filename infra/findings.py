"""What a check of `brainloom doctor` found: a line, and the command that mends it when something is wrong."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the doctor."""

    check: str
    text: str
    mend: str = ""
    """What to do; empty when nothing is wrong."""

    @property
    def is_problem(self) -> bool:
        """Say whether something has to be mended."""
        return bool(self.mend)
