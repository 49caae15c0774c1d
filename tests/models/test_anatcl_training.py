"""AnatCL in the loop: what is fitted to the training cases alone, exact resume, pictures, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anat_phantoms import AGES, DATASET, SPEC, make_anat_training, settings, tiny_config, write_anat
from training_processes import done, losses

from models.anatomy import ATLASES, MEASURES
from models.config import DataConfig, TrainingConfig
from models.config_anatcl import ViewConfig
from models.data import CaseDataset
from models.descriptors import NoDescriptorsError, fit_scale, values_of
from models.distributed import World
from models.encoder import load_encoder
from models.export import read_weights
from models.metrics import read_metrics
from models.objectives import build_objective
from models.objectives.whole_map import WholeMapSampler, apply_view
from models.recipes import RECIPES
from models.recipes_anatcl import TINY_RESNET
from models.records import DescriptorTable, SelectedCase
from models.selection import selection_digest, write_selection
from models.state import start_training
from models.store import open_store
from models.trainer import train, train_step
from models.validate import validate
from tasks.finetune import budget

WORLD = World(0, 1, torch.device("cpu"))
Anat = tuple[str, list[SelectedCase]]


class Killed(BaseException):
    """Stands for kill -9: nothing may be saved after it."""


@pytest.fixture(scope="module")
def anat(tmp_path_factory: pytest.TempPathFactory) -> Anat:
    url = str(tmp_path_factory.mktemp("anat") / "anat.zarr")
    return url, write_anat(url)


@pytest.fixture(scope="module")
def undisturbed(anat: Anat, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "a"
    train(make_anat_training(folder, *anat), folder, WORLD)
    return folder


def kill_at(step: int) -> Any:
    calls = iter(range(1000))

    def stop() -> bool:
        if next(calls) == step:
            raise Killed
        return False

    return stop


@pytest.mark.parametrize("asked", [4, *(pytest.param(step, marks=pytest.mark.full) for step in (1, 6))])
def test_a_killed_training_ends_with_the_same_bits(anat: Anat, undisturbed: Path, tmp_path: Path, asked: int) -> None:
    folder = tmp_path / "a"
    config = make_anat_training(folder, *anat)
    with pytest.raises(Killed):
        train(config, folder, WORLD, kill_at(asked))
    train(config, folder, WORLD)
    assert done(folder)["weights_digest"] == done(undisturbed)["weights_digest"]
    assert losses(folder) == losses(undisturbed)


def test_the_scale_is_of_the_training_cases_alone_and_is_kept_with_the_weights(anat: Anat, undisturbed: Path) -> None:
    tensors, _ = read_weights(undisturbed)
    train_rows = [case.row for case in anat[1] if case.role == "train"]
    stored = open_store(anat[0]).dataset(DATASET)
    values = values_of(stored, train_rows, MEASURES, ATLASES["desikan_killiany"]).astype(float)
    assert tensors["descriptor_mean"].numpy() == pytest.approx(values.mean(axis=0), rel=1e-5)
    assert tensors["descriptor_std"].numpy() == pytest.approx(values.std(axis=0), rel=1e-4)
    everyone = values_of(stored, range(len(AGES)), MEASURES, ATLASES["desikan_killiany"])
    assert tensors["descriptor_mean"].numpy() != pytest.approx(everyone.mean(axis=0), rel=1e-5)
    assert {name for name in tensors if not name.startswith(("encoder.", "head."))} == {
        "descriptor_mean",
        "descriptor_std",
    }


def test_validation_pictures_and_losses_are_there(undisturbed: Path) -> None:
    metrics = done(undisturbed)["metrics"]
    assert {"loss", "loss_age", "loss_anatomy", "embedding_alignment", "feature_rank"} <= set(metrics)
    pictures = {path.name for path in (undisturbed / "pictures").iterdir()}
    assert pictures == {"similarity.png", "embedding.png"}
    train_losses = [line["losses"] for line in read_metrics(undisturbed) if line["kind"] == "train"]
    assert set(train_losses[0]) == {"loss", "loss_age", "loss_anatomy"}


def test_the_rate_falls_by_a_factor_every_few_epochs(anat: Anat, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    config = make_anat_training(folder, *anat, epochs=25, step_epochs=10, step_factor=0.9)
    plan = start_training(config, folder, WORLD).plan
    rates = [plan.lr_factor(step) for step in range(plan.total_steps)]
    assert [rates[0], rates[25], rates[50]] == pytest.approx([1, 0.9, 0.81])
    assert rates == sorted(rates, reverse=True)
    assert [round(rate, 6) for rate in sorted(set(rates))] == [0.81, 0.9, 1.0]


def test_the_encoder_is_fine_tuned_on_whole_maps(anat: Anat, undisturbed: Path, tmp_path: Path) -> None:
    cases = [case.replace(target=("control", "patient")[case.row % 2]) for case in anat[1]]
    path = tmp_path / "selection.parquet"
    write_selection(path, cases)
    values = {"network": TINY_RESNET, "crop": (0, 0, 0), "modalities": ("gm",), "init_from": str(undisturbed)}
    config = RECIPES["classification_tiny"](anat[0], str(path), **values)
    assert "whole images, muon" in budget(config, 10)
    state = start_training(config, tmp_path, WORLD)
    encoder, ours = load_encoder(undisturbed).state_dict(), state.objective.encoder.state_dict()
    assert all(torch.equal(encoder[name], ours[name]) for name in encoder)
    assert np.isfinite(train_step(state, lambda: False).losses["loss"])
    dataset = state.dataset("val")
    found = state.objective.eval().predict(dataset.info(0), dataset.reader(0))["probabilities"]
    assert found.sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="network 'resnet3d' has no decoder, which objective 'segmentation' needs"):
        RECIPES["segmentation_tiny"](anat[0], str(path), **values)


# --- samples


def test_samples_hold_the_whole_map_the_age_and_the_descriptors_by_name(anat: Anat) -> None:
    measures, regions = (MEASURES[2], MEASURES[0]), ("rh_insula", "lh_bankssts")
    sampler = WholeMapSampler("gm", 0, SPEC.grid, SPEC.grid, 12.0, ViewConfig(), measures, regions)
    sample = CaseDataset(*anat, sampler)[3]
    stored = open_store(anat[0]).dataset(DATASET)
    assert np.array_equal(sample["image"], stored.read_crop(3, [0], (0, 0, 0), SPEC.grid))
    assert sample["age"] == AGES[3]
    table = stored.descriptors.values[3]
    names = ATLASES["desikan_killiany"]
    expected = [[table[m, names.index(region)] for region in regions] for m in (2, 0)]
    assert sample["descriptors"].tolist() == pytest.approx(np.array(expected))


def test_a_window_around_the_middle_of_the_grid_may_be_read(anat: Anat, tmp_path: Path) -> None:
    size = (15, 12, 21)
    objective = build_objective(tiny_config(tmp_path, anat[0], "yaware_tiny", crop=size, views=ViewConfig()), SPEC)
    image = CaseDataset(*anat, objective.sampler())[0]["image"][0]
    whole = open_store(anat[0]).dataset(DATASET).read_crop(0, [0], (0, 0, 0), SPEC.grid)[0]
    assert np.array_equal(image[:, :, 3:18], whole[:, 3:15])
    assert not image[:, :, :3].any()
    assert not image[:, :, 18:].any()


def test_views_shift_mirror_and_cut_as_drawn_and_add_noise() -> None:
    image = np.random.default_rng(0).random((6, 7, 8)).astype(np.float32) + 1
    plain = {"flip": False, "shift": [0, 0, 0], "noise_std": 0.0, "noise_seed": 1, "cutout": [0] * 3, "edges": [0] * 3}
    assert np.array_equal(apply_view(image, plain), image)
    assert np.array_equal(apply_view(image, {**plain, "flip": True}), image[::-1])
    shifted = apply_view(image, {**plain, "shift": [2, 0, -1]})
    assert np.array_equal(shifted[:4, :, 1:], image[2:, :, :7])
    assert not shifted[4:].any()
    cut = apply_view(image, {**plain, "cutout": [1, 2, 3], "edges": [2, 2, 2]})
    assert np.argwhere(cut == 0).tolist() == [[x, y, z] for x in (1, 2) for y in (2, 3) for z in (3, 4)]
    noise = apply_view(image, {**plain, "noise_std": 0.5}) - image
    assert noise.std() == pytest.approx(0.5, rel=0.2)


def test_two_views_differ_in_recommended_and_are_one_image_in_paper_and_code(anat: Anat, tmp_path: Path) -> None:
    for preset, count in (("recommended", 2), ("paper", 1), ("code", 1)):
        objective = build_objective(tiny_config(tmp_path, anat[0], preset=preset), SPEC)
        image = CaseDataset(*anat, objective.sampler())[0]["image"]
        assert len(image) == count
    views = tiny_config(tmp_path, anat[0]).objective.views
    shifts = [_view_of(anat, views, epoch)["shift"] for epoch in range(20)]
    assert len({tuple(shift) for shift in shifts}) == 1, "12 mm voxels are not shifted by 6 mm"
    assert len({_view_of(anat, views, epoch)["noise_seed"] for epoch in range(20)}) == 20


def _view_of(anat: Anat, views: ViewConfig, epoch: int) -> dict[str, Any]:
    sampler = WholeMapSampler("gm", 0, SPEC.grid, SPEC.grid, 12.0, views)
    return sampler.draw(CaseDataset(*anat, sampler).info(0), np.random.default_rng(epoch), True)["views"][0]


# --- bad input


def start(folder: Path, url: str, selection: list[SelectedCase], **changes: Any) -> Any:
    return start_training(make_anat_training(folder, url, selection, **changes), folder, WORLD)


def test_no_ages(anat: Anat, tmp_path: Path) -> None:
    ageless = [case.replace(age=None) for case in anat[1]]
    with pytest.raises(ValueError, match=r"none of the 10 training cases has an age, .* or set weight_age to 0"):
        start(tmp_path / "a", anat[0], ageless)
    with pytest.raises(ValueError, match=r"none of the 10 training cases has an age, .* or use another recipe"):
        start(tmp_path / "b", anat[0], ageless, recipe="age_regression_tiny")
    assert start(tmp_path / "c", anat[0], ageless, recipe="simclr_tiny").plan.cases == 10
    one = [case.replace(age=None) if case.row == 4 else case for case in anat[1]]
    with pytest.raises(ValueError, match="case anat/case-4 has no age, which age regression is fitted to"):
        start(tmp_path / "d", anat[0], one, recipe="age_regression_tiny")
    assert start(tmp_path / "e", anat[0], one).plan.cases == 10


def test_no_descriptors_in_the_store(anat: Anat, tmp_path: Path) -> None:
    url = str(tmp_path / "none.zarr")
    selection = write_anat(url, without_descriptors=range(len(AGES)))
    with pytest.raises(NoDescriptorsError, match=r"no dataset of .*none.zarr that is trained on \(anat\) has descript"):
        start(tmp_path / "a", url, selection)
    assert start(tmp_path / "b", url, selection, recipe="yaware_tiny").plan.cases == 10


def test_wrong_atlas_and_a_measure_that_is_not_there(anat: Anat, tmp_path: Path) -> None:
    with pytest.raises(NoDescriptorsError, match="descriptors on atlas 'desikan_killiany', the training asks for 'des"):
        start(tmp_path / "a", anat[0], anat[1], atlas="destrieux")
    with pytest.raises(NoDescriptorsError, match="has no measure 'curvature' in its descriptors; it has: cortical_th"):
        start(tmp_path / "b", anat[0], anat[1], measures=("curvature", MEASURES[0]))

    def without_area(row: int, table: DescriptorTable) -> DescriptorTable:
        return table.replace(values={name: table.values[name] for name in MEASURES[:2]})

    url = str(tmp_path / "two.zarr")
    selection = write_anat(url, change=without_area)
    with pytest.raises(NoDescriptorsError, match="no region has two different values of 'surface_area_mm2' among the "):
        start(tmp_path / "c", url, selection)
    assert start(tmp_path / "d", url, selection, measures=MEASURES[:2]).plan.cases == 10


def test_descriptors_of_two_bases_are_not_mixed(anat: Anat) -> None:
    store = open_store(anat[0])
    stored = store.dataset("anat")
    found = stored.descriptors
    other = SimpleNamespace(name="other", url=stored.url, descriptors=found._replace(basis="approximate"))
    both = SimpleNamespace(url=anat[0], dataset=lambda name: stored if name == "anat" else other)
    train = [anat[1][0], anat[1][1].replace(dataset="other")]
    with pytest.raises(
        NoDescriptorsError, match=r"differ in basis \(other: approximate, anat: freesurfer\): what diff"
    ):
        fit_scale(both, train, MEASURES, "desikan_killiany")


def test_missing_descriptors_ages_and_regions_take_part_in_what_they_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def with_holes(row: int, table: DescriptorTable) -> DescriptorTable:
        holes = (None, *table.values[MEASURES[0]][1:])
        return table.replace(values={**table.values, MEASURES[0]: holes}, missing_regions=1) if row == 3 else table

    url = str(tmp_path / "holes.zarr")
    selection = write_anat(url, without_age=(1,), without_descriptors=(2,), change=with_holes)
    for variant in ("global", "local"):
        folder = tmp_path / variant
        state = start(folder, url, selection, variant=variant, batch_size=5)
        assert np.isfinite(train_step(state, lambda: False).losses["loss"])
        validate(state, lambda: False, force=True)
    assert "1 of 10 training cases have no age: they are negatives alone there" in caplog.text
    assert "1 of 10 training cases have no descriptors: negatives alone there" in caplog.text
    scale = fit_scale(open_store(url), [c for c in selection if c.role == "train"], MEASURES, "desikan_killiany")
    assert scale.cases == 9


def test_a_region_that_does_not_vary_is_left_out(tmp_path: Path) -> None:
    def constant(row: int, table: DescriptorTable) -> DescriptorTable:
        values = {name: (table_mean(name), *row[1:]) for name, row in table.values.items()}
        return table.replace(values=values)

    def table_mean(name: str) -> float:
        return {MEASURES[0]: 2.5, MEASURES[1]: 5000.0, MEASURES[2]: 2000.0}[name]

    url = str(tmp_path / "constant.zarr")
    selection = write_anat(url, change=constant)
    state = start(tmp_path / "a", url, selection)
    assert (state.objective.descriptor_std[:, 0] == 0).all()
    scored = state.objective.scored(torch.ones(1, 3, 68))
    assert scored[0, :, 0].isnan().all()
    assert scored[0, :, 1:].isfinite().all()


def test_a_store_without_the_modality_and_a_network_of_two_channels(anat: Anat, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the store has no modality 't1'; it holds: gm"):
        start(tmp_path / "a", anat[0], anat[1], modality="t1")
    with pytest.raises(ValueError, match="'anatcl' encodes one map: in_channels must be 1, got 2"):
        start(tmp_path / "b", anat[0], anat[1], in_channels=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": (0, 12, 15)}, r"positive, or all 0 for the whole grid, got \(0, 12, 15\)"),
        ({"network": {"kind": "unet3d"}}, r"positive multiples of 16, got \(0, 0, 0\)"),
        ({"objective": {"kind": "brainmvp"}}, "network 'resnet3d' has no decoder, which objective 'brainmvp' needs"),
    ],
)
def test_crops_and_decoders_of_the_network(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, "s", **changes)


def test_configs_from_before_keep_their_digest() -> None:
    """Settings that came later do not count while they have the value that trainings had before."""
    config = TrainingConfig.model_validate(
        {
            "name": "a",
            "recipe": "b",
            "network": {},
            "objective": {"kind": "brainmvp"},
            "data": DataConfig(store="s", selection="p", crop=(16, 16, 16), batch_size=2),
            "epochs": 1,
        }
    )
    other = config.replace(optimiser=config.optimiser.replace(schedule="step"))
    assert other.content_digest() != config.content_digest()
    dumped = config.model_dump(mode="json")
    for name in ("schedule", "step_epochs", "step_factor"):
        del dumped["optimiser"][name]
    assert TrainingConfig.model_validate(dumped).content_digest() == config.content_digest()
    case = SelectedCase(dataset="a", row=0, case="c", subject="s", digest="d", role="train")
    assert selection_digest([case.replace(age=3.0)]) != selection_digest([case])
    assert settings().weight_age == 1
