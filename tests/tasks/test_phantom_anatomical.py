"""The anatomical cohort: committed effects, maps and tables that say what the latents say, layouts that are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2_contingency

from brainloom.cli import app
from models.anatomy import DESIKAN_KILLIANY, MEASURES
from models.records import DESCRIPTORS
from tasks.atlas import priors_on, regional_sums
from tasks.phantom import DifferentCohortError
from tasks.phantom import effects_cortex as effects
from tasks.phantom.anatomical import (
    AnatomicalConfig,
    AnatomicalPaths,
    latent_column,
    make_anatomical_subject,
    write_anatomical_cohort,
)
from tasks.phantom.cortex import (
    draw_residual,
    grey_template,
    latent_descriptors,
    measured_descriptors,
    modulated_map,
    scanned_map,
)
from tasks.phantom.cortex_t1 import cut_out, level_map, levels
from tasks.phantom.deform import IDENTITY
from tasks.phantom.effects_cortex import CorticalTraits, draw_cortical_traits, thinning
from tasks.phantom.sources import anatomical_sources
from tasks.sources import find_scans

SUBJECTS = 600
CONFIG = AnatomicalConfig(seed=3, subjects=5)
GMV = MEASURES.index("grey_matter_volume_mm3")


@pytest.fixture(scope="module")
def traits() -> list[CorticalTraits]:
    return [draw_cortical_traits(0, number, True) for number in range(SUBJECTS)]


@pytest.fixture(scope="module")
def labels(traits: list[CorticalTraits]) -> pd.DataFrame:
    return pd.DataFrame([one.model_dump(include={"age", "sex", "site", "diagnosis", "head_scale"}) for one in traits])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AnatomicalPaths]:
    folder = tmp_path_factory.mktemp("anatomical")
    return folder, write_anatomical_cohort(CONFIG, folder)


def cohen_d(values: np.ndarray, group: np.ndarray, rest: np.ndarray) -> np.ndarray:
    a, b = values[group], values[rest]
    return np.asarray((a.mean(axis=0) - b.mean(axis=0)) / np.sqrt((a.var(axis=0) + b.var(axis=0)) / 2))


def without_age(values: np.ndarray, ages: pd.Series) -> np.ndarray:
    """What is left of values (n, regions) after the age curve that was committed."""
    return values - np.stack([effects.ageing(age) for age in ages])


def test_the_committed_sizes_have_not_been_touched() -> None:
    """A change here is a change of the question: it needs a decision, not a better-looking table."""
    assert (effects.THICKNESS_PER_YEAR_YOUNG, effects.THICKNESS_PER_YEAR_ADULT, effects.BEND_YEARS) == (
        -0.0045, -0.0025, 30.0,
    )  # fmt: skip
    assert (effects.STRONG_WEIGHT, effects.USUAL_WEIGHT, effects.WEAK_WEIGHT) == (1.3, 1.0, 0.5)
    assert (effects.THICKNESS_SD_PERSON, effects.THICKNESS_SD_REGION, effects.AREA_SD_REGION) == (0.04, 0.05, 0.06)
    assert (effects.AREA_PER_YEAR, effects.OTHER_GREY_PER_YEAR, effects.OTHER_GREY_SD) == (-0.0015, -0.0025, 0.04)
    assert (effects.SCHIZOPHRENIA_D, effects.AD_TEMPORAL_D, effects.AD_OTHER_D) == (0.53, 1.5, 1.0)
    assert [len(regions) for regions in (effects.SCHIZOPHRENIA_REGIONS, effects.AD_TEMPORAL_REGIONS)] == [11, 4]
    assert len(effects.AD_OTHER_REGIONS) == 6
    assert effects.SITE_THICKNESS == {"A": 0.0, "B": 0.02, "C": -0.02}
    assert effects.SITE_GREY == {"A": 0.0, "B": 0.03, "C": -0.04}
    assert effects.RESIDUAL_MM == 1.5


def test_age_thins_the_cortex_and_explains_about_half_of_a_region(
    traits: list[CorticalTraits], labels: pd.DataFrame
) -> None:
    healthy = (labels.diagnosis == "control").to_numpy()
    thickness = np.array([one.thickness for one in traits])[healthy]
    ages = labels.age[healthy]
    explained = [np.corrcoef(ages, thickness[:, n])[0, 1] ** 2 for n in range(68)]
    assert 0.4 < np.median(explained) < 0.6
    assert np.corrcoef(ages, thickness.mean(axis=1))[0, 1] < -0.8
    strong = [name.split("_")[1] in effects.STRONG_AGEING for name in DESIKAN_KILLIANY]
    weak = [name.split("_")[1] in effects.WEAK_AGEING for name in DESIKAN_KILLIANY]
    assert np.mean(np.array(explained)[strong]) > np.mean(np.array(explained)[weak]) + 0.2
    assert labels.age.between(6, 88).all()
    assert thickness.min() > 0.4


@pytest.mark.parametrize("diagnosis", ["schizophrenia-like", "ad-like"])
def test_a_diagnosis_sits_in_its_regions_and_nowhere_else(
    traits: list[CorticalTraits], labels: pd.DataFrame, diagnosis: str
) -> None:
    thickness = without_age(np.array([one.thickness for one in traits]), labels.age)
    d = cohen_d(thickness, (labels.diagnosis == diagnosis).to_numpy(), (labels.diagnosis == "control").to_numpy())
    intended = -thinning(diagnosis) / effects.THICKNESS_SD
    # Standard error of one d here: 0.1, of which person's share moves all regions together.
    assert d == pytest.approx(intended, abs=0.45)
    assert d[intended < 0].mean() == pytest.approx(intended[intended < 0].mean(), abs=0.25)
    assert abs(d[intended == 0].mean()) < 0.25
    area = np.array([one.area for one in traits])
    assert np.abs(cohen_d(area, (labels.diagnosis == diagnosis).to_numpy(), (labels.diagnosis == "control").to_numpy())
                  ).mean() < 0.15  # fmt: skip


def test_labels_are_independent_of_each_other(labels: pd.DataFrame) -> None:
    for one, other in (("diagnosis", "site"), ("diagnosis", "sex"), ("site", "sex")):
        assert chi2_contingency(pd.crosstab(labels[one], labels[other])).pvalue > 0.01
    for label in ("diagnosis", "site", "sex"):
        ages = labels.groupby(label).age.mean()
        assert ages.max() - ages.min() < 8
    men = (labels.sex == "M").to_numpy()
    assert cohen_d(labels.head_scale.to_numpy(), men, ~men) == pytest.approx(1.25, abs=0.25)
    assert labels.diagnosis[:8].value_counts().to_dict() == {"control": 4, "schizophrenia-like": 2, "ad-like": 2}
    assert {draw_cortical_traits(0, number, patients=False).diagnosis for number in range(8)} == {"control"}


def test_volumes_in_a_clean_map_are_the_latent_ones(traits: list[CorticalTraits]) -> None:
    template = grey_template("vbm_tiny")
    for one in traits[:4]:
        latent = latent_descriptors(one, template)
        assert latent[GMV] == pytest.approx(latent[0] * latent[2])
        found = regional_sums(modulated_map(one, template, IDENTITY), template.grid)
        # Neighbours are blended over 3 mm, half a voxel.
        assert np.abs(found / latent[GMV] - 1).mean() < 0.04
        assert found.sum() == pytest.approx(latent[GMV].sum(), rel=0.01)


@pytest.mark.parametrize("diagnosis", ["schizophrenia-like", "ad-like"])
def test_thinning_is_seen_in_its_regions_of_map_and_t1_and_nowhere_else(diagnosis: str) -> None:
    template = grey_template("vbm_tiny")
    before = draw_cortical_traits(0, 0, patients=False)
    lost = thinning(diagnosis)
    after = before.replace(thickness=tuple((np.array(before.thickness) - lost).tolist()))
    wanted = lost / np.array(before.thickness)
    shares = priors_on(levels().grid)
    maps = [regional_sums(modulated_map(one, template, IDENTITY), template.grid) for one in (before, after)]
    t1s = [
        regional_sums(cut_out(shares.grey, shares.white, level_map(one))[0], levels().grid) for one in (before, after)
    ]
    for first, second in (maps, t1s):
        seen = 1 - second / first
        assert np.abs(seen - wanted)[wanted > 0].mean() < 0.02
        assert seen[wanted > 0].min() > 0.02
        assert np.abs(seen[wanted == 0]).mean() < 0.008
        assert np.abs(seen[wanted == 0]).max() < 0.03


def test_the_residual_warp_moves_tissue_and_loses_none(traits: list[CorticalTraits]) -> None:
    template = grey_template("vbm_tiny")
    plain = modulated_map(traits[0], template, IDENTITY)
    moved = modulated_map(traits[0], template, draw_residual(np.random.default_rng(0)))
    assert moved.sum() == pytest.approx(plain.sum(), rel=2e-3)
    assert 0.9 < np.corrcoef(moved.ravel(), plain.ravel())[0, 1] < 0.9999


def test_sites_measure_with_their_offsets_and_errors() -> None:
    latent = np.tile(np.array([[2.5], [5000.0], [2000.0]]), (1, 68))
    ratio = measured_descriptors(latent, "C", np.random.default_rng(0)) / latent
    assert ratio.mean(axis=1) == pytest.approx([0.98, 0.96, 1.0], abs=0.015)
    assert ratio.std(axis=1) == pytest.approx([0.02, 0.03, 0.02], rel=0.4)
    values = scanned_map(np.full((20, 20, 20), 0.5, np.float32), "B", np.random.default_rng(0))
    assert values.mean() == pytest.approx(0.515, rel=0.01)
    assert values.std() / values.mean() == pytest.approx(0.03, rel=0.1)


def test_the_sources_read_what_was_written(cohort: tuple[Path, AnatomicalPaths], tmp_path: Path) -> None:
    folder, paths = cohort
    config = CONFIG.replace(t1_spacing_mm=None)
    maps, tables = (find_scans(source, str(tmp_path)) for source in anatomical_sources(config, folder))
    rows = [*maps.scans, *tables.scans]
    assert [(row.case, row.modality, row.status, row.detail) for row in rows] == [
        (f"sub-{number:04d}", modality, "ok", "") for modality in ("gm", DESCRIPTORS) for number in range(1, 6)
    ]
    assert maps.phenotypes is not None
    people = pd.read_csv(paths.participants, sep="\t")
    assert list(people) == ["participant_id", "age", "sex", "site", "diagnosis"]
    latents = pd.read_parquet(paths.latents)
    assert latents.subject.tolist() == people.participant_id.tolist()
    assert latents.age.tolist() == people.age.tolist()
    template = grey_template(CONFIG.spec)
    true = latent_descriptors(draw_cortical_traits(CONFIG.seed, 2, True), template)
    assert latents[latent_column("cortical_thickness_mm", "rh_insula")][2] == pytest.approx(true[0, -1])


def test_a_cohort_is_completed_and_never_changed(cohort: tuple[Path, AnatomicalPaths]) -> None:
    folder, paths = cohort
    lost = paths.cat12 / "sub-0002/mri/mwp1sub-0002_T1w.nii.gz"
    content, kept = lost.read_bytes(), paths.cohort.stat().st_mtime_ns
    lost.unlink()
    (folder / ".phantom/phantom-anat/sub-0002.json").unlink()
    write_anatomical_cohort(CONFIG, folder)
    assert lost.read_bytes() == content
    assert paths.cohort.stat().st_mtime_ns == kept
    with pytest.raises(DifferentCohortError, match=r"another config \(seed: 3 there, 4 wanted\)"):
        write_anatomical_cohort(CONFIG.replace(seed=4), folder)


def test_a_lost_file_is_made_again_although_its_subject_was_complete(tmp_path: Path) -> None:
    config = CONFIG.replace(subjects=2)
    paths = write_anatomical_cohort(config, tmp_path)
    lost = paths.freesurfer / "sub-0002/stats/rh.aparc.stats"
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path != lost}
    content = lost.read_bytes()
    lost.unlink()
    counts: list[tuple[int, int]] = []
    write_anatomical_cohort(config, tmp_path, lambda done, total: counts.append((done, total)))
    assert lost.read_bytes() == content
    assert counts == [(1, 2), (2, 2)], "the other subject is not made again"
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_subject_depends_on_seed_and_number_alone(cohort: tuple[Path, AnatomicalPaths]) -> None:
    files, _ = make_anatomical_subject(CONFIG.replace(subjects=900), 3)
    assert len(files) == 3
    for name, data in files.items():
        assert (cohort[1].root / name).read_bytes() == data
    assert make_anatomical_subject(CONFIG.replace(seed=9), 3)[0] != files


def test_the_command_line_writes_one(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, ["phantom-anat", str(tmp_path / "c"), "--subjects", "2", "--processes", "1"])
    assert done.exit_code == 0, done.output
    assert "derivatives/CAT12" in done.output
    assert len(list((tmp_path / "c").rglob("*.aparc.stats"))) == 4
