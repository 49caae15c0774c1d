"""The 3D vision transformer: stages, patches, positions, intensities, masked decoding, and its use by others."""

from __future__ import annotations

import pytest
import torch
from objective_cases import SPEC, make_batch, make_case, make_config

from models.config import ClassificationConfig, OptimiserConfig, TrainingConfig
from models.config_cinp import ViT3DConfig
from models.embed import window_size
from models.networks.build import build_encoder, build_pretraining_decoder, pool
from models.networks.vit import MaskedDecoder, ViT3D, patches, positions, unpatch, zscore
from models.objectives import build_objective
from models.objectives.base import Clock
from models.optimiser import build_optimiser
from models.recipes import find_recipe

SMALL = ViT3DConfig(patch=8, image_size=(16, 16, 24), width=24, depth=6, heads=2, mlp_ratio=1)


def small(**changes: object) -> ViT3D:
    torch.manual_seed(0)
    encoder = build_encoder(SMALL.replace(**changes))
    assert isinstance(encoder, ViT3D)
    return encoder


def test_defaults_are_vit_b_and_sizes_of_the_literature() -> None:
    with torch.device("meta"):
        base, little = ViT3D(ViT3DConfig()), ViT3D(ViT3DConfig(width=384, heads=6))
    # ViT-B has 85,054,464 parameters in its layers and last norm; an embedding of 16^3 voxels adds 3,146,496.
    layers = 12 * (12 * 768**2 + 13 * 768)
    assert sum(p.numel() for p in base.layers.parameters()) + 2 * 768 == layers + 2 * 768 == 85_056_000
    assert sum(p.numel() for p in base.parameters()) == 88_202_496
    assert sum(p.numel() for p in little.parameters()) == 22_867_584


def test_stages_are_maps_of_tokens_and_the_last_is_normalised() -> None:
    encoder, image = small().eval(), torch.rand(2, 1, 16, 16, 24)
    with torch.no_grad():
        stages = encoder(image)
        tokens = encoder.encode(encoder.tokens(image))
    assert [tuple(stage.shape) for stage in stages] == [(2, 1, 16, 16, 24), *([(2, 24, 2, 2, 3)] * 4)]
    assert torch.equal(stages[0], image)
    assert torch.allclose(pool(stages), tokens.mean(1), atol=1e-6)
    assert stages[4].mean(1).abs().max() < 1e-5


def test_patches_are_in_the_order_of_the_tokens_and_come_back() -> None:
    image = torch.rand(2, 2, 16, 24, 8)
    cut = patches(image, 8)
    assert cut.shape == (2, 6, 2 * 512)
    assert torch.equal(cut[1, 1 * 3 + 2].view(2, 8, 8, 8), image[1, :, 8:, 16:, :])
    assert torch.equal(unpatch(cut, (2, 3, 1), 8), image)
    encoder = small(in_channels=2)
    by_hand = cut @ encoder.patch_embed.weight.flatten(1).T + encoder.patch_embed.bias
    assert torch.allclose(encoder.patch_embed(image).flatten(2).transpose(1, 2), by_hand, atol=1e-5)


def test_positions_count_from_the_middle_so_other_sizes_keep_the_place() -> None:
    small_grid, large_grid = (positions(grid, 24, torch.device("cpu")) for grid in ((2, 2, 3), (4, 6, 5)))
    middle = large_grid.view(4, 6, 5, 24)[1:3, 2:4, 1:4].reshape(12, 24)
    assert torch.equal(small_grid[0], middle)
    assert len({tuple(row) for row in large_grid[0].tolist()}) == 120
    padded = positions((2, 2, 2), 26, torch.device("cpu"))
    assert not padded[..., 24:].any()
    # An image with an empty border has the same tokens in its middle.
    encoder, image = small(standardise="none").eval(), torch.rand(1, 1, 16, 16, 24)
    wide = torch.nn.functional.pad(image, (8, 8, 8, 8, 8, 8))
    with torch.no_grad():
        one, two = encoder.tokens(image), encoder.tokens(wide).view(1, 4, 4, 5, 24)[:, 1:3, 1:3, 1:4]
    assert torch.allclose(one, two.reshape(1, 12, 24), atol=1e-6)


