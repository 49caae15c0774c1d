"""The studies' code beside their trainings: names, constants and what decides their claims."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.recipes import find_recipe
from studies import anatcl_phantom
from tasks.probe_tasks import PHANTOM_PROBES, PROBES


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
