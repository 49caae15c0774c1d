"""Masked autoencoder and SimCLR on crops: losses against plain numpy, samples, resume, transfer, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from objective_cases import NETWORK, SPEC, make_batch, make_case, make_config
from training_phantoms import make_training, write_blobs

from models.config import (
    ClassificationConfig,
    CropContrastConfig,
    MaskedCropsConfig,
    NetworkConfig,
    Region,
    ResNet3DConfig,
    SegmentationConfig,
    TrainingConfig,
    UNet3DConfig,
)
from models.distributed import World
from models.encoder import load_encoder
from models.export import read_done
from models.metrics import read_metrics
from models.objectives import build_objective
from models.objectives.base import Clock
from models.objectives.contrast import nt_xent
from models.objectives.crop_contrast import CropContrast
from models.objectives.masked_crops import MaskedCrops
from models.recipes import RECIPES
from models.records import MODALITIES
from models.trainer import train

START = Clock(step=0, epoch=0)
UNET = UNet3DConfig(widths=(8, 8, 16, 16), blocks=(1, 1, 1, 1))
MAE = MaskedCropsConfig(mask_block=8)
SETTINGS = {"mae": MAE, "simclr_crops": CropContrastConfig(head_dim=8)}
CROP = (16, 16, 16)


def build(kind: str, network: NetworkConfig | UNet3DConfig = NETWORK, **data: Any) -> Any:
    torch.manual_seed(0)
    return build_objective(make_config(SETTINGS[kind], network, **{"crop": CROP, **data}), SPEC)


# --- masked autoencoder


@pytest.mark.parametrize("seed", range(3))
def test_the_masked_loss_equals_plain_numpy(seed: int) -> None:
    objective = build("mae", crop=(16, 16, 32))
    assert isinstance(objective, MaskedCrops)
    objective.mask_token.data.fill_(0.3)
    cases = [make_case(0), make_case(1, present=("t1",)), make_case(2)]
    batch = make_batch(objective.sampler(), cases, seed=seed)
    seen: list[torch.Tensor] = []
    handle = objective.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    loss = objective(batch, START)["loss"].item()
    handle.remove()
    restored = objective.decoder(objective.encoder(seen[0]))[:, 0].detach().numpy()
    total = count = 0.0
    for case in range(3):
        for view in range(2):
            image, mask = batch["image"][case, view].numpy(), batch["mask"][case, view].numpy()
            assert int((~mask).sum()) == math.floor(mask.size * 0.25)
            given = seen[0][view * 3 + case, 0].numpy()
            for place in np.ndindex(mask.shape):
                cube = tuple(slice(8 * k, 8 * k + 8) for k in place)
                if mask[place]:
                    assert (given[cube] == np.float32(0.3)).all(), "hidden cubes have one value"
                    total += float(((restored[view * 3 + case][cube] - image[cube]).astype(float) ** 2).sum())
                    count += 8**3
                else:
                    assert (given[cube] == image[cube]).all(), "the others are as they were"
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_two_modalities_are_masked_one_by_one_and_a_single_one_twice() -> None:
    objective = build("mae")
    batch = make_batch(objective.sampler(), [make_case(0, present=("t2", "flair")), make_case(0, present=("t1",))])
    assert not torch.equal(batch["image"][0, 0], batch["image"][0, 1])
    assert torch.equal(batch["image"][1, 0], batch["image"][1, 1])
    assert batch["image"].shape == (2, 2, *CROP)


def test_validation_measures_the_hidden_foreground_and_pictures_show_it() -> None:
    objective = build("mae").eval()
    batch = make_batch(objective.sampler(), [make_case(0), make_case(1, present=("t1",))], train=False)
    metrics = objective.validate(batch, START)
    assert set(metrics) == {"loss", "psnr_model"}
    assert float(metrics["loss"][1]) == 4, "both images of each case count"
    assert float(metrics["loss"][0] / metrics["loss"][1]) == pytest.approx(objective(batch, START)["loss"].item())
    pictures = objective.pictures(batch, START)
    assert set(pictures) == {"restored"}
    assert pictures["restored"].dtype == np.uint8


@pytest.mark.parametrize("network", [NETWORK, UNET], ids=["uniformer", "unet3d"])
@pytest.mark.parametrize("kind", sorted(SETTINGS))
def test_every_parameter_is_trained(kind: str, network: NetworkConfig | UNet3DConfig) -> None:
    objective = build(kind, network)
    batch = make_batch(objective.sampler(), [make_case(number) for number in range(3)])
    objective(batch, START)["loss"].backward()
    assert [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.any()] == []


# --- SimCLR


def slow_nt_xent(z: np.ndarray, people: list[int], temperature: float) -> float:
    """z: all first views, then all second ones (2N, D)."""
    count, total = len(people), 0.0
    for i in range(2 * count):
        other = (i + count) % (2 * count)
        rivals = [t for t in range(2 * count) if t == other or people[t % count] != people[i % count]]
        s = {t: float(z[i] @ z[t]) / temperature for t in rivals}
        total -= s[other] - math.log(sum(math.exp(value) for value in s.values()))
    return total / (2 * count)


@pytest.mark.parametrize("people", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 2], [7, 7, 7, 7, 7]], ids=["all", "some", "one"])
def test_the_contrast_equals_plain_numpy(people: list[int]) -> None:
    for seed in range(3):
        z = np.random.default_rng(seed).standard_normal((10, 6))
        z /= np.linalg.norm(z, axis=1, keepdims=True)
        found = nt_xent(torch.from_numpy(z), torch.tensor(people), 0.2)
        assert float(found) == pytest.approx(slow_nt_xent(z, people, 0.2), abs=1e-9)
    assert (float(found) == pytest.approx(0, abs=1e-9)) == (len(set(people)) == 1), "no negatives, no loss"


def test_the_objective_contrasts_the_views_of_a_batch() -> None:
    objective = build("simclr_crops").eval()
    assert isinstance(objective, CropContrast)
    batch = make_batch(objective.sampler(), [make_case(0), make_case(1), make_case(0), make_case(3)])
    z = []
    for view in range(2):
        stage = objective.encoder(batch["image"][:, view, None])[-1]
        z.append(F.normalize(objective.head(stage.mean((2, 3, 4))), dim=1).detach().double().numpy())
    loss = objective(batch, START)["loss"].item()
    assert loss == pytest.approx(slow_nt_xent(np.concatenate(z), [0, 1, 0, 3], 0.1), rel=1e-4)
    metrics = objective.validate(batch, START)
    assert float(metrics["loss"][0]) == pytest.approx(4 * loss, rel=1e-5)
    assert {"embedding_alignment", "embedding_uniformity", "embedding_rank"} < set(metrics)
    assert objective.validate({name: value[:1] for name, value in batch.items()}, START) == {}
    assert set(objective.pictures(batch, START)) == {"views", "view_cosines"}


def test_both_views_are_crops_of_one_modality_and_differ() -> None:
    sampler = build("simclr_crops").sampler()
    info, reader = make_case(0, present=("t2", "flair", "mra"))
    channels = set()
    for seed in range(12):
        draw = json.loads(json.dumps(sampler.draw(info, np.random.default_rng(seed), True)))
        reader.asked.clear()
        sample = sampler.load(info, reader, draw)
        assert reader.asked == [draw["channel"]] * 2
        assert MODALITIES[sample["modality"]] == MODALITIES[draw["channel"]]
        assert sample["image"].shape == (2, *CROP)
        assert not np.array_equal(sample["image"][0], sample["image"][1])
        for view in draw["views"]:
            assert all(0 <= at <= have - 16 for at, have in zip(view["start"], info.extent, strict=True))
            assert math.exp(-0.3) <= view["gamma"] <= math.exp(0.3)
            assert max(abs(view["scale"][0]), abs(view["shift"][0])) <= 0.3
        channels.add(draw["channel"])
    assert channels == {MODALITIES.index(name) for name in ("t2", "flair", "mra")}


def test_intensities_are_bent_scaled_and_shifted_where_there_is_an_image() -> None:
    plain = {"flip": False, "noise_std": 0.0, "cutout_share": 0.0}
    settings = CropContrastConfig(views=plain)
    sampler = build_objective(make_config(settings, crop=CROP), SPEC).sampler()
    info, reader = make_case(0, present=("t1",))
    draw = sampler.draw(info, np.random.default_rng(3), True)
    view = draw["views"][0]
    raw = reader.read([draw["channel"]], view["start"], CROP)[0]
    bent = np.where(raw > 0, raw ** view["gamma"] * (1 + view["scale"][0]) + view["shift"][0], 0)
    np.testing.assert_allclose(sampler.load(info, reader, draw)["image"][0], bent, rtol=1e-5)


# --- trainings


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    url = str(tmp_path_factory.mktemp("crops") / "blobs.zarr")
    return url, write_blobs(url, cases=8)


@pytest.mark.parametrize("kind", sorted(SETTINGS))
def test_a_killed_training_ends_with_the_same_bits_and_its_encoder_is_fine_tuned(
    kind: str, blobs: Any, tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def kill() -> bool:
        if next(calls) == 4:
            raise Killed
        return False

    world, calls = World(0, 1, torch.device("cpu")), iter(range(1000))
    for name in ("whole", "killed"):
        folder = tmp_path / name
        config = make_training(folder, *blobs, objective=SETTINGS[kind], epochs=2, validate_every=3)
        if name == "killed":
            with pytest.raises(Killed):
                train(config, folder, world, kill)
            torch.rand(7)
        train(config, folder, world)
    whole, killed = (read_done(tmp_path / name) or {} for name in ("whole", "killed"))
    assert whole["weights_digest"] == killed["weights_digest"]
    assert whole["metrics"] == killed["metrics"]
    assert f"objective `{kind}`" in (tmp_path / "whole" / "model_card.md").read_text()
    assert any(line["kind"] == "val" for line in read_metrics(tmp_path / "whole"))
    assert len(load_encoder(tmp_path / "whole")(torch.rand(1, 1, *CROP))) == 5
    tuned = make_training(
        tmp_path / "tuned",
        *blobs,
        network=config.network.replace(in_channels=2),
        objective=ClassificationConfig(modalities=("t1", "t2"), classes=("control", "patient")),
        init_from=str(tmp_path / "whole"),
        epochs=1,
    )
    train(tuned, tmp_path / "tuned", world)
    assert (read_done(tmp_path / "tuned") or {})["init_digest"] == whole["weights_digest"]
    assert f"weights of `whole` ({whole['weights_digest']})" in (tmp_path / "tuned" / "model_card.md").read_text()


@pytest.mark.parametrize("network", [NETWORK, UNET], ids=["uniformer", "unet3d"])
@pytest.mark.parametrize("kind", sorted(SETTINGS))
def test_the_encoder_goes_into_segmentation_as_brainmvps_does(kind: str, network: NetworkConfig | UNet3DConfig) -> None:
    tensors = build(kind, network).exports()
    settings = SegmentationConfig(modalities=("t1", "t2"), regions=(Region(name="WT", labels=(1, 2)),))
    objective = build_objective(make_config(settings, network.replace(in_channels=2), crop=CROP), SPEC)
    loaded = objective.load_pretrained(tensors)
    assert {name for name in tensors if name.startswith("encoder.")} <= set(loaded)
    ups = [name for name in tensors if name.startswith(("decoder.up", "decoder.decoder"))]
    assert bool(ups) == (kind == "mae")
    assert set(ups) <= set(loaded)
    assert not any("out" in name for name in loaded)


def test_the_recipes_are_brainmvps_but_for_the_objective() -> None:
    for name in (f"{kind}{net}{size}" for kind in SETTINGS for net in ("", "_unet") for size in ("", "_tiny")):
        of = name.replace("mae", "brainmvp").replace("simclr_crops", "brainmvp")
        own, base = RECIPES[name]("s", "p"), RECIPES[of]("s", "p")
        assert own.recipe == own.name == name
        assert own.replace(name=of, recipe=of, objective=base.objective) == base
    assert RECIPES["mae"]("s", "p", mask_rate=0.6, batch_size=2).objective.mask_rate == 0.6
    with pytest.raises(KeyError, match=r"unknown preset 'paper' of mae; known: recommended \(a baseline of ours\)"):
        RECIPES["mae"]("s", "p", preset="paper")


# --- what is refused


def test_what_cannot_work_is_refused() -> None:
    for kind in SETTINGS:
        with pytest.raises(ValueError, match=f"objective '{kind}' encodes one modality at a time: in_channels must be"):
            build(kind, NETWORK.replace(in_channels=2))
        with pytest.raises(ValueError, match=r"case test/case0 has no modality with a template \(flair, "):
            build(kind).sampler().draw(make_case(0, present=())[0], np.random.default_rng(0), True)
    with pytest.raises(ValueError, match=r"mask_rate 0.75 keeps none of the 1 blocks of a crop \(16, 16, 16\)"):
        build_objective(make_config(MAE.replace(mask_block=16), crop=CROP), SPEC)
    with pytest.raises(ValueError, match="crop edges must be multiples of mask_block"):
        build_objective(make_config(MAE.replace(mask_block=12), crop=CROP), SPEC)
    with pytest.raises(ValueError, match=r"the contrast needs at least 2 cases a micro-batch .* got 1 on 1 rank"):
        build("simclr_crops", batch_size=1)
    with pytest.raises(ValueError, match="network 'resnet3d' has no decoder, which objective 'mae' needs"):
        make_config(MAE, ResNet3DConfig())
    with pytest.raises(ValueError, match="template_mix and missing 'template' need the template bank"):
        TrainingConfig.model_validate(
            make_config(ClassificationConfig(modalities=("t1",), classes=("a", "b"))).model_dump()
            | {"objective": {"kind": "classification", "modalities": ("t1",), "classes": ("a", "b"), "template_mix": 1}}
        )


def test_cases_of_one_person_are_told() -> None:
    objective = build("simclr_crops")
    same = [make_case(1)[0], make_case(1)[0]]
    assert objective.idle_terms(same) == ["all of its cases are of one person, so the contrast is always 0"]
    assert objective.idle_terms([make_case(1)[0], make_case(2)[0]]) == []