def test_intensities_are_z_scores_over_the_voxels_above_zero() -> None:
    image = torch.rand(2, 2, 8, 8, 8) * (torch.rand(2, 2, 8, 8, 8) > 0.4)
    image[1, 1] = 0
    scored, mean, deviation = zscore(image)
    inside = image[0, 1] > 0
    assert scored[0, 1][inside].mean().abs() < 1e-5
    assert scored[0, 1][inside].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert not scored[image == 0].any()
    assert torch.allclose(scored * deviation + mean, image + mean * (image == 0), atol=1e-6)
    assert not zscore(torch.full((1, 1, 8, 8, 8), 0.5))[0].any()
    encoder = small().eval()
    with torch.no_grad():
        one, two = (encoder(scale * torch.rand(1, 1, 16, 16, 24, generator=torch.Generator().manual_seed(1)))[4]
                    for scale in (1.0, 0.3))  # fmt: skip
        assert torch.allclose(one, two, atol=1e-3)
    assert torch.equal(small(standardise="none").standardised(image), image)


def test_the_decoder_puts_tokens_back_in_their_places() -> None:
    torch.manual_seed(0)
    decoder = MaskedDecoder(SMALL, 12, 1, 2).eval()
    seen, places = torch.randn(2, 3, 24), torch.tensor([[0, 5, 11], [2, 3, 4]])
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        one = decoder(seen, places, (2, 2, 3))
        two = decoder(seen[:, order], places[:, order], (2, 2, 3))
    assert one.shape == (2, 12, 512)
    assert torch.allclose(one, two, atol=1e-6)
    assert not torch.allclose(one[0], one[1])


def test_its_window_is_its_image_size_and_it_has_no_decoder() -> None:
    assert window_size(SMALL, (100, 100, 100)) == (16, 16, 24)
    with pytest.raises(ValueError, match="network 'vit3d' has no decoder; use 'uniformer' or 'unet3d'"):
        build_pretraining_decoder(SMALL)
    with pytest.raises(ValueError, match="network 'vit3d' has no decoder, which objective 'brainmvp' needs"):
        make_config({"kind": "brainmvp"}, SMALL)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"crop edges must be positive multiples of 8, got \(12, 16, 16\)"):
        classifier_config(crop=(12, 16, 16))


def classifier_config(**data: object) -> TrainingConfig:
    settings = ClassificationConfig(modalities=("t1", "t2"), classes=("control", "patient"))
    return make_config(settings, SMALL.replace(in_channels=2), **{"crop": (32, 24, 40), **data})


def test_it_classifies_crops_of_any_size_and_starts_from_one_channel() -> None:
    torch.manual_seed(0)
    objective = build_objective(classifier_config(), SPEC)
    cases = [make_case(i, target=target) for i, target in enumerate(("control", "patient", "patient", "control"))]
    batch = make_batch(objective.sampler(), cases)
    stem = torch.randn(24, 1, 8, 8, 8)
    tensors = {f"encoder.{name}": value for name, value in small().state_dict().items()}
    loaded = objective.load_pretrained({**tensors, "encoder.patch_embed.weight": stem, "decoder.out.weight": stem})
    assert len(loaded) == len(tensors)
    assert torch.allclose(objective.encoder.patch_embed.weight.sum(1, keepdim=True), stem, atol=1e-6)
    options = OptimiserConfig(kind="muon", lr=3e-3)
    optimiser = build_optimiser(objective.parameter_groups(options), options, objective.modules(), fused=False)
    losses = []
    for _ in range(15):
        optimiser.zero_grad()
        loss = objective(batch, Clock(0, 0))["loss"]
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    probabilities = objective.eval().predict(*cases[0])["probabilities"]
    assert probabilities.sum() == pytest.approx(1, abs=1e-6)


def test_configs_from_before_there_was_a_vit_keep_their_digest() -> None:
    config = TrainingConfig.model_validate(
        {
            "name": "a",
            "recipe": "b",
            "network": {},
            "objective": {"kind": "brainmvp"},
            "epochs": 1,
            "data": {"store": "s", "selection": "p", "crop": (16, 16, 16), "batch_size": 2},
        }
    )
    assert config.content_digest() == "8b018c6b25ec70569be35d975a17df24619caaa07b337bfef5bf0e88c9714929"


def test_it_is_fine_tuned_on_the_images_that_it_was_made_for() -> None:
    recipe = find_recipe("classification_tiny")
    network = SMALL.replace(image_size=(16, 24, 16))
    assert recipe("s.zarr", "x", network=network.model_dump()).data.crop == (16, 24, 16)
    assert recipe("s.zarr", "x", network=network, crop=(32, 32, 32)).data.crop == (32, 32, 32)
    assert recipe("s.zarr", "x").data.crop == (32, 48, 32)
