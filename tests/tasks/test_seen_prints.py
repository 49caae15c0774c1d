"""Copies of a pre-training's people are found in another store by what it kept of their images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from training_phantoms import draw_prints

from models.records import SelectedCase
from models.selection import write_selection
from tasks.fingerprint import EDGE
from tasks.seen_prints import FILE, keep_fingerprints, read_fingerprints, seen_elsewhere

PEOPLE = 30
RNG = np.random.default_rng(5)
PRINTS = draw_prints(PEOPLE)


def store(dataset: str, people: range, modality: str = "t1", noise: float = 0.0) -> Any:
    """Return the table of a store in which person k is subject `s<k>` of a dataset."""
    lines = [
        {"dataset": dataset, "subject": f"s{k}", "case": f"s{k}", "row": row, "digest": f"{dataset}{k}"}
        | {"status": "stored", "modalities": [modality]}
        | {"fingerprint": (PRINTS[k] + noise * (PRINTS[k] != 0) * RNG.standard_normal(EDGE**3)).astype(np.float32)}
        for row, k in enumerate(people)
    ]
    table = pa.Table.from_pylist(lines)
    return SimpleNamespace(cases=lambda: table, spec=SimpleNamespace(reference_order=("t1", "gm")))


def training(folder: Path, dataset: str, people: range, kept: Any = None, role: str = "train") -> Path:
    """Write the selection of a training on a store, and what it keeps of it."""
    folder.mkdir()
    cases = [
        SelectedCase(dataset=dataset, row=row, case=f"s{k}", subject=f"s{k}", digest=f"{dataset}{k}", role=role)
        for row, k in enumerate(people)
    ]
    write_selection(folder / "selection.parquet", cases)
    if kept is not None:
        keep_fingerprints(folder, kept, cases)
    return folder


HERE = store("here", range(10, 30), noise=0.3)


def test_a_double_under_another_id_is_found(tmp_path: Path) -> None:
    folder = training(tmp_path / "a", "there", range(12), store("there", range(12)))
    assert (folder / FILE).stat().st_size < 12 * 8192
    found = seen_elsewhere({"A": [folder]}, HERE)
    assert found.links == ((("there", "s10"), ("here", "s10")), (("there", "s11"), ("here", "s11")))
    assert found.notes == ()


def test_who_is_in_the_store_is_looked_for_there(tmp_path: Path) -> None:
    folder = training(tmp_path / "a", "here", range(10, 20))
    assert seen_elsewhere({"A": [folder]}, HERE) == seen_elsewhere({}, HERE)
    alone = training(tmp_path / "b", "there", range(3), role="test")
    assert seen_elsewhere({"B": [alone]}, HERE).notes == ()


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    old = training(tmp_path / "old", "there", range(12))
    maps = training(tmp_path / "maps", "maps", range(5), store("maps", range(5), modality="gm"))
    good = training(tmp_path / "good", "there", range(12), store("there", range(12)))
    (tmp_path / "good" / FILE).rename(tmp_path / "good" / "kept")
    found = seen_elsewhere({"old": [old], "VBM": [maps]}, HERE)
    assert found.links == ()
    assert [note.partition(" subjects")[0] for note in found.notes] == ["old: 12 of 12", "VBM: 5 of 5"]
    assert "looked for by id and crosswalk alone: copies under other ids would not be noticed." in found.notes[0]
    (tmp_path / "good" / FILE).write_bytes(b"torn")
    assert read_fingerprints(good).num_rows == 0
    few = store("here", range(10, 14))
    three = training(tmp_path / "three", "there", range(3), store("there", range(3)))
    assert seen_elsewhere({"three": [three]}, few).notes[0].startswith("three: 3 of 3")


def test_fingerprints_are_written_once_for_cases_that_are_as_they_were(tmp_path: Path) -> None:
    folder = training(tmp_path / "a", "there", range(4), store("other", range(4)))
    assert read_fingerprints(folder).num_rows == 0, "none of them is in that store"
    keep_fingerprints(folder, store("there", range(4)), [])
    assert read_fingerprints(folder).num_rows == 0
    whole = training(tmp_path / "b", "there", range(4), store("there", range(4)))
    table = read_fingerprints(whole)
    assert table["reference"].to_pylist() == ["t1"] * 4
    np.testing.assert_allclose(np.array(table["fingerprint"].to_pylist()) / 1000, PRINTS[:4], atol=1e-6)


@pytest.mark.parametrize("empty", [[], [0.0]])
def test_cases_without_an_image_have_no_line(tmp_path: Path, empty: list[float]) -> None:
    table = store("there", range(2)).cases()
    column = pa.array([empty, PRINTS[1].tolist()], pa.list_(pa.float32()))
    table = table.set_column(table.schema.get_field_index("fingerprint"), "fingerprint", column)
    part = SimpleNamespace(cases=lambda: table, spec=HERE.spec)
    assert read_fingerprints(training(tmp_path / "a", "there", range(2), part))["subject"].to_pylist() == ["s1"]
