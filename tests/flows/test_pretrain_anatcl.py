"""Pre-training of AnatCL through the flow: ages, folds, variants, names, and two ranks that are killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anat_phantoms import AGES, DATASET, write_anat
from pydantic import ValidationError
from training_processes import done, killer, losses, ranks

from flows.pretrain import AGELESS, CAPTIONS, PretrainParams, prepare, run_name, training_name
from models.recipes import RECIPES
from models.selection import SelectionError
from tasks.folds import FoldError, read_folds
from tasks.launch import launch
from tasks.pretraining import TrainingExistsError, hold_out, with_ages
from tasks.splits import write_split


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    write_anat(str(folder / "store.zarr"))
    subjects = [f"sub-{i}" for i in range(len(AGES))]
    people = pd.DataFrame({"dataset": DATASET, "subject": subjects, "session": "", "age": [np.nan, *AGES[1:]]})
    people.to_parquet(folder / "phenotypes.parquet")
    roles = ["train"] * 8 + ["val"] * 2 + ["test"] * 2
    split = pd.DataFrame({"dataset": DATASET, "subject": subjects, "split": roles})
    write_split(split, folder / "splits" / "default.parquet")
    return folder


def params(workspace: Path, **changes: Any) -> PretrainParams:
    return PretrainParams(workspace=str(workspace), **{"recipe": "anatcl_tiny", **changes})


def test_every_pre_training_recipe_can_be_chosen() -> None:
    offered = PretrainParams.model_json_schema()["properties"]["recipe"]["enum"]
    assert set(offered) == {name for name in RECIPES if not name.startswith(("segmentation", "classification"))}
    ageless = ("brainmvp", "mae", "simclr_crops", "cinp", "image_mae")
    assert set(AGELESS) == {name for name in offered if name.startswith(ageless)}
    assert {"similarity", "embedding", "masking", "pairs", "restored", "views", "view_cosines"} <= set(CAPTIONS)


def test_baselines_of_ours_have_no_other_preset(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mae_tiny is a baseline of ours, so it has no preset paper; use recommended"):
        params(tmp_path, recipe="mae_tiny", preset="paper")


def test_ages_are_frozen_with_the_selection(workspace: Path) -> None:
    prepared = prepare(params(workspace, name="ages"))
    assert {case.subject: case.age for case in prepared.selection} == {
        f"sub-{i}": None if i == 0 else AGES[i] for i in range(10)
    }
    blind = prepare(params(workspace, name="blind", recipe="simclr_tiny"))
    assert [case.age for case in blind.selection] == [case.age for case in prepared.selection]


def test_a_fold_is_held_out_and_the_test_subjects_stay_away(workspace: Path) -> None:
    held = []
    for fold in range(3):
        selection = prepare(params(workspace, fold=fold, folds=3, variant="local")).selection
        assert {case.subject for case in selection} == {f"sub-{i}" for i in range(10)}
        held.append({case.subject for case in selection if case.role == "val"})
    assert set.union(*held) == {f"sub-{i}" for i in range(10)}
    assert sum(map(len, held)) == 10
    assert sorted(path.name for path in (workspace / "trainings").glob("*local*")) == [
        f"anatcl_tiny_local_fold{fold}" for fold in range(3)
    ]
    folds, _ = read_folds(workspace / "splits" / "default.folds.parquet")
    assert set(folds.loc[folds["fold"] == 1, "subject"]) & {f"sub-{i}" for i in range(10)} == held[1]
    with pytest.raises(FoldError, match="holds 3 folds, asked for are 5; ask for 3"):
        prepare(params(workspace, fold=0))
    for _ in range(2):
        prepare(params(workspace, fold=0, folds=3, name="mine"))
    with pytest.raises(TrainingExistsError, match=r"training 'mine' exists with another fold: case .* has role 'val'"):
        prepare(params(workspace, fold=1, folds=3, name="mine"))


def test_fewer_subjects_than_folds_and_folds_without_cases(workspace: Path) -> None:
    with pytest.raises(FoldError, match="12 subjects are fewer than 40 folds; ask for fewer folds or add subjects"):
        prepare(params(workspace, split="other", fold=0, folds=40))
    cases = prepare(params(workspace, name="ages")).selection
    folds = pd.DataFrame({"dataset": DATASET, "subject": [case.subject for case in cases], "fold": 0})
    with pytest.raises(SelectionError, match="no case of the 10 that may be used is held out with fold 1; ask for oth"):
        hold_out(cases, folds, 1)
    with pytest.raises(SelectionError, match="no case of the 10 that may be used is left to train with fold 0"):
        hold_out(cases, folds, 0)


def test_ages_that_no_human_has_are_refused_by_name(workspace: Path) -> None:
    cases = prepare(params(workspace, name="ages")).selection
    for age in (-1.0, 400.0):
        people = pd.DataFrame({"dataset": DATASET, "case": ["case-1"], "age": [age]})
        with pytest.raises(ValueError, match=f"case anat/case-1 has age {age:g} in the phenotypes, in years from 0 to"):
            with_ages(cases, people)
    assert with_ages(cases, people.drop(columns="age")) == cases


def test_names_and_what_is_refused_before_any_work(workspace: Path) -> None:
    assert training_name(params(workspace, variant="local", fold=2)) == "anatcl_tiny_local_fold2"
    assert training_name(params(workspace, variant="global")) == "anatcl_tiny"
    assert run_name(params(workspace, fold=4, name="mine")) == "pretrain mine on store.zarr"
    assert prepare(params(workspace, variant="local", name="v")).config.objective.variant == "local"
    with pytest.raises(ValidationError, match="variant is of the recipes anatcl and anatcl_tiny, not of simclr_tiny"):
        params(workspace, recipe="simclr_tiny", variant="local")
    with pytest.raises(ValidationError, match="fold must be from 0 to 4 with 5 folds, got 5"):
        params(workspace, fold=5)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_two_ranks_killed_at_some_steps_end_with_the_same_bits(workspace: Path) -> None:
    """Batch statistics are those of rank 0; every checkpoint has them."""
    folders = []
    for name in ("undisturbed", "disturbed"):
        prepared = prepare(params(workspace, name=name, epochs=12, batch_size=2))
        assert prepared.config.world_size == 2
        config = prepared.config.replace(checkpoint_every=4)
        (prepared.folder / "run.json").write_text(config.model_dump_json())
        folders.append(prepared.folder)
    launch([folders[0]], 2)
    launch([folders[1]], 2, killer("1", step=6), restarts=1)
    assert done(folders[1])["weights_digest"] == done(folders[0])["weights_digest"]
    assert losses(folders[1]) == losses(folders[0])
    assert not ranks()
