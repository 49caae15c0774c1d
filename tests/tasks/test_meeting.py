"""Nodes of one training find one another through a file in its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.launch import TrainingFailed
from tasks.meeting import meet


def test_the_others_meet_where_node_0_says(tmp_path: Path) -> None:
    first = meet(tmp_path, "try-1", nodes=2, node=0, address="127.0.0.1")
    second = meet(tmp_path, "try-1", nodes=2, node=1, address="127.0.0.2", wait_seconds=5)
    assert first.endpoint == second.endpoint
    assert first.endpoint.startswith("127.0.0.1:")
    assert "--rdzv-id try-1 --local-addr 127.0.0.1 --rdzv-conf is_host=true" in " ".join(first.arguments())
    assert "--local-addr 127.0.0.2 --rdzv-conf is_host=false" in " ".join(second.arguments())


def test_another_attempt_meets_elsewhere_and_who_waits_in_vain_says_what_is_needed(tmp_path: Path) -> None:
    meet(tmp_path, "try-1", nodes=2, node=0, address="127.0.0.1")
    with pytest.raises(TrainingFailed, match=r"node 1 of 2 waited 0.1 s for node 0, .* a free place for every node at"):
        meet(tmp_path, "try-2", nodes=2, node=1, wait_seconds=0.1)
