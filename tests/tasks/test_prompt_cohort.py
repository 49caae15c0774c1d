"""Who is prompted: images, connectomes or both, sessions, folds and groups, and what is refused; on a real store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from connectome_stores import DATASET, Made, matrix_of
from prompt_phantoms import ALONE, BOTH, CASES, TOY, made_cases, write_workspace

from models.store import Store, open_store
from tasks.phenotype_layouts import layouts
from tasks.probes import ProbeError
from tasks.prompt_cohort import PromptCohort, find_prompt_cohort
from tasks.prompt_tasks import PROMPT_TASKS, find_prompt_task
from tasks.prompting import PromptError
from tasks.splits import people_of


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompting")
    # A second session of sub-00, and one of sub-35, who has a connectome alone in the first.
    more = [Made("sub-00", "b", network=False), Made("sub-35", "b")]
    write_workspace(folder, [*made_cases(), *more])
    return folder


@pytest.fixture(scope="module")
def store(workspace: Path) -> Store:
    return open_store(str(workspace / "store.zarr"))


@pytest.fixture
def people(workspace: Path, store: Store) -> pd.DataFrame:
    return people_of(store.cases().to_pandas(), workspace)


def cohort(store: Store, people: pd.DataFrame, folder: Path, **more: object) -> PromptCohort:
    return find_prompt_cohort(TOY, store, people, folder, **{"folds": 3, **more})  # type: ignore[arg-type]


def test_everybody_with_an_image_or_a_connectome_is_in_one_fold(
    store: Store, people: pd.DataFrame, tmp_path: Path
) -> None:
    found = cohort(store, people, tmp_path)
    assert len(found.everybody.cases) == CASES
    cases = {case.subject: case.case for case in found.everybody.cases}
    assert (cases["sub-00"], cases["sub-35"]) == ("sub-00", "sub-35_b"), "the case with both is taken"
    sizes = (int(found.has_image.sum()), int(found.has_network.sum()), int(found.has_both.sum()))
    assert sizes == (BOTH + ALONE + 1, BOTH + ALONE, BOTH + 1)
    counts = np.array([np.bincount(found.everybody.target[found.everybody.fold == k]) for k in range(3)])
    assert (np.ptp(counts, axis=0) <= 1).all(), "stratified by class"
    assert found.everybody.notes[0].startswith(
        "Queries have an image (34 subjects), supports a connectome (33); 31 have both. Who has a connectome alone"
    )
    places = [k for k, case in enumerate(found.everybody.cases) if case.subject == "sub-04"]
    where = np.flatnonzero(found.has_network).tolist().index(places[0])
    np.testing.assert_array_equal(found.matrices[where], matrix_of(4))


def test_who_looks_like_another_shares_fold_and_group(
    store: Store, people: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins = [((DATASET, "sub-03"), (DATASET, "sub-17")), ((DATASET, "sub-17"), (DATASET, "sub-20"))]
    for name in ("folds", "prompt_cohort"):
        monkeypatch.setattr(f"tasks.{name}.person_links", lambda workspace, url: twins)
    found = cohort(store, people, tmp_path)
    mine = [k for k, case in enumerate(found.everybody.cases) if case.subject in ("sub-03", "sub-17", "sub-20")]
    assert len(set(found.group[mine])) == len(set(found.everybody.fold[mine])) == 1
    assert len(set(found.group)) == CASES - 2


def test_what_cannot_be_prompted_is_refused_or_said(store: Store, people: pd.DataFrame, tmp_path: Path) -> None:
    blind = people[people["subject"].isin([f"sub-{k:02d}" for k in range(BOTH + ALONE, CASES)])]
    blind = pd.concat([blind[blind["session"] == ""].assign(subject=f"s{k}" + blind["subject"]) for k in range(4)])
    blind = blind.assign(diagnosis=["control", "hypoconnected"] * (len(blind) // 2))
    with pytest.raises(
        PromptError,
        match=r"'toy-diagnosis': 12 unseen subjects have a connectome and a known target, none has an image \(t1\)",
    ):
        cohort(store, blind, tmp_path / "a")
    mute = people.assign(qc="{}")
    with pytest.raises(PromptError, match="34 unseen subjects have an image and a known target, none has a connectome"):
        cohort(store, mute, tmp_path / "b")
    rare = people.assign(qc=[qc if k % 12 == 0 else "{}" for k, qc in enumerate(people["qc"])])
    with pytest.raises(PromptError, match=r"outside fold \d there are [01] labelled connectomes of class '"):
        cohort(store, rare, tmp_path / "c")
    columns = zip(people["modalities"], people["diagnosis"], strict=True)
    modalities: list[Any] = [has if diagnosis == "control" else [] for has, diagnosis in columns]
    half = people.assign(modalities=modalities)
    with pytest.raises(PromptError, match=r"is absent from fold 0 of 3; .*\(counted: subjects with an image\)"):
        cohort(store, half, tmp_path / "d")
    seen = dict.fromkeys(((DATASET, f"sub-{k:02d}") for k in range(CASES)), "the same id")
    with pytest.raises(ProbeError, match="prompt 'toy-diagnosis': all 36 subjects were seen by a pre-training"):
        cohort(store, people, tmp_path / "e", seen=seen)
    absent = find_prompt_cohort(PROMPT_TASKS["cinp-abide"], store, people, tmp_path, 3)
    assert (len(absent.everybody.cases), absent.everybody.notes) == (0, ())
    unknown = cohort(store, people.assign(diagnosis="other"), tmp_path / "f")
    assert "none has a usable value in column 'diagnosis'" in unknown.everybody.notes[0]


def test_seen_subjects_are_neither_queries_nor_supports(store: Store, people: pd.DataFrame, tmp_path: Path) -> None:
    seen = dict.fromkeys(((DATASET, "sub-01"), (DATASET, "sub-02")), "the same id")
    found = cohort(store, people, tmp_path, seen=seen)
    assert not {"sub-01", "sub-02"} & {case.subject for case in found.everybody.cases}
    assert "a pre-training of this table has seen them: 2;" in " ".join(found.everybody.notes)
    assert found.everyone is not None
    assert len(found.everyone.everybody.cases) == len(found.everybody.cases) + 2
    assert found.everyone.benchmark.name == "toy-diagnosis-with-seen"


def test_every_task_is_registered_with_its_source_and_no_invented_number() -> None:
    assert {"cinp-abide", "cinp-adhd200", "cinp-srpbs"} < set(PROMPT_TASKS)
    for name, points in (("cinp-abide", "1.46"), ("cinp-adhd200", "1.26"), ("cinp-srpbs", "1.21")):
        task = PROMPT_TASKS[name]
        assert (task.protocol, task.published, task.basis) == ("prompt", (), "unverified")
        assert f"a gain of {points} points of accuracy" in task.claims[0]
        assert "29.33 %" in task.claims[1]
    with pytest.raises(KeyError, match="unknown prompting task 'nope'; known: phantom-connect-diagnosis"):
        find_prompt_task("nope")
    with pytest.raises(ValueError, match="benchmark 'x': prompting tells classes, it predicts no number"):
        TOY.replace(name="x", kind="regression", classes=(), metrics=())


def test_the_tasks_speak_of_the_classes_that_their_data_have() -> None:
    from tasks.phantom.effects_connectivity import PATIENT_BLOCK

    for name, task in PROMPT_TASKS.items():
        if name.startswith("phantom-connect"):
            assert set(task.classes) <= set(PATIENT_BLOCK), name
        else:
            column = layouts()[task.datasets[0]].columns[task.target]
            assert set(task.classes) <= {*column.values.values()}, name
