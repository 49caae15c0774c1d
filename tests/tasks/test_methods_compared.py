"""The methods section of probes and prompts: sentences by what was compared, with numbered references."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest

from models.config_cinp import NetworkClassificationConfig
from models.records import SelectedCase
from models.store import Store
from tasks.benchmarks import Benchmark
from tasks.methods_compared import (
    cohort_sentences,
    encoder_sentences,
    fold_statistics_sentences,
    independence_sentences,
    probing_sentences,
    prompt_baselines_sentences,
    prompting_sentences,
)
from tasks.probe_cohort import ProbeCohort
from tasks.probe_summary import NEIGHBOURS
from tasks.probe_tasks import PROBES
from tasks.probing import EncoderRow
from tasks.prompt_seeds import PromptSettings
from tasks.references import Citations


def cohort(benchmark: Benchmark, targets: list[str]) -> ProbeCohort:
    cases = tuple(
        SelectedCase(dataset="d", row=k, case=f"c{k}", subject=f"s{k}", digest="", role="test", target=target)
        for k, target in enumerate(targets)
    )
    return ProbeCohort(benchmark, cast("Store", None), cases, np.arange(len(cases)) % 2, "0123456789abcdef")


def test_cohorts_are_told_by_target_and_folds() -> None:
    ages = cohort(PROBES["phantom-anat-age"], ["20.5", "61", "33"])
    assert "3 subjects of phantom-anat (age, 20.5 to 61), one case each, in 2 folds by subject" in cohort_sentences(
        ages
    )
    patients = cohort(PROBES["phantom-anat-shuffled"], ["control", "control", "ad-like"])
    text = cohort_sentences(patients)
    assert ", a negative control with shuffled targets: 3 subjects" in text
    assert "(2 control and 1 ad-like)" in text
    assert "(digest 0123456789ab)" in text


def test_crosswalks_are_named_where_there_are_any(tmp_path: Path) -> None:
    assert "tables of ids" not in independence_sentences(tmp_path)
    (tmp_path / "crosswalks").mkdir()
    (tmp_path / "crosswalks" / "a.csv").write_text("person,dataset,subject\np,a,1\np,b,2\n")
    assert "or are one person by tables of ids (digest " in independence_sentences(tmp_path)


def test_methods_are_those_that_were_asked_for() -> None:
    cited = Citations()
    rows = [EncoderRow("A", ()), EncoderRow(f"A{NEIGHBOURS}", (), model="k-NN")]
    assert "by distance-weighted nearest neighbours" in probing_sentences(rows, cited)
    assert "nearest neighbours" not in probing_sentences(rows[:1], cited)
    settings = PromptSettings(variants=("nearest", "knn"), shares=(1.0,), draws=1, k=3)
    assert "the cosine to the most similar embedding of a class and the mean of the 3 highest cosines" in (
        prompting_sentences(settings)
    )
    assert "trained for" not in prompt_baselines_sentences(settings, cited)
    with_network = PromptSettings(classifier=NetworkClassificationConfig(epochs=7))
    assert "a transformer of connectomes trained for 7 epochs in every fold" in (
        prompt_baselines_sentences(with_network, cited)
    )
    text = fold_statistics_sentences([cohort(PROBES["phantom-anat-age"], ["1", "2"])], "A", cited)
    assert text.startswith("Scores (MAE and r) were computed in every fold and averaged, never pooled.")
    assert "Nadeau and Bengio [2]" in text
    assert len(cited.references) == 3


@pytest.mark.parametrize("count", [1, 3])
def test_random_encoders_have_no_pretraining(count: int) -> None:
    from models.config import ResNet3DConfig
    from tasks.embeddings import random_encoder

    row = EncoderRow("random encoder", tuple(random_encoder(ResNet3DConfig(), seed) for seed in range(count)))
    words = "1 initialisation." if count == 1 else "3 initialisations."
    assert encoder_sentences(row, Citations()) == (
        f"Row random encoder: the network of the first row with random weights, {words}"
    )
