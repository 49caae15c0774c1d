"""The methods section of a paper: what records say, and references numbered as they are cited."""

import pandas as pd
import pytest

from models.connectomes import ConnectomeSpec
from models.spec import SPECS
from tasks.methods_text import MethodsText, data_sentences, preprocessing_sentences
from tasks.references import REFERENCES, Citations


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
