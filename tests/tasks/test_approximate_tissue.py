"""Grey matter from a T1 alone: right volumes where the truth is known, and named approximate wherever it appears."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nifti_files import planned, write_nifti

from models.anatomy import DESIKAN_KILLIANY, MEASURES
from models.spec import SPECS, PreprocessSpec
from tasks import registration
from tasks.affines import BadScanError
from tasks.anatomy import approximate_grey, expansion_of, grey_measures
from tasks.atlas import priors_on, regional_sums, subdivide
from tasks.phantom.contrasts import Tissue, signal
from tasks.phantom.cortex_t1 import cut_out
from tasks.prepare import PreparedCase, prepare_case
from tasks.registration import Move
from tasks.volumes import Block, Grid, template_grid

SPEC = SPECS["vbm_tiny"].replace(name="tiny_approximate", tissue="approximate", space="mni")
TINY = template_grid(SPEC)
GRID = subdivide(TINY, 3)
VOLUME = MEASURES.index("grey_matter_volume_mm3")


def brain(level: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Return a T1 of 2 mm with a bias field and noise, (x, y, z) float32, and its true grey matter."""
    priors = priors_on(GRID)
    grey, white = cut_out(priors.grey, priors.white, level)
    inside = priors.brain > 0.5
    grey, white = grey * inside, white * inside
    rng = np.random.default_rng(0)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in GRID.shape), indexing="ij", sparse=True)
    bias = np.exp(0.1 * x - 0.1 * y * z + 0.15 * (y**2 - z))
    noise = rng.normal(0, 0.03, GRID.shape)
    value = signal("t1", Tissue(grey, white, 1 - grey - white), np.zeros_like(grey)) * bias + noise
    return np.where(inside, 700 * np.maximum(value, 0.01), 0).astype(np.float32), grey


def block_of(data: np.ndarray, grid: Grid = GRID) -> Block:
    return Block(torch.from_numpy(np.ascontiguousarray(data)), (0, 0, 0), grid, "sub-1_T1w.nii.gz")


@pytest.fixture(scope="module")
def t1() -> np.ndarray:
    return brain()[0]


@pytest.fixture(scope="module")
def usual(t1: np.ndarray) -> np.ndarray:
    """The map of it on 6 mm."""
    return approximate_grey(block_of(t1), TINY).block.data.numpy()


def test_regional_volumes_are_about_right_in_spite_of_bias_and_noise(usual: np.ndarray) -> None:
    truth = regional_sums(brain()[1], GRID)
    found = regional_sums(usual, TINY)
    assert found.sum() == pytest.approx(truth.sum(), rel=0.08)
    assert np.median(np.abs(found / truth - 1)) < 0.08
    assert np.corrcoef(found, truth)[0, 1] > 0.98


def test_a_thinner_cortex_has_less(usual: np.ndarray) -> None:
    thin, grey = brain(0.8)
    lost = 1 - regional_sums(grey, GRID).sum() / regional_sums(brain()[1], GRID).sum()
    found = approximate_grey(block_of(thin), TINY).block.data.numpy()
    assert lost > 0.15
    seen = 1 - regional_sums(found, TINY).sum() / regional_sums(usual, TINY).sum()
    assert 0.8 * lost < seen < 1.7 * lost


def test_it_is_modulated_by_the_affine_and_says_so(t1: np.ndarray, usual: np.ndarray) -> None:
    # A head of 0.9 of the template's size: the affine to the template stretches by 1 / 0.9.
    expansion = expansion_of(np.diag([1 / 0.9, 1 / 0.9, 1 / 0.9, 1]))
    assert expansion == pytest.approx(0.9**3)
    found = approximate_grey(block_of(t1), TINY, expansion)
    assert found.block.data.numpy() == pytest.approx(usual * 0.9**3, abs=1e-5)
    assert found.flags == {"tissue": "approximate", "modulation": "affine"}
    assert (found.table.basis, found.table.atlas, list(found.table.values)) == (
        "approximate", "desikan_killiany", ["grey_matter_volume_mm3"],
    )  # fmt: skip
    volumes = dict(zip(DESIKAN_KILLIANY, found.table.array()[VOLUME], strict=True))
    assert volumes["lh_superiorfrontal"] > 5 * volumes["lh_frontalpole"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t1: np.where(np.arange(111)[None, :, None] < 60, t1, 0), r"has a signal in \d+% of the MNI152 brain"),
        (lambda t1: np.where(t1 > 0, 1000 - t1, 0), "tissues cannot be told apart by intensity, the means are csf"),
    ],
    ids=["half a brain", "a T2's contrast"],
)
def test_what_is_no_t1_of_a_brain_in_mni_space_is_refused(t1: np.ndarray, change, words: str) -> None:
    with pytest.raises(BadScanError, match=words):
        approximate_grey(block_of(change(t1).astype(np.float32)), TINY)


