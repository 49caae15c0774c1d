"""Pre-training of CINP through the flow: which cases it takes, presets, and two ranks that are killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from cinp_cases import NETWORK, SMALL
from connectome_stores import DATASET, Made, write_store
from pydantic import ValidationError
from training_processes import done, killer, losses, ranks

from flows.pretrain import PretrainParams, prepare
from models.recipes import RECIPES
from models.selection import SelectionError
from models.store import open_store
from tasks.launch import launch
from tasks.pretraining import with_images
from tasks.splits import write_split

ROLES = ["train"] * 8 + ["val"] * 4


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    made = [Made(f"sub-{n}", image=n != 2, network=n != 3) for n in range(len(ROLES))]
    write_store(str(folder / "store.zarr"), made)
    subjects = [one.subject for one in made]
    write_split(
        pd.DataFrame({"dataset": DATASET, "subject": subjects, "split": ROLES}), folder / "splits/default.parquet"
    )
    return folder


def params(workspace: Path, **changes: Any) -> PretrainParams:
    return PretrainParams(workspace=str(workspace), **{"recipe": "cinp_tiny", **changes})


def test_pre_training_takes_the_cases_with_an_image(workspace: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepared = prepare(params(workspace))
    assert [case.subject for case in prepared.selection] == [f"sub-{n}" for n in range(12) if n != 2]
    assert "1 of 12 cases have a connectome and no image: they are left out" in caplog.text
    assert prepared.config.objective.kind == "cinp"
    assert prepare(params(workspace, recipe="image_mae_tiny")).config.objective.uses_networks is False
    cases = [case for case in prepared.selection if case.role == "val"]
    with pytest.raises(SelectionError, match=r"none of the training cases has an image \(4 cases, with connectomes al"):
        with_images(cases, open_store(str(workspace / "store.zarr")).cases())


def test_there_is_no_preset_of_a_code_that_was_not_released(workspace: Path) -> None:
    assert prepare(params(workspace, preset="paper", name="p")).config.preset == "paper"
    for recipe in ("cinp", "image_mae_tiny"):
        with pytest.raises(
            ValidationError, match=f"no code of CINP was released, so {recipe} has no preset code; use r"
        ):
            params(workspace, preset="code", recipe=recipe)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_two_ranks_killed_at_some_steps_end_with_the_same_bits(workspace: Path) -> None:
    folders = []
    for name in ("undisturbed", "disturbed"):
        prepared = prepare(params(workspace, name=name, epochs=12, batch_size=2))
        config = RECIPES["cinp_tiny"](
            prepared.config.data.store,
            prepared.config.data.selection,
            **{"name": name, "epochs": 12, "batch_size": 2, "checkpoint_every": 4, "network": NETWORK, **SMALL},
        )
        assert config.world_size == 2
        (prepared.folder / "run.json").write_text(config.model_dump_json())
        folders.append(prepared.folder)
    launch([folders[0]], 2)
    launch([folders[1]], 2, killer("1", step=6), restarts=1)
    assert done(folders[1])["weights_digest"] == done(folders[0])["weights_digest"]
    assert losses(folders[1]) == losses(folders[0])
    assert not ranks()
