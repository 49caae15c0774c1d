"""Effect sizes are committed: the drawn traits show them, and nothing else is linked to the labels."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2_contingency

from tasks.phantom import effects, effects_connectivity, effects_cortex
from tasks.phantom.config import DEMO, NO_LESIONS, TINY, LesionShares, PhantomConfig
from tasks.phantom.effects import draw_traits, lesion_block

SEEDS, SUBJECTS = range(4), 600


@pytest.fixture(scope="module")
def traits() -> pd.DataFrame:
    """2,400 subjects: a difference of nothing has d within 0.17 (four standard errors)."""
    configs = [DEMO.replace(seed=seed) for seed in SEEDS]
    return pd.DataFrame([draw_traits(config, 0, n).model_dump() for config in configs for n in range(SUBJECTS)])


def cohen_d(values: pd.Series, group: pd.Series) -> float:
    a, b = values[group], values[~group]
    return float((a.mean() - b.mean()) / np.sqrt((a.var() + b.var()) / 2))


def test_the_committed_sizes_have_not_been_touched() -> None:
    """A change here is a change of the question: it needs a decision, not a better-looking table."""
    assert (effects.DIAGNOSIS_D, effects.CONTROL_D) == (0.8, 3.0)
    assert (effects.DIAGNOSIS_LOSS, effects.MEDIAL_TEMPORAL_LOSS_SD) == (0.135, 0.12)
    assert (effects.GREY_LOSS_PER_YEAR, effects.GREY_LOSS_SD) == (0.002, 0.045)
    assert (effects.VENTRICLE_LOG_PER_YEAR, effects.VENTRICLE_LOG_SD) == (0.012, 0.30)
    assert (effects.SEX_SCALE_DIFFERENCE, effects.HEAD_SCALE_SD) == (0.035, 0.028)
    assert pytest.approx(1.1258, abs=1e-3) == effects.CONTROL_LOG_SHIFT


def test_diagnosis_has_a_moderate_effect_on_the_medial_temporal_lobe_only(traits: pd.DataFrame) -> None:
    patient = traits.diagnosis == "patient"
    assert cohen_d(traits.medial_temporal_loss, patient) == pytest.approx(0.135 / 0.12, abs=0.15)
    for name in ("age", "grey_loss", "ventricle_log", "head_scale"):
        assert abs(cohen_d(traits[name], patient)) < 0.17, name


def test_positive_control_is_strong_and_on_the_ventricles_only(traits: pd.DataFrame) -> None:
    large = traits.control_group == "large"
    assert cohen_d(traits.ventricle_log, large) == pytest.approx(3.0, abs=0.25)
    for name in ("age", "grey_loss", "medial_temporal_loss", "head_scale"):
        assert abs(cohen_d(traits[name], large)) < 0.17, name


def test_age_and_sex_effects(traits: pd.DataFrame) -> None:
    assert np.corrcoef(traits.age, traits.grey_loss)[0, 1] == pytest.approx(0.64, abs=0.06)
    small = traits[traits.control_group == "small"]
    assert np.polyfit(small.age, small.ventricle_log, 1)[0] == pytest.approx(0.012, abs=0.002)
    assert cohen_d(traits.head_scale, traits.sex == "M") == pytest.approx(1.25, abs=0.15)
    assert traits.age.between(20, 85).all()


def test_labels_do_not_depend_on_lesions_or_site(traits: pd.DataFrame) -> None:
    for label in ("diagnosis", "control_group"):
        for cause in ("lesion", "site", "sex"):
            assert chi2_contingency(pd.crosstab(traits[label], traits[cause])).pvalue > 0.01, (label, cause)


def test_every_prefix_is_nearly_balanced() -> None:
    first = pd.DataFrame([draw_traits(DEMO, 0, number).model_dump() for number in range(20)])
    assert (first.lesion == "tumour").sum() == 12
    assert (first.diagnosis == "patient").sum() == 10
    assert (first.control_group == "large").sum() == 10


def test_a_subject_does_not_depend_on_the_size_of_the_cohort() -> None:
    assert draw_traits(DEMO.replace(bids_subjects=500), 0, 3) == draw_traits(DEMO, 0, 3)
    assert draw_traits(DEMO.replace(seed=1), 0, 3) != draw_traits(DEMO, 0, 3)
    assert draw_traits(DEMO, 1, 3) != draw_traits(DEMO, 0, 3)


def test_lesion_block_has_the_shares() -> None:
    assert lesion_block(NO_LESIONS) == ["none"] * 10
    block = lesion_block(LesionShares(tumour=0.6, stroke=0.25, schwannoma=0.1))
    assert len(block) == 10
    assert block.count("tumour") == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modalities": ("t1", "t7")}, r"unknown modalities \['t7'\]; known: flair, t1"),
        ({"modalities": ("t1", "t1")}, "named once each"),
        ({"lesions": {"tumour": 0.9, "stroke": 0.2}}, r"sum to 1 or less, got 1\.2"),
        ({"datalist_name": "phantom-bids"}, "two data sets need different names"),
        ({"spacing_mm": 0.1}, "greater than 0.4"),
    ],
)
def test_config_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PhantomConfig.model_validate({**TINY.model_dump(), **change})


def test_docs_show_the_committed_numbers() -> None:
    text = (Path(__file__).parents[2] / "docs" / "phantom.md").read_text()
    shown = dict(re.findall(r"`([A-Z_]+)` = ([0-9.]+)", text))
    assert len(shown) >= 9
    committed = vars(effects_connectivity) | vars(effects) | vars(effects_cortex)
    for name, value in shown.items():
        assert float(value) == committed[name], name