def test_the_measures_of_a_map_show_a_wrong_orientation(usual: np.ndarray) -> None:
    right = grey_measures(usual, TINY)
    assert right["grey_prior"] > 0.9
    assert right["grey_ml"] == pytest.approx(usual.sum() * 0.216, rel=1e-3)
    assert 0.6 < right["grey_share"] < 1
    for axis in (1, 2):
        assert grey_measures(np.flip(usual, axis), TINY)["grey_prior"] < 0.5
    assert grey_measures(usual.transpose(2, 1, 0), TINY)["grey_prior"] < 0.6
    assert grey_measures(priors_on(TINY).white, TINY)["grey_prior"] < 0
    assert grey_measures(np.zeros_like(usual), TINY) == {"grey_ml": 0.0, "grey_share": 0.0, "grey_prior": 0.0}


def prepared(folder: Path, spec: PreprocessSpec, affine: np.ndarray = GRID.affine, **files: np.ndarray) -> PreparedCase:
    """Write images of 2 mm and prepare the case."""
    written = {name: write_nifti(folder / f"sub-1_{name}.nii.gz", data, affine) for name, data in files.items()}
    return prepare_case(planned(written), spec)


def test_a_case_with_a_t1_alone_gets_a_map_and_a_table(tmp_path: Path, t1: np.ndarray, usual: np.ndarray) -> None:
    case = prepared(tmp_path, SPEC, t1=t1)
    assert case.present == (True,)
    assert case.image.sum(dtype=float) == pytest.approx(float(usual.sum()), rel=1e-2)
    assert case.descriptors is not None
    assert case.descriptors.basis == case.qc["tissue_gm"] == case.qc["descriptor_basis"] == "approximate"
    assert case.qc["modulation_gm"] == "none"
    assert case.qc["grey_prior"] > 0.9
    assert case.geometry.source_shape == {"gm": GRID.shape}


def test_a_map_that_is_there_is_used_and_is_neither_registered_nor_remade(
    tmp_path: Path, t1: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "register", lambda *_: pytest.fail("registered"))
    spec = SPEC.replace(space="any", registration="affine")
    case = prepared(tmp_path, spec, t1=t1, gm=priors_on(GRID).grey)
    assert "tissue_gm" not in case.qc
    assert case.descriptors is None
    assert case.qc["ignored_modalities"] == ["t1"]
    assert case.qc["grey_prior"] > 0.85


def test_registration_gives_the_modulation(
    tmp_path: Path, t1: np.ndarray, usual: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = Move(np.diag([1 / 0.9, 1 / 0.9, 1 / 0.9, 1.0]), 0.9)
    monkeypatch.setattr(registration, "register", lambda *_: move)
    small = np.diag([0.9, 0.9, 0.9, 1.0]) @ GRID.affine
    case = prepared(tmp_path, SPEC.replace(space="any", registration="affine"), small, t1=t1)
    assert case.qc["modulation_gm"] == "affine"
    assert case.descriptors is not None
    assert case.descriptors.array()[VOLUME] == pytest.approx(regional_sums(usual, TINY) * 0.9**3, rel=1e-2)


def test_a_spec_that_cannot_have_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs frame 'template', intensity 'keep' and modality gm"):
        SPECS["t1_mni"].replace(tissue="approximate")
    assert SPECS["vbm_approximate"].reads("t1")
    assert not SPECS["vbm"].reads("t1")
