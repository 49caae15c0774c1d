"""The methods section of a paper: what records say, and references numbered as they are cited."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from models.connectomes import ConnectomeSpec
from models.records import SelectedCase
from models.spec import SPECS
from tasks.benchmarks import BENCHMARKS
from tasks.evaluation import Cohort
from tasks.finetune import Finetuning
from tasks.methods_text import (
    MethodsText,
    data_sentences,
    further_sentences,
    leak_sentences,
    preprocessing_sentences,
    split_sentences,
    statistics_sentences,
)
from tasks.references import REFERENCES, Citations
from tasks.rows import Run
from tasks.splits import GIVEN, IMPORTED, write_split


def test_references_are_numbered_as_they_are_cited():
    cited = Citations()
    assert [cited.cite("holm"), cited.cite("monai", "holm"), cited.cite()] == [" [1]", " [2, 1]", ""]
    assert cited.references == [REFERENCES["holm"], REFERENCES["monai"]]
    with pytest.raises(KeyError, match="no reference 'nobody'; known: brainmvp"):
        cited.cite("nobody")


def test_what_was_left_out_is_counted_by_reason():
    lines = [
        {"dataset": "b", "subject": "1", "status": "stored", "modalities": ["t1", "t2"], "reason": ""},
        {"dataset": "b", "subject": "1", "status": "stored", "modalities": ["t1"], "reason": ""},
        {"dataset": "a", "subject": "1", "status": "stored", "modalities": [], "reason": ""},
        {"dataset": "a", "subject": "2", "status": "quarantined", "modalities": [], "reason": "unreadable"},
        {"dataset": "a", "subject": "3", "status": "retired", "modalities": [], "reason": ""},
    ]
    assert data_sentences(pd.DataFrame(lines)) == (
        "Data came from a (1 subject, 1 case, 0 images) and b (1 subject, 2 cases, 3 images). 1 further case could "
        "not be used: unreadable (1)."
    )


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (SPECS["brainmvp"], "brought to RAS+ axes and 1 mm isotropic voxels on the grid of a reference scan"),
        (SPECS["brainmvp"], "percentiles 5 and 95 of the whole volume were scaled to [0, 1] and clipped"),
        (SPECS["t1_mni"], "resampled once onto a fixed grid of 160 x 192 x 160 voxels of 1 mm"),
        (SPECS["vbm"], "Intensities were kept."),
        (SPECS["vbm_approximate"], "approximated from T1 images by mixture fitting with MNI priors"),
        (SPECS["t1_mni"].replace(bias_correction="n4"), "Bias fields were corrected with N4 [1]."),
        (
            SPECS["t1_mni"].replace(space="any", registration="affine"),
            "registered (affine) to MNI152 [1] with ANTs [2], and the other scans moved with it",
        ),
        (SPECS["cinp_fmriprep"], "Voxels outside the brain masks were set to 0."),
        (SPECS["cinp"], "correlations of 200 regions of the atlas cc200, Fisher-transformed (covariance: empirical)"),
        (
            SPECS["cinp"].replace(connectome=ConnectomeSpec(atlas="cc200", confounds=(), global_signal=True)),
            "global signal was regressed out of BOLD images and frames with a displacement above 0.5 mm were left out",
        ),
    ],
)
def test_preprocessing_is_what_the_spec_says(spec, words):
    assert words in preprocessing_sentences(spec, Citations())


def test_the_section_ends_with_the_references():
    text = MethodsText(("One [1].",), ("A. A paper.",)).to_markdown()
    assert text == "# Methods\n\nOne [1].\n\n## References\n\n1. A. A paper.\n"


def cohort(seen: int, name: str = "phantom-diagnosis") -> Cohort:
    """Return four test subjects, the first of whom a pre-training has seen."""
    cases = tuple(
        SelectedCase(dataset="d", row=k, case=f"c{k}", subject=f"s{k}", digest="", role="test") for k in range(4)
    )
    leaks = {("d", f"s{k}"): "the same id" for k in range(seen)}
    return Cohort(BENCHMARKS[name], cases, pd.DataFrame(), store=None, leaks=leaks)  # type: ignore[arg-type]


def test_test_subjects_that_were_seen_are_told_and_nobody_is_called_unseen(tmp_path: Path) -> None:
    runs = [Run("A", tmp_path)]
    found = leak_sentences(runs, [cohort(3), cohort(0, "phantom-tumour"), cohort(1, "phantom-control")])
    title, control = (BENCHMARKS[name].title for name in ("phantom-diagnosis", "phantom-control"))
    assert found == (
        "Test subjects that a pre-training had seen were left out of every number: "
        f"3 of 4 of {title} and 1 of 4 of {control}."
    )
    (tmp_path / "done.json").write_text('{"origin": {"file": "released.pt"}}')
    assert leak_sentences(runs, [cohort(1)]).endswith("Which subjects imported weights were trained on is not known.")
    assert leak_sentences(runs, [cohort(0)]).startswith("No pre-training has seen a test subject, unless its weights")


@pytest.mark.parametrize(
    ("given", "rest", "words"),
    [
        (None, "", "0123456789ab), stratified; near-duplicate subjects"),
        (1, "", "0123456789ab), stratified where no file gave the role; near-duplicate subjects"),
        (3, "", "0123456789ab); near-duplicate subjects"),
        (3, "train", "(SHA-256 abc); other subjects of the same data became train."),
    ],
)
def test_a_split_is_stratified_where_it_was_drawn(tmp_path: Path, given: int | None, rest: str, words: str) -> None:
    split = pd.DataFrame({"dataset": "d", "subject": list("abc"), "split": ["train", "val", "test"]})
    source = {"file": "paper.csv", "sha256": "abc", "subjects": 1, "datasets": ["d"], "rest": rest, GIVEN: given}
    write_split(split, tmp_path / "splits" / "s.parquet", {} if given is None else {IMPORTED: [source]})
    tables = SimpleNamespace(split="s", split_digest="0123456789abcdef", crosswalks_digest="")
    unknown = ("a: not compared.",)
    made: Any = SimpleNamespace(workspace=tmp_path, split=split, tables=tables, runs=(), unchecked=unknown)
    text = split_sentences(made, [])
    assert words in text
    assert text.endswith(" a: not compared.")


def test_what_was_done_besides_is_told() -> None:
    assert further_sentences((), missing=False, native=False) == ""
    assert further_sentences((0.5,), missing=False, native=False).startswith("All rows were also trained on 50 % of")
    found = further_sentences((0.05, 0.5), missing=True, native=True, mixed=True)
    assert found.startswith("All rows but the mix were also trained on 5 % and 50 % of the training subjects, drawn")
    assert "predicted without each one, its channel filled with zeros or with the template" in found
    assert "also scored on the grids of their label files" in found


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_seed_has_no_spread(seeds: int) -> None:
    benchmark = BENCHMARKS["phantom-diagnosis"]
    config: Any = None
    trainings = [Finetuning(benchmark.name, "pre-trained", k, Path(), config) for k in range(seeds)]
    text = statistics_sentences([benchmark], trainings, 200, Citations())
    assert ("their spread is given beside" in text) == (seeds == 2)
    assert "Hall" not in text


def test_intervals_of_what_has_no_upper_bound_are_told() -> None:
    cited = Citations()
    text = statistics_sentences([BENCHMARKS["phantom-tumour"]], [], 200, cited)
    assert "Those of HD95, pooled HD95, volume error, relative volume error and false lesions, which have no" in text
    assert "are t intervals over subjects with Hall's correction for skewness [" in text
    assert any(one.startswith("Hall P. On the Removal of Skewness") for one in cited.references)
