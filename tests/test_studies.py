"""The studies' code beside their trainings: names, constants and what decides their claims."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from models.recipes import find_recipe
from studies import anatcl_phantom, cinp_phantom, cinp_retrieval
from studies.linear import cosines, fit_components, ridge
from tasks.probe_tasks import PHANTOM_PROBES, PROBES
from tasks.prompt_tasks import PHANTOM_PROMPTS, PROMPT_TASKS


def test_rows_of_the_anatcl_study_have_recipes_and_folders_of_their_own() -> None:
    names = [variant.name(seed) for variant in anatcl_phantom.VARIANTS for seed in anatcl_phantom.SEEDS]
    assert len(set(names)) == len(names)
    assert names[0] == "anatcl-global-seed0"
    for variant in anatcl_phantom.VARIANTS:
        config = find_recipe(variant.recipe)("store", "selection", epochs=1, **dict(variant.overrides))
        assert config.recipe.endswith("_tiny")
    assert {PROBES[name].datasets for name in PHANTOM_PROBES} == {(anatcl_phantom.PROBED,)}


@pytest.mark.parametrize(("low", "words"), [(6.1, "do not overlap: the claim holds"), (5.9, "overlap: the claim does")])
def test_the_claim_of_the_anatcl_study_is_decided_by_two_intervals(tmp_path: Path, low: float, words: str) -> None:
    folder = tmp_path / "probes" / "tables"
    folder.mkdir(parents=True)
    lines = ["row,metric,estimate,low,high", "AnatCL global,mae,5,4,6", f"random encoder,mae,8,{low},9"]
    (folder / "phantom-anat-age.csv").write_text("\n".join([*lines, "AnatCL global,r,0.5,0.4,0.6"]))
    found = anatcl_phantom.verdict(tmp_path)
    assert found.startswith("Error of the age in years: AnatCL global 5.00 [4.00, 6.00]; random encoder 8.00")
    assert words in found


def test_rows_of_the_cinp_study_switch_losses_off_and_have_folders_of_their_own() -> None:
    rows = (*cinp_phantom.VARIANTS, cinp_phantom.IMAGE_ONLY)
    names = [one.name(seed) for one in rows for seed in cinp_phantom.SEEDS]
    assert len(set(names)) == len(names)
    assert [one.name(0) for one in rows] == [
        "cinp-seed0", "inc-mim-seed0", "inc-nim-seed0", "inc-seed0", "image_mae-seed0",
    ]  # fmt: skip
    weights = []
    for one in rows:
        config = find_recipe(one.recipe)("store", "selection", epochs=1, **dict(one.overrides))
        assert (config.preset, config.data.batch_size) == ("recommended", cinp_phantom.BATCH)
        objective = config.objective.model_dump()
        weights.append(tuple(objective[f"weight_{loss}"] for loss in ("contrast", "masking", "matching")))
    assert weights == [(1, 1, 1), (1, 1, 0), (1, 0, 1), (1, 0, 0), (0, 1, 0)]
    assert {PROMPT_TASKS[name].datasets for name in PHANTOM_PROMPTS} == {(cinp_phantom.PROMPTED,)}
    assert cinp_phantom.PRIMARY_TASK in PHANTOM_PROMPTS


@pytest.mark.parametrize(("low", "words"), [(0.1, "the claim holds"), (0.03, "the claim does not hold")])
def test_the_claims_of_the_cinp_study_are_decided_by_intervals(tmp_path: Path, low: float, words: str) -> None:
    (tmp_path / "retrieval").mkdir()
    table = pd.DataFrame(
        [
            {"row": row, "top": top, "candidates": 32, "chance": top / 32, "estimate": 0.2, "low": low, "high": 0.4}
            | {"n": 60, "trainings": 3}
            for row in ("CINP", "INC", cinp_retrieval.CEILING)
            for top in (1, 5)
        ]
    )
    cinp_retrieval.write(table, tmp_path / "retrieval")
    assert (tmp_path / "retrieval" / "top5.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "retrieval" / "retrieval.md").read_text().splitlines()
    assert lines[0] == "| row | top 1 (chance 0.031) | top 5 (chance 0.156) | n | trainings |"
    assert lines[2] == f"| CINP | 0.200 [{low:.3f}, 0.400] | 0.200 [{low:.3f}, 0.400] | 60 | 3 |"
    folder = tmp_path / "prompts" / "tables"
    folder.mkdir(parents=True)
    rows = ["row,metric,estimate,low,high", f'"CINP: mean, 100 %",accuracy,0.6,{0.5 + low - 0.05},0.7']
    rows += ["majority class,accuracy,0.5,0.5,0.5", '"CINP: mean, 100 %",auroc,0.9,0.8,0.95']
    (folder / "phantom-connect-multiclass.csv").write_text("\n".join(rows))
    found = cinp_phantom.verdict(tmp_path)
    assert found.startswith(f"Retrieval, first of 32: 0.200 [{low:.3f}, 0.400], chance 0.031: {words}.")
    assert found.endswith(f"majority class 0.500: {words}.")


def test_the_linear_model_finds_what_is_linear() -> None:
    rng = np.random.default_rng(0)
    hidden, maps = rng.standard_normal((200, 3)), rng.standard_normal((2, 3, 400))
    first, second = (hidden @ one + 0.5 * rng.standard_normal((200, 400)) for one in maps)
    components = fit_components(first[:120], 3)
    assert components.of(first[:120]).std(axis=0) == pytest.approx(1, abs=0.02)
    guess = ridge(second[:120], components.of(first[:120]), second[120:])
    likeness = cosines(guess, components.of(first[120:]))
    assert (likeness.argmax(axis=1) == np.arange(80)).mean() > 0.8


@pytest.mark.full
def test_the_whole_cinp_study_runs_at_a_tiny_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = (cinp_phantom.PRIMARY_TASK,)
    size = cinp_phantom.Size(5, healthy=24, prompted=24, seeds=(0,), epochs=1, ranks=1, folds=3, tasks=tasks)
    cinp_phantom.run(tmp_path, size)
    printed = capsys.readouterr().out
    assert "| wrong pairs (negative control) |" in printed
    assert "Accuracy of prompting, phantom-connect-multiclass" in printed
    table = pd.read_csv(tmp_path / "retrieval" / "retrieval.csv")
    assert set(table["row"]) == {
        "CINP", "INC + MIM", "INC + NIM", "INC", cinp_retrieval.LINEAR, cinp_retrieval.CEILING, cinp_retrieval.WRONG,
    }  # fmt: skip
    assert (table["candidates"] == 8).all()
