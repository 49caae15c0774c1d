"""The connectivity cohort: committed effects, T1s and signals that say what the traits say, layouts that are read."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2_contingency

from brainloom.cli import app
from models.anatomy import DESIKAN_KILLIANY
from models.connectomes import ConnectomeSpec
from models.spec import find_spec
from studies.linear import cosines, fit_components, ridge
from tasks.atlas import region_weights
from tasks.bold import ConfoundsFile, series_from_bold
from tasks.connectome import make_connectome
from tasks.phantom import DifferentCohortError, fmriprep
from tasks.phantom import effects_connectivity as effects
from tasks.phantom.connectivity import (
    ConnectivityConfig,
    ConnectivityPaths,
    connectivity_paths,
    make_connectivity_subject,
    write_connectivity_cohort,
)
from tasks.phantom.connectivity_images import atlas_image, bold_image, mni_grid, t1_image
from tasks.phantom.deform import IDENTITY
from tasks.phantom.effects_connectivity import (
    GLOBAL,
    NETWORKS,
    TRAITS,
    ConnectivityTraits,
    draw_connectivity_traits,
    network_of_regions,
    shift_of,
)
from tasks.phantom.signals import Recording, network_means, record, true_correlations
from tasks.phantom.sources import connectivity_sources
from tasks.retrieval import retrieval
from tasks.roi_series import parse_series
from tasks.sources import find_scans
from tasks.volumes import template_grid

SUBJECTS = 450
CONFIG = ConnectivityConfig(seed=3, subjects=3, frames=100, bold_subjects=1)
EDGES = np.triu_indices(len(DESIKAN_KILLIANY), 1)
DIAGNOSES = ("hypoconnected", "hyperconnected")


@pytest.fixture(scope="module")
def people() -> list[ConnectivityTraits]:
    return [draw_connectivity_traits(0, number, True) for number in range(SUBJECTS)]


@pytest.fixture(scope="module")
def labels(people: list[ConnectivityTraits]) -> pd.DataFrame:
    return pd.DataFrame([one.model_dump(include={"age", "sex", "site", "diagnosis", "fd_mm"}) for one in people])


@pytest.fixture(scope="module")
def connectivity(people: list[ConnectivityTraits]) -> tuple[np.ndarray, np.ndarray]:
    """Mean Fisher z of every network and between networks, true and of the published series, (n, 8) each."""
    true, measured = [], []
    for number, one in enumerate(people):
        rng = np.random.default_rng(number)
        correlations = true_correlations(one, rng)
        series = record(one, correlations, 200, 2.0, rng).cleaned()
        true.append(list(network_means(correlations).values()))
        measured.append(list(network_means(np.corrcoef(series.T)).values()))
    return np.array(true), np.array(measured)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ConnectivityPaths]:
    folder = tmp_path_factory.mktemp("connectivity")
    return folder, write_connectivity_cohort(CONFIG, folder)


def cohen_d(values: np.ndarray, group: np.ndarray, rest: np.ndarray) -> np.ndarray:
    a, b = values[group], values[rest]
    return np.asarray((a.mean(axis=0) - b.mean(axis=0)) / np.sqrt((a.var(axis=0) + b.var(axis=0)) / 2))


def correlation_by_column(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(first.T, second.T, strict=True)])


def test_the_committed_sizes_have_not_been_touched() -> None:
    """A change here is a change of the question: it needs a decision, not a better-looking table."""
    assert (effects.THICKNESS_PER_TRAIT, effects.AREA_PER_TRAIT) == (0.08, 0.06)
    assert (effects.THICKNESS_PER_GLOBAL, effects.AREA_PER_GLOBAL) == (0.04, 0.02)
    assert (effects.THICKNESS_SD_REGION, effects.AREA_SD_REGION, effects.RESIDUAL_MM) == (0.03, 0.03, 0.75)
    assert (effects.THICKNESS_MEAN, effects.AREA_MEAN) == (0.9, 0.9)
    assert (effects.THICKNESS_PER_YEAR, effects.AREA_SEX_DIFFERENCE) == (-0.0015, 0.02)
    assert (effects.COUPLING, effects.PERSONAL_SHARE, effects.PERSONAL_FACTORS) == (0.95, 0.15, 12)
    assert (effects.WITHIN_Z, effects.WITHIN_Z_PER_TRAIT, effects.BETWEEN_Z) == (0.75, 0.16, 0.20)
    assert (effects.Z_PER_GLOBAL, effects.Z_PER_YEAR, effects.HOMOTOPIC) == (0.06, -0.002, 0.2)
    assert (effects.TRAIT_D, effects.FD_LOG_PATIENTS, effects.FD_LOG_SD) == (1.2, 0.25, 0.35)
    assert effects.HYPOCONNECTED == ("default", "frontoparietal", "limbic")
    assert effects.HYPERCONNECTED == ("visual", "somatomotor", "dorsal_attention")


def test_every_region_is_in_one_network() -> None:
    named = [region for regions in NETWORKS.values() for region in regions]
    assert sorted(named) == sorted(name.split("_")[1] for name in DESIKAN_KILLIANY[:34])
    assert np.bincount(network_of_regions()).tolist() == [2 * len(regions) for regions in NETWORKS.values()]


@pytest.mark.parametrize("diagnosis", DIAGNOSES)
def test_a_diagnosis_moves_its_traits_and_the_connectivity_of_their_networks(
    people: list[ConnectivityTraits],
    labels: pd.DataFrame,
    connectivity: tuple[np.ndarray, np.ndarray],
    diagnosis: str,
) -> None:
    group, rest = (labels.diagnosis == diagnosis).to_numpy(), (labels.diagnosis == "control").to_numpy()
    for traits in ([one.structure for one in people], [one.function for one in people]):
        # Standard error of one d: 0.12.
        assert cohen_d(np.array(traits), group, rest) == pytest.approx(shift_of(diagnosis), abs=0.4)
    moved = shift_of(diagnosis) != 0
    assert moved.sum() == 3
    for values, least in zip(connectivity, (0.8, 0.7), strict=True):
        found = cohen_d(values, group, rest)
        assert np.abs(found[moved]).min() > least
        assert (np.sign(found[moved]) == np.sign(shift_of(diagnosis)[moved])).all()
        assert np.abs(found[~moved]).max() < 0.35


def test_structure_and_connectivity_share_the_traits(
    people: list[ConnectivityTraits], connectivity: tuple[np.ndarray, np.ndarray]
) -> None:
    structure, function = (np.array([getattr(one, name) for one in people]) for name in ("structure", "function"))
    assert correlation_by_column(structure, function) == pytest.approx(effects.COUPLING, abs=0.03)
    true, measured = connectivity
    assert correlation_by_column(function, true).min() > 0.88
    assert correlation_by_column(structure, measured).min() > 0.7
    volume = np.array([np.array(one.thickness) * np.array(one.area) for one in people])
    by_network = np.stack([volume[:, network_of_regions() == n].mean(axis=1) for n in range(len(NETWORKS))], axis=1)
    assert correlation_by_column(structure[:, :-1], by_network).min() > 0.9
    assert volume.min() > 0.3


def test_labels_are_independent_of_each_other_and_patients_move_more(labels: pd.DataFrame) -> None:
    for one, other in (("diagnosis", "site"), ("diagnosis", "sex"), ("site", "sex")):
        assert chi2_contingency(pd.crosstab(labels[one], labels[other])).pvalue > 0.01
    assert labels.groupby("diagnosis").age.mean().max() - labels.groupby("diagnosis").age.mean().min() < 4
    patients = (labels.diagnosis != "control").to_numpy()
    moving = np.log(labels.fd_mm.to_numpy())
    assert cohen_d(moving, patients, ~patients) == pytest.approx(0.71, abs=0.25)
    assert labels.diagnosis[:6].value_counts().to_dict() == {"control": 2, "hypoconnected": 2, "hyperconnected": 2}
    assert {draw_connectivity_traits(0, number, patients=False).diagnosis for number in range(6)} == {"control"}


@pytest.mark.parametrize("extreme", [-effects.TRAIT_MAX, effects.TRAIT_MAX])
def test_correlations_are_positive_definite_at_the_ends_of_the_traits(
    people: list[ConnectivityTraits], extreme: float
) -> None:
    for whole in (-effects.TRAIT_MAX, effects.TRAIT_MAX):
        for age in effects.AGE_RANGE_YEARS:
            one = people[0].replace(function=(*(extreme,) * 7, whole), age=age)
            found = true_correlations(one, np.random.default_rng(0))
            assert np.linalg.eigvalsh(found)[0] > 0
            assert np.diag(found) == pytest.approx(1)
            assert found == pytest.approx(found.T, abs=1e-12)


def test_a_clean_series_has_the_true_connectome() -> None:
    files, marker = make_connectivity_subject(CONFIG.replace(clean=True, bold_subjects=0), 1)
    spec = find_spec("cinp_tiny").connectome
    assert spec is not None
    raw = next(data for name, data in files.items() if name.endswith(".1D"))
    assert raw.startswith(b"#1\t#2\t")
    matrix, qc = make_connectome(parse_series(raw, "sub.1D", spec), spec)
    assert qc["connectome_frames"] == CONFIG.frames
    means = network_means(np.tanh(matrix))
    assert list(means) == list(TRAITS)
    for name, value in means.items():
        assert value == pytest.approx(marker[f"z.{name}"], abs=1e-4)


def test_a_trait_is_seen_in_the_cortex_of_its_network_and_nowhere_else(people: list[ConnectivityTraits]) -> None:
    place = TRAITS.index("visual")
    own = network_of_regions() == place
    scans = []
    for sign in (-1, 1):
        grown = 1 + sign * 2 * effects.THICKNESS_PER_TRAIT * own
        one = people[0].replace(thickness=tuple(grown * effects.THICKNESS_MEAN), area=(effects.AREA_MEAN,) * 68)
        scans.append(t1_image(one, IDENTITY, 6.0, np.random.default_rng(0), quiet=True).stored)
    grid = mni_grid(6.0)
    assert (grid.shape, scans[0].shape) == (template_grid(find_spec("cinp_tiny")).shape, grid.shape)
    assert grid.affine.tolist() == template_grid(find_spec("cinp_tiny")).affine.tolist()
    weights = region_weights(grid)
    change = (weights @ np.abs(scans[1] - scans[0]).ravel()) / (weights @ scans[0].ravel())
    assert change[own].min() > 0.05
    assert np.median(change[~own]) < 0.01


@pytest.fixture(scope="module")
def restless(people: list[ConnectivityTraits]) -> Recording:
    one = people[0].replace(fd_mm=0.4)
    return record(one, true_correlations(one, np.random.default_rng(1)), 150, 2.0, np.random.default_rng(2))


def test_a_head_moves_as_intended_and_its_spikes_are_in_the_signals(restless: Recording) -> None:
    moved = restless.displacement_mm
    assert np.isnan(moved[0])
    assert np.nanmean(moved) == pytest.approx(0.4, rel=0.4)
    spikes = moved > 0.5
    assert 0.05 < spikes.mean() < 0.5
    level = np.abs(restless.artefact).mean(axis=1)
    # A frame behind a spike is displaced from it, and quiet.
    assert level[spikes].mean() > 2 * level[~spikes].mean()
    assert (
        np.abs(restless.cleaned() - restless.neural - restless.thermal).max() < 0.11 * np.abs(restless.artefact).max()
    )


def test_scrubbing_and_regression_recover_the_clean_connectome_from_bold(restless: Recording, tmp_path: Path) -> None:
    bold = bold_image(restless, 6.0, 2.0, np.random.default_rng(3))
    image = nib.Nifti1Image.from_bytes(gzip.decompress(bold))
    assert (image.shape, image.header.get_zooms()) == ((32, 40, 32, 150), (6.0, 6.0, 6.0, 2.0))
    names = [name.rsplit("/", 1)[-1] for name in fmriprep.file_names("sub-0001")]
    confounds = ConfoundsFile(fmriprep.confounds_table(restless, 2.0), names[5])
    atlas = tmp_path / "atlas.nii.gz"
    atlas.write_bytes(atlas_image(2.0).to_bytes())
    true = np.corrcoef(restless.neural.T)[EDGES]

    def found(**changes: object) -> tuple[float, float, int]:
        sha256 = hashlib.sha256(atlas.read_bytes()).hexdigest()
        body = {"atlas": "desikan_killiany", "atlas_image": str(atlas), "atlas_sha256": sha256, **changes}
        spec = ConnectomeSpec.model_validate(body)
        matrix, qc = make_connectome(series_from_bold(bold, names[2], confounds, spec), spec)
        r = np.tanh(matrix[EDGES])
        return float(np.corrcoef(r, true)[0, 1]), float((r - true).mean()), int(qc["connectome_frames"])

    likeness, bias, kept = found()
    assert likeness > 0.85
    assert abs(bias) < 0.05
    assert kept == 150 - (restless.displacement_mm > 0.5).sum()
    assert (
        found(confounds=("high_pass", "wm_csf"))[1] < found(confounds=("high_pass", "wm_csf"), fd_threshold_mm=0)[1] / 2
    )
    assert found(confounds=(), fd_threshold_mm=0)[0] < 0.6


def test_the_sources_read_what_was_written(cohort: tuple[Path, ConnectivityPaths], tmp_path: Path) -> None:
    folder, paths = cohort
    found = [find_scans(source, str(tmp_path)) for source in connectivity_sources(CONFIG, folder)]
    rows = [(row.dataset, row.case, row.modality, row.status, row.detail) for one in found for row in one.scans]
    assert rows == [
        *(
            ("phantom-connect", f"sub-000{n}", modality, "ok", "")
            for modality in ("t1", "roi_series")
            for n in (1, 2, 3)
        ),
        *(
            ("phantom-connect-fmriprep", "sub-0001", modality, "ok", "")
            for modality in ("t1", "brain_mask", "bold", "bold_confounds")
        ),
    ]
    people = pd.read_csv(paths.participants, sep="\t")
    assert list(people) == ["participant_id", "age", "sex", "site", "diagnosis", "mean_fd"]
    latents = pd.read_parquet(paths.latents)
    assert latents.subject.tolist() == people.participant_id.tolist()
    true = draw_connectivity_traits(CONFIG.seed, 1, True)
    assert latents[f"trait.{GLOBAL}"][1] == pytest.approx(true.structure[-1])
    assert latents["function.visual"][1] == pytest.approx(true.function[0])
    assert found[0].phenotypes.diagnosis.tolist() == found[2].phenotypes.diagnosis.tolist() == people.diagnosis.tolist()
    assert paths.atlas.exists()


def test_a_cohort_is_completed_and_never_changed(cohort: tuple[Path, ConnectivityPaths]) -> None:
    folder, paths = cohort
    lost = [paths.series / "sub-0002_rois_dk.1D", paths.root / "sub-0003/anat/sub-0003_T1w.nii.gz"]
    contents, kept = [path.read_bytes() for path in lost], paths.cohort.stat().st_mtime_ns
    for path in lost:
        path.unlink()
    (folder / ".phantom/phantom-connect/sub-0002.json").unlink()
    (paths.series / ".sub-0002_rois_dk.1D.tmp").write_text("half")
    counts: list[tuple[int, int]] = []
    write_connectivity_cohort(CONFIG, folder, lambda done, total: counts.append((done, total)))
    assert [path.read_bytes() for path in lost] == contents
    assert counts == [(1, 3), (2, 3), (3, 3)], "the first subject is not made again"
    assert paths.cohort.stat().st_mtime_ns == kept
    assert not list(folder.rglob("*.tmp"))
    with pytest.raises(DifferentCohortError, match=r"another config \(seed: 3 there, 4 wanted\)"):
        write_connectivity_cohort(CONFIG.replace(seed=4), folder)


def test_a_subject_depends_on_seed_and_number_alone(cohort: tuple[Path, ConnectivityPaths]) -> None:
    files, _ = make_connectivity_subject(CONFIG.replace(subjects=900), 2)
    assert len(files) == 2
    for name, data in files.items():
        assert (cohort[0] / name).read_bytes() == data
    assert make_connectivity_subject(CONFIG.replace(seed=9), 2)[0] != files


def test_the_command_line_writes_one(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    options = ["--subjects", "1", "--frames", "100", "--processes", "1", "--no-patients"]
    done = CliRunner().invoke(app, ["phantom-connect", str(tmp_path / "c"), *options])
    assert done.exit_code == 0, done.output
    assert "derivatives/cpac" in done.output
    assert "fmriprep" not in done.output
    paths = connectivity_paths(ConnectivityConfig(), tmp_path / "c")
    assert len(list(paths.series.glob("*.1D"))) == 1


@pytest.mark.full
def test_a_linear_model_reads_traits_from_t1s_and_finds_the_own_connectome(tmp_path: Path) -> None:
    """So the task is possible: what docs/phantom.md calls the linear ceiling, smaller."""
    config = ConnectivityConfig(seed=0, subjects=200, patients=False)
    paths = write_connectivity_cohort(config, tmp_path, processes=2)
    subjects = sorted(path.name for path in paths.root.glob("sub-*"))
    voxels = np.stack([_normalised(paths.root / name / f"anat/{name}_T1w.nii.gz") for name in subjects])
    series = [np.loadtxt(paths.series / f"{name}_rois_dk.1D", comments="#") for name in subjects]
    edges = np.arctanh(np.stack([np.asarray(np.corrcoef(one.T))[EDGES] for one in series]))
    latents = pd.read_parquet(paths.latents)
    traits = latents[[f"trait.{name}" for name in TRAITS]].to_numpy()
    train, test = np.arange(200) < 140, np.arange(200) >= 140
    guess = ridge(voxels[train], traits[train], voxels[test])
    explained = 1 - np.square(guess - traits[test]).mean(axis=0) / np.square(traits[test]).mean(axis=0)
    assert np.count_nonzero(explained > 0.5) >= 5
    components = fit_components(edges[train], len(TRAITS))
    guess = ridge(voxels[train], components.of(edges[train]), voxels[test])
    first, fifth = retrieval(cosines(guess, components.of(edges[test]))[None], np.arange(60))
    assert first.interval.low > 3 * first.chance
    assert fifth.interval.low > 2 * fifth.chance


def _normalised(path: Path) -> np.ndarray:
    """Return the voxels of a T1 between its percentiles 0.5 and 99.5, as spec cinp_tiny does."""
    data = nib.load(path).get_fdata().ravel()
    low, high = np.percentile(data[data > 0], (0.5, 99.5))
    return np.clip((data - low) / (high - low), 0, 1)
