"""BrainMVP: views, losses by phase, contrast over ranks, metrics, pictures, transfer."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from objective_cases import NETWORK, RECOMMENDED, SPEC, make_batch, make_case, make_config, make_means

from models.config import BrainMVPConfig, ObjectiveConfig, OptimiserConfig
from models.masking import to_voxels
from models.objectives import OBJECTIVES, build_objective
from models.objectives.base import Clock
from models.objectives.brainmvp import PRESETS, START_GAIN, BrainMVP, psnr
from models.optimiser import build_optimiser
from models.records import MODALITIES
from models.template import cut

GOLDEN = Path(__file__).parents[1] / "golden" / "brainmvp_losses.json"
START = Clock(step=0, epoch=0)


def _build(settings: BrainMVPConfig = RECOMMENDED, seed: int = 0, **data: object) -> BrainMVP:
    torch.manual_seed(seed)
    objective = build_objective(make_config(settings, **data), SPEC, make_means())
    assert isinstance(objective, BrainMVP)
    return objective


def _adamw(objective: BrainMVP, lr: float) -> torch.optim.Optimizer:
    options = OptimiserConfig(lr=lr)
    return build_optimiser(objective.parameter_groups(options), options, objective.modules(), fused=False)


def _cases(count: int = 4, **kwargs: object) -> list:
    return [make_case(number, **kwargs) for number in range(count)]


# --- samples


def test_draw_is_json_and_replays_the_sample() -> None:
    sampler = pickle.loads(pickle.dumps(_build().sampler()))
    info, reader = make_case(0)
    draw = sampler.draw(info, np.random.default_rng(5), True)
    assert sampler.draw(info, np.random.default_rng(5), True) == draw
    first, second = (sampler.load(info, reader, d) for d in (draw, json.loads(json.dumps(draw))))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_two_different_present_modalities_and_only_they_are_read() -> None:
    sampler = _build().sampler()
    info, reader = make_case(0, present=("t1", "pd", "adc"))
    pairs = set()
    for seed in range(60):
        draw = sampler.draw(info, np.random.default_rng(seed), True)
        reader.asked.clear()
        sampler.load(info, reader, draw)
        assert reader.asked == [draw["target"], draw["other"]]
        pairs.add((MODALITIES[draw["target"]], MODALITIES[draw["other"]]))
    assert pairs == {(m, n) for m in ("t1", "pd", "adc") for n in ("t1", "pd", "adc") if m != n}


def test_modalities_differ_within_a_batch() -> None:
    batch = make_batch(_build().sampler(), _cases(8))
    assert len(set(batch["template"].tolist())) > 1


def test_masks_keep_the_exact_number_and_differ_by_sample_and_view() -> None:
    batch = make_batch(_build().sampler(), _cases())
    masks = batch["mask"].flatten(2)
    assert masks.shape == (4, 2, 64)
    assert ((~masks).sum(2) == 8).all()
    assert len({tuple(mask.tolist()) for mask in masks.flatten(0, 1)}) == 8


def test_template_start_is_origin_plus_crop_start_also_for_small_cases() -> None:
    sampler = _build().sampler()
    info, reader = make_case(0, extent=(20, 40, 34), origin=(10, 2, 1))
    draw = sampler.draw(info, np.random.default_rng(0), True)
    assert draw["start"][0] == -6
    sample = sampler.load(info, reader, draw)
    assert sample["template_start"].tolist() == [4, 2 + draw["start"][1], 1 + draw["start"][2]]
    assert sample["image"][:, :6].any() == sample["image"][:, 26:].any() == np.False_


def test_sessions_and_datasets_of_one_person_have_one_identity() -> None:
    sampler = _build().sampler()
    info, reader = make_case(0)
    draw = sampler.draw(info, np.random.default_rng(0), True)

    def identity(**changes: object) -> int:
        return sampler.load(replace(info, **changes), reader, draw)["identity"]

    assert identity(case="the second session", row=7) == identity()
    assert len({identity(), identity(subject="other"), identity(dataset="other")}) == 3
    known = {"person": "test/subject0"}
    assert identity(**known) == identity(**known, subject="UCSF-1", dataset="ucsf-pdgm") != identity(dataset="ixi")


def test_terms_that_the_cases_can_never_give_are_named() -> None:
    objective = _build()
    single = [make_case(number, present=("t1",))[0] for number in range(3)]
    assert objective.idle_terms([make_case(0)[0], *single]) == []
    assert objective.idle_terms(single) == [
        "none of its 3 cases has two modalities, so the cross-modal reconstruction is always 0; select datasets with "
        "several modalities per case"
    ]
    assert objective.idle_terms([replace(case, person="a") for case in (make_case(0)[0], make_case(1)[0])]) == [
        "all of its cases are of one person, so the contrast is always 0"
    ]


def test_case_without_a_usable_modality_is_refused_by_name() -> None:
    info, _ = make_case(3, present=())
    with pytest.raises(ValueError, match="case test/case3 has no modality with a template"):
        _build().sampler().draw(info, np.random.default_rng(0), True)


# --- views and losses


def test_views_are_the_target_with_masked_blocks_replaced() -> None:
    objective = _build()
    batch = make_batch(objective.sampler(), _cases())
    views = objective._views(batch, template_in_both=False)
    mask = to_voxels(batch["mask"], 8)
    target, other = batch["image"].unbind(1)
    normalised = objective.template.normalised()
    starts = batch["template_start"].tolist()
    template = torch.stack(
        [cut(normalised[m], s, (32, 32, 32)) for m, s in zip(batch["template"], starts, strict=True)]
    )
    assert torch.equal(views.mixed[0][~mask[:, 0]], target[~mask[:, 0]])
    assert torch.allclose(views.mixed[0][mask[:, 0]], template[mask[:, 0]], atol=1e-6)
    assert torch.equal(views.mixed[1][~mask[:, 1]], target[~mask[:, 1]])
    assert torch.equal(views.mixed[1][mask[:, 1]], other[mask[:, 1]])
    early = objective._views(batch, template_in_both=True)
    assert torch.allclose(early.mixed[1][mask[:, 1]], template[mask[:, 1]], atol=1e-6)


def test_loss_terms_are_mean_squared_errors_over_the_whole_crop() -> None:
    objective = _build().eval()
    batch = make_batch(objective.sampler(), _cases())
    losses, views = objective(batch, START), objective._views(batch, template_in_both=False)
    target = batch["image"][:, 0]
    assert torch.allclose(losses["loss_distillation"], (views.restored[0] - target).square().mean())
    assert torch.allclose(losses["loss_reconstruction"], (views.restored[1] - target).square().mean())
    total = losses["loss_distillation"] + losses["loss_reconstruction"] + 0.02 * losses["loss_contrast"]
    assert torch.allclose(losses["loss"], total)


@pytest.mark.parametrize(
    ("preset", "epoch", "weights", "template_in_both"),
    [
        ("code", 0, (1, 10, 0), True),
        ("code", 300, (1, 10, 0), True),
        ("code", 301, (1, 10, 0), False),
        ("code", 999, (1, 10, 0), False),
        ("code", 1000, (1, 10, 1), False),
        ("code", 1499, (1, 10, 1), False),
        ("paper", 0, (1, 1, 0), False),
        ("paper", 999, (1, 1, 0), False),
        ("paper", 1000, (1, 1, 1), False),
        ("recommended", 0, (1, 1, 0.02), False),
    ],
)
def test_phases(
    preset: str,
    epoch: int,
    weights: tuple[float, float, float],
    template_in_both: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objective = _build(PRESETS[preset])
    assert tuple(objective.weights(epoch).values()) == weights
    seen = []
    views = BrainMVP._views
    monkeypatch.setattr(BrainMVP, "_views", lambda *args, **kwargs: seen.append(kwargs) or views(*args, **kwargs))
    losses = objective(make_batch(objective.sampler(), _cases(2)), Clock(0, epoch))
    assert seen == [{"template_in_both": template_in_both}]
    terms = [losses[f"loss_{name}"] for name in ("reconstruction", "distillation", "contrast")]
    assert losses["loss"].item() == pytest.approx(
        sum(w * t.item() for w, t in zip(weights, terms, strict=True)), rel=1e-5
    )


def test_presets_are_as_published_and_as_documented() -> None:
    paper, code, ours = (PRESETS[name] for name in ("paper", "code", "recommended"))
    published = {"temperature": 1.0, "projector_dim": 0, "template_init": "zero", "contrast_from_epoch": 1000}
    assert {name: getattr(paper, name) for name in published} == published
    assert {name: getattr(code, name) for name in published} == published
    assert (paper.mask_rate, code.mask_rate, ours.mask_rate) == (0.875, 0.8, 0.875)
    assert (paper.gather_negatives, code.gather_negatives, ours.gather_negatives) == (True, False, True)
    assert (ours.temperature, ours.projector_dim, ours.template_init) == (0.1, 128, "mean")


def test_case_with_one_modality_is_not_in_the_cross_modal_term() -> None:
    objective = _build().eval()
    cases = [make_case(0), make_case(1, present=("t2",))]
    batch = make_batch(objective.sampler(), cases)
    assert batch["cross"].tolist() == [1, 0]
    losses, views = objective(batch, START), objective._views(batch, template_in_both=False)
    assert torch.allclose(losses["loss_reconstruction"], views.errors[1][0] / 2), "its share of the batch is 0"
    assert torch.allclose(losses["loss_distillation"], views.errors[0].mean())
    only = make_batch(objective.sampler(), [make_case(i, present=("t2",)) for i in range(2)])
    assert objective(only, START)["loss_reconstruction"] == 0


def test_a_case_counts_the_same_in_any_micro_batch() -> None:
    """As in DDP: the mean over halves is the whole, also when cases with one modality are dealt unevenly."""
    objective = _build(RECOMMENDED.replace(weight_contrast=0)).eval()
    cases = [make_case(0, present=("t1",)), make_case(1, present=("t2",)), make_case(2, present=("t1",)), make_case(3)]
    batch = make_batch(objective.sampler(), cases)
    halves = ({key: value[part] for key, value in batch.items()} for part in (slice(0, 2), slice(2, 4)))
    whole, parts = objective(batch, START), [objective(half, START) for half in halves]
    for name in ("loss_reconstruction", "loss_distillation", "loss"):
        torch.testing.assert_close(torch.stack([part[name] for part in parts]).mean(), whole[name])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_gets_a_gradient_in_every_epoch(preset: str) -> None:
    objective = _build(PRESETS[preset])
    objective(make_batch(objective.sampler(), _cases(2)), START)["loss"].backward()
    assert [name for name, p in objective.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad.to_dense()).all() for p in objective.parameters() if p.grad is not None)


def test_training_reduces_the_loss() -> None:
    objective = _build(seed=1)
    optimiser = _adamw(objective, 1e-2)
    batch = make_batch(objective.sampler(), _cases())
    history = []
    for step in range(25):
        optimiser.zero_grad()
        losses = objective(batch, Clock(step, 0))
        losses["loss"].backward()
        optimiser.step()
        history.append(losses["loss_reconstruction"].item())
    assert history[-1] < 0.5 * history[0]


def test_losses_of_the_first_steps_are_as_reviewed() -> None:
    """A change here is a change of numerics. To accept it delete the golden file, run twice and review the diff."""
    objective = _build()
    objective.use_channels_last()
    optimiser = _adamw(objective, 1e-3)
    rows = []
    for step in range(5):
        optimiser.zero_grad()
        losses = objective(make_batch(objective.sampler(), _cases(), seed=step), Clock(step, 0))
        losses["loss"].backward()
        optimiser.step()
        rows.append({name: round(value.item(), 6) for name, value in losses.items()})
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(rows, indent=1) + "\n")
        pytest.fail(f"{GOLDEN.name} was missing and has been written: review and commit it")
    for row, expected in zip(rows, json.loads(GOLDEN.read_text()), strict=True):
        assert row == pytest.approx(expected, rel=2e-3)


def test_same_seed_gives_bitwise_the_same_gradients() -> None:
    def gradients() -> list[torch.Tensor]:
        objective = _build()
        objective(make_batch(objective.sampler(), _cases()), START)["loss"].backward()
        return [p.grad.to_dense() for p in objective.parameters() if p.grad is not None]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))
    finally:
        torch.set_num_threads(threads)


# --- metrics and pictures


def test_psnr_is_over_the_region_only() -> None:
    target = torch.zeros(2, 4, 4, 4)
    guess, region = target + 0.1, torch.zeros(2, 4, 4, 4, dtype=torch.bool)
    region[:, :2] = True
    guess[:, 2:] = 9.0
    assert psnr(guess, target, region).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)
    assert psnr(target, target, region).tolist() == pytest.approx([100.0, 100.0])


def test_validation_measures_model_copy_and_mean_on_masked_foreground() -> None:
    objective = _build().eval()
    batch = make_batch(objective.sampler(), [make_case(4), make_case(5), make_case(6, present=("t1",))], train=False)
    metrics = objective.validate(batch, START)
    views = objective._views(batch, template_in_both=False)
    means = make_means()
    expected = {"psnr_model": [], "psnr_copy": [], "psnr_mean": []}
    for i in (0, 1):
        region = to_voxels(batch["mask"][i, 1], 8) & (batch["image"][i, 0] > 0)
        mean = cut(torch.from_numpy(means[batch["template"][i]]), batch["template_start"][i].tolist(), (32, 32, 32))
        for name, guess in zip(expected, (views.restored[1][i], batch["image"][i, 1], mean), strict=True):
            error = (guess - batch["image"][i, 0])[region].square().mean()
            expected[name].append(-10 * math.log10(error.item()))
    for name, values in expected.items():
        total, count = metrics[name]
        assert count == 2
        assert total.item() == pytest.approx(sum(values), rel=1e-4)
    assert metrics["loss_reconstruction"][1] == 2
    assert metrics["loss_distillation"][1] == 3
    assert {"embedding_alignment", "embedding_uniformity", "embedding_rank", "loss_contrast"} <= metrics.keys()
    assert all(not total.requires_grad for total, _ in metrics.values())


def test_case_without_masked_foreground_is_not_counted() -> None:
    objective = _build().eval()
    batch = make_batch(objective.sampler(), _cases(2))
    batch["image"][0] = 0
    assert objective.validate(batch, START)["psnr_model"][1] == 1


def test_one_case_has_no_contrast_to_report() -> None:
    objective = _build().eval()
    assert "loss_contrast" not in objective.validate(make_batch(objective.sampler(), _cases(1)), START)


def test_pictures_are_grey_bytes() -> None:
    objective = _build().eval()
    pictures = objective.pictures(make_batch(objective.sampler(), _cases(2)), START)
    height, width = pictures["reconstruction"].shape
    assert 4 * (2 * 34 - 2) < height < 4 * (2 * 34 - 2) + 100, "enlarged four times, titles above"
    assert 4 * (5 * 34 - 2) < width < 4 * (5 * 34 - 2) + 100, "enlarged four times, modalities at the left"
    assert pictures["templates"].dtype == np.uint8
    assert pictures["templates"].shape[0] > 4 * 8 * 36


# --- weights


def test_exports_and_loads_back() -> None:
    source, target = _build(seed=1), _build(seed=2)
    source.use_channels_last()
    tensors = source.exports()
    assert {name.split(".")[0] for name in tensors} == {"encoder", "decoder", "template", "projector"}
    assert all(t.is_contiguous() for t in tensors.values())
    assert sorted(target.load_pretrained(tensors)) == sorted(tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in target.exports().items())


def test_with_a_gain_the_first_guess_is_about_the_template() -> None:
    objective = _build(RECOMMENDED.replace(template_gain=True)).eval()
    batch = make_batch(objective.sampler(), _cases(3))
    views = objective._views(batch, template_in_both=False)
    template = objective.template(batch["template"], batch["template_start"], objective.crop)
    for restored in views.restored:
        assert (restored - START_GAIN * template).square().mean() < 0.1 * template.square().mean()


def test_templates_start_at_the_training_mean_or_zero() -> None:
    assert torch.equal(_build().template.bank, torch.from_numpy(make_means()))
    assert not _build(RECOMMENDED.replace(template_init="zero")).template.bank.any()


def test_the_template_has_its_own_rate_and_no_decay() -> None:
    objective = _build(RECOMMENDED.replace(template_lr_scale=5.0))
    groups = {group["name"]: group for group in objective.parameter_groups(OptimiserConfig(lr=1e-3, weight_decay=0.1))}
    assert {name: group["lr"] for name, group in groups.items()} == {"network": 1e-3, "template": 5e-3}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {"network": 0.1, "template": 0.0}
    grouped = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in objective.parameters())


def test_full_size_parameter_count() -> None:
    with torch.device("meta"):
        objective = BrainMVP(
            make_config(PRESETS["paper"], network=NETWORK.__class__()), SPEC.replace(grid=(240, 240, 155))
        )
    parts = {name: sum(p.numel() for p in child.parameters()) for name, child in objective.named_children()}
    assert parts == {"encoder": 22_038_464, "decoder": 1_736_769, "template": 71_424_000}


@pytest.mark.parametrize(
    ("settings", "data", "message"),
    [
        (RECOMMENDED.replace(mask_block=12), {}, "multiples of mask_block"),
        (RECOMMENDED.replace(mask_rate=0.99), {}, r"mask_rate 0.99 keeps none of the 64 blocks of a crop \(32"),
        (RECOMMENDED, {"batch_size": 1}, r"contrast needs at least 2 cases a step .* got 1"),
    ],
)
def test_impossible_configs_are_refused(settings: BrainMVPConfig, data: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _build(settings, **data)


def test_fewer_ranks_than_configured_may_not_silence_the_contrast() -> None:
    config = make_config(RECOMMENDED, batch_size=1).replace(world_size=2)
    objective = build_objective(config, SPEC, make_means())
    with pytest.raises(ValueError, match=r"2 cases a micro-batch .* got 1 on one rank; use the number of ranks"):
        objective(make_batch(objective.sampler(), _cases(1)), START)


@pytest.mark.parametrize(
    ("preset", "epochs", "missing"),
    [
        ("paper", 1000, ["the contrast, which starts in epoch 1000, never counts"]),
        ("paper", 1001, []),
        ("code", 72, ["starts in epoch 1000", "in the first 301, so no other modality is ever mixed in"]),
        ("code", 1500, []),
        ("recommended", 1, []),
    ],
)
def test_phases_that_a_short_training_never_reaches_are_named(
    preset: str, epochs: int, missing: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    BrainMVP(make_config(PRESETS[preset]).replace(epochs=epochs), SPEC, make_means())
    assert len(caplog.messages) == len(missing)
    for message, expected in zip(caplog.messages, missing, strict=True):
        assert message.startswith(f"training test has {epochs} epochs: ")
        assert expected in message


def test_wrong_channels_or_missing_means_are_refused() -> None:
    with pytest.raises(ValueError, match="in_channels must be 1, got 4"):
        build_objective(make_config(PRESETS["paper"], network=NETWORK.replace(in_channels=4)), SPEC)
    with pytest.raises(ValueError, match="needs the training mean images"):
        build_objective(make_config(RECOMMENDED), SPEC)
    with pytest.raises(ValueError, match=r"training means must have the spec's shape \(8, 40, 44, 36\)"):
        build_objective(make_config(RECOMMENDED), SPEC, np.zeros((8, 2, 2, 2), np.float32))


def test_registry_names_are_the_config_kinds() -> None:
    kinds = get_args(get_args(ObjectiveConfig)[0])
    assert set(OBJECTIVES) == {kind.model_fields["kind"].default for kind in kinds}
