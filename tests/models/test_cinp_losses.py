"""Losses of CINP against plain loops in numpy, on two ranks, in lower precision, and for odd batches."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cinp_cases import PATCHES, SIZE, random_batch, small_config, small_objective
from connectome_stores import SPEC
from torch import multiprocessing as mp

from models.distributed import World, wrap
from models.objectives import build_objective
from models.objectives.base import Batch, Clock
from models.objectives.cinp import CINP
from models.objectives.cinp_views import pair_metrics
from models.objectives.matching import Candidates, hard_negatives

START = Clock(0, 0)


def others(batch: Batch, i: int) -> list[int]:
    """Candidates of anchor i: pairs of other people."""
    identity, paired = batch["identity"].tolist(), batch["paired"].tolist()
    return [j for j in range(len(paired)) if paired[j] and identity[j] != identity[i]]


def slow_contrast(one: np.ndarray, two: np.ndarray, batch: Batch, temperature: float) -> float:
    """INC of embeddings, both directions, by the formula."""
    losses = []
    for anchors, candidates in ((one, two), (two, one)):
        for i in range(len(one)):
            if not batch["paired"][i]:
                continue
            scores = [float(anchors[i] @ candidates[j]) / temperature for j in [i, *others(batch, i)]]
            losses.append(-math.log(math.exp(scores[0]) / sum(math.exp(score) for score in scores)))
    return sum(losses) / len(losses)


def slow_masking(predicted: np.ndarray, batch: Batch, normalise: bool) -> float:
    """MIM: patches cut out one by one, z-scored images, squared error of the hidden ones."""
    per_case = []
    for case in range(len(predicted)):
        image = batch["image"][case].numpy().astype(float)
        inside = image[image > 0]
        image = np.where(image > 0, (image - inside.mean()) / inside.std(), 0)
        errors, number = [], 0
        for x in range(0, SIZE[0], 8):
            for y in range(0, SIZE[1], 8):
                for z in range(0, SIZE[2], 8):
                    patch = image[x : x + 8, y : y + 8, z : z + 8].flatten()
                    if normalise:
                        patch = (patch - patch.mean()) / math.sqrt(patch.var() + 1e-6)
                    if number not in batch["visible"][case]:
                        errors.append(((predicted[case, number] - patch) ** 2).mean())
                    number += 1
        assert len(errors) == PATCHES - 3
        per_case.append(sum(errors) / len(errors))
    return sum(per_case) / len(per_case)


def slow_choice(scores: np.ndarray, batch: Batch, i: int, place: float) -> int:
    """A hard negative: the candidate in whose part of the cumulated softmax the place lies."""
    allowed = others(batch, i)
    shares = np.array([math.exp(scores[j]) for j in allowed])
    total = 0.0
    for j, share in zip(allowed, shares / shares.sum(), strict=True):
        total += share
        if place < total:
            return j
    return allowed[-1]


def slow_matching(made: CINP, batch: Batch) -> float:
    """NIM: every combination goes through the network by itself."""
    pairs = made.encode_pairs(batch)
    one, two = made.logits(pairs.encoded.embeddings, pairs.everyone).detach().numpy().astype(float)
    network, absent = pairs.encoded.network, pairs.encoded.absent
    image = made.matching.image_tokens(pairs.encoded.image)
    losses = []
    for i in range(len(image)):
        if not batch["paired"][i]:
            continue
        other_network = slow_choice(one[i], batch, i, float(batch["pick"][i, 0]))
        other_image = slow_choice(two[i], batch, i, float(batch["pick"][i, 1]))
        for n, m, label in ((i, i, 1), (other_network, i, 0), (i, other_image, 0)):
            found = made.matching(network[n : n + 1], absent[n : n + 1], image[m : m + 1])[0]
            scores = found.detach().numpy().astype(float)
            losses.append(-math.log(math.exp(scores[label]) / np.exp(scores).sum()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("normalise", [True, False])
def test_all_losses_equal_plain_loops(seed: int, normalise: bool) -> None:
    made, batch = small_objective(seed, normalise_patches=normalise), random_batch(seed)
    with torch.no_grad():
        found = made(batch, START)
        pairs = made.encode_pairs(batch)
        predicted, *_ = made.reconstruct(batch)
    images, networks = pairs.encoded.embeddings.numpy().astype(float)
    assert found["loss_contrast"].item() == pytest.approx(slow_contrast(images, networks, batch, 0.07), rel=1e-5)
    assert found["loss_masking"].item() == pytest.approx(slow_masking(predicted.numpy(), batch, normalise), rel=1e-5)
    assert found["loss_matching"].item() == pytest.approx(slow_matching(made, batch), rel=1e-5)
    assert (found["pairs"], found["matched"], found["temperature"]) == (5, 5, pytest.approx(0.07))


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    weights = {"weight_contrast": 0.5, "weight_masking": 2.0, "weight_matching": 3.0}
    found = small_objective(**weights)(random_batch(0), START)
    terms = sum(value * found[name.replace("weight", "loss")] for name, value in weights.items())
    assert found["loss"].item() == pytest.approx(terms.item(), rel=1e-6)


def candidates(paired: list[int], identity: list[int]) -> Candidates:
    return Candidates(torch.tensor(identity), torch.tensor(paired).bool(), torch.arange(len(paired)), 1)


def test_hard_negatives_are_never_the_pair_the_person_or_unpaired_and_follow_the_softmax() -> None:
    known = candidates([1, 1, 1, 0, 1], [0, 1, 0, 3, 4])
    logits = torch.tensor([9.0, 1.0, 9.0, 9.0, 0.0]).repeat(5, 1)
    places = torch.linspace(0, 0.99999, 1000)
    drawn = torch.stack([hard_negatives(logits, known, place.repeat(5)) for place in places])
    assert set(drawn[:, 0].tolist()) == set(drawn[:, 2].tolist()) == {1, 4}
    assert set(drawn[:, 1].tolist()) == {0, 2, 4}
    share = 1 / (1 + math.exp(-1))
    assert (drawn[:, 0] == 1).float().mean().item() == pytest.approx(share, abs=2e-3)
    assert hard_negatives(logits, known, torch.full((5,), 1 - 2**-24))[0] == 4
    tiny = torch.tensor([0.0, -2000.0, 0.0, 0.0, -1000.0]).repeat(5, 1)
    assert hard_negatives(tiny, known, torch.full((5,), 0.5))[0] == 4


def test_no_gradient_flows_through_the_choice_of_negatives() -> None:
    made = small_objective(weight_contrast=0.0, weight_masking=0.0)
    made(random_batch(0), START)["loss"].backward()
    for name in ("image_projection.weight", "network_projection.weight", "temperature"):
        assert not made.get_parameter(name).grad.any()
    assert made.get_parameter("network_encoder.embed.weight").grad.any()
    assert made.get_parameter("encoder.patch_embed.weight").grad.any()


def test_a_batch_of_one_person_leaves_matching_out_and_one_without_pairs_both() -> None:
    made, batch = small_objective(), random_batch(0)
    same = {**batch, "identity": torch.zeros(6, dtype=torch.int64)}
    found = made(same, START)
    assert (found["pairs"], found["matched"], found["loss_matching"], found["loss_contrast"]) == (5, 0, 0, 0)
    assert torch.equal(found["loss"], found["loss_masking"])
    lonely = {**batch, "paired": torch.tensor([0, 0, 1, 0, 0, 0])}
    found = made(lonely, START)
    assert (found["pairs"], found["matched"], found["loss_matching"], found["loss_contrast"]) == (1, 0, 0, 0)
    found["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in made.named_parameters()}
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())
    assert not gradients["network_encoder.embed.weight"].any()


def test_what_fills_the_place_of_an_absent_connectome_changes_nothing() -> None:
    made, batch = small_objective(), random_batch(0)
    filled = {**batch, "network": batch["network"].clone()}
    filled["network"][1] = 5.0
    one, two = made(batch, START), made(filled, START)
    assert {name: value.item() for name, value in one.items()} == {name: value.item() for name, value in two.items()}


def test_a_micro_batch_of_one_case_is_refused_where_cases_are_compared() -> None:
    with pytest.raises(ValueError, match=r"a micro-batch needs at least 2, got 1 on 1 rank; raise batch_size or the n"):
        build_objective(small_config(batch_size=1), SPEC)
    with pytest.raises(ValueError, match="got 1 on 1 rank"):
        build_objective(small_config(batch_size=1, world_size=2, gather_negatives=False), SPEC)
    made = build_objective(small_config(batch_size=1, world_size=2), SPEC)
    with pytest.raises(ValueError, match="a micro-batch needs at least 2, got 1 on 1 rank"):
        made({name: value[:1] for name, value in random_batch(0).items()}, START)  # continued on fewer ranks
    assert build_objective(small_config(batch_size=1, recipe="image_mae_tiny"), SPEC)


@pytest.mark.parametrize("start", [0.07, 0.001, 0.5])
def test_the_temperature_stays_in_its_bounds_in_float32_under_autocast(start: float) -> None:
    made, batch = small_objective(temperature=start), random_batch(0)
    for outside, bound in ((-1.0, 0.001), (3.0, 0.5)):
        with torch.no_grad():
            made.temperature.fill_(outside)
        assert made.exports()["temperature"].item() == pytest.approx(bound)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = made(batch, START)
        assert made.temperature.item() == pytest.approx(bound)
        assert (made.temperature.dtype, found["loss"].dtype) == (torch.float32, torch.float32)
        assert torch.isfinite(found["loss"])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pairs = made.encode_pairs(batch)
            assert made.logits(pairs.encoded.embeddings, pairs.everyone).dtype == torch.float32


def test_a_temperature_at_its_bound_comes_back() -> None:
    made = small_objective(temperature_max=0.07)
    made(random_batch(0), START)["loss"].backward()
    assert made.temperature.grad.abs() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_contrast": 0, "weight_masking": 0, "weight_matching": 0}, "are all 0: nothing would be learned"),
        ({"temperature": 0.9}, r"temperature 0.9 must lie between temperature_min 0.001 and temperature_max 0.5"),
        ({"decoder_heads": 3}, "decoder_width must be a multiple of its heads: got 16 and 3"),
        ({"network_encoder": {"kind": "bnt"}}, "'bnt' is for supervised use"),
        ({"network_encoder": {"width": 10, "heads": 4}}, "width of the connectome network must be a multiple of its h"),
        (
            {"network": {"kind": "vit3d", "image_size": (16, 16, 20)}},
            "image_size must be positive multiples of patch",
        ),
        (
            {"network": {"kind": "resnet3d"}, "crop": (0, 0, 0)},
            "'cinp' hides patches of a vision transformer, network",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_stores_and_masks_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="the store has no connectomes: its spec 'bare' does not ask for them; pre"):
        build_objective(small_config(), SPEC.replace(name="bare", connectome=None))
    assert build_objective(small_config(recipe="image_mae_tiny"), SPEC.replace(connectome=None))
    with pytest.raises(ValueError, match=r"mask_rate 0\.95 hides all 12 patches"):
        build_objective(small_config(mask_rate=0.95), SPEC)
    with pytest.raises(ValueError, match="the store has no modality 't2'; it holds: t1"):
        build_objective(small_config(modality="t2"), SPEC)


# --- validation


def test_retrieval_counts_counterparts_among_the_nearest_and_other_sessions_are_no_candidates() -> None:
    made, batch = small_objective().eval(), random_batch(0)
    found = {name: (total / count).item() for name, (total, count) in made.validate(batch, START).items()}
    pairs = made.encode_pairs(batch)
    one, two = made.logits(pairs.encoded.embeddings, pairs.everyone)
    for name, scores in (("image_to_network", one), ("network_to_image", two)):
        hits = [all(scores[i, i] >= scores[i, j] for j in others(batch, i)) for i in (0, 2, 3, 4, 5)]
        assert found[f"retrieval_{name}_top1"] == pytest.approx(np.mean(hits))
        assert found[f"retrieval_{name}_top5"] == 1
    assert found["retrieval_chance"] == pytest.approx(
        np.mean([1 / (1 + len(others(batch, i))) for i in (0, 2, 3, 4, 5)])
    )
    for same in (torch.zeros_like, lambda scores: torch.full_like(scores, torch.nan)):
        flat = pair_metrics(pairs, torch.stack([same(one), same(two)]))
        assert flat["retrieval_image_to_network_top1"][0] == 0, "equal embeddings retrieve nothing"
    losses = made(batch, START)
    for name in ("loss", "loss_masking", "loss_contrast", "loss_matching"):
        assert found[name] == pytest.approx(losses[name].item(), rel=1e-4), name
    assert 0 <= found["matching_accuracy"] <= 1
    assert {"embedding_alignment", "embedding_rank", "embedding_rank_networks", "embedding_uniformity"} <= set(found)
    single = {name: value[:1] for name, value in batch.items()}
    assert set(made.validate(single, START)) == {"loss", "loss_masking"}
    assert set(made.pictures(single, START)) == {"masking"}


# --- two ranks against one process

MOMENTUM: dict[str, Any] = {"momentum": 0.9, "queue": 12}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    half = slice(3 * rank, 3 * rank + 3)
    found: dict[str, Any] = {}
    for gathered in (True, False):
        made = small_objective(gather_negatives=gathered)
        model = wrap(made, World(rank, 2, torch.device("cpu")))
        losses = model({name: value[half] for name, value in random_batch(0).items()}, START)
        losses["loss"].backward()
        values = torch.stack([losses[name].detach() for name in sorted(losses)])
        dist.all_reduce(values)
        found[str(gathered)] = dict(zip(sorted(losses), (values / 2).tolist(), strict=True))
        found[f"gradients {gathered}"] = {name: parameter.grad for name, parameter in made.named_parameters()}
    made = small_objective(**MOMENTUM, batch_size=3, world_size=2)
    model = wrap(made, World(rank, 2, torch.device("cpu")))
    for step in range(2):
        losses = model({name: value[half] for name, value in random_batch(step).items()}, Clock(step, 0))
        losses["loss"].backward()
    value = losses["loss_contrast"].clone()
    dist.all_reduce(value)
    found["slow"] = {"loss": value.item() / 2, "queue": made.slow.queue, "people": made.slow.people}
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, args=(str(folder),), nprocs=2)
    return torch.load(folder / "found.pt", weights_only=True)


def test_two_ranks_equal_one_process_with_the_whole_batch(two_ranks: dict[str, Any]) -> None:
    """Also where one rank has fewer pairs than the other: three and two of five."""
    made = small_objective()
    losses = made(random_batch(0), START)
    losses["loss"].backward()
    assert two_ranks["True"] == pytest.approx({name: value.item() for name, value in losses.items()}, rel=1e-5)
    for name, parameter in made.named_parameters():
        error = (two_ranks["gradients True"][name] - parameter.grad).norm()
        assert error <= 1e-4 * parameter.grad.norm() + 1e-6, name


def test_without_gathering_each_rank_compares_its_own_cases(two_ranks: dict[str, Any]) -> None:
    made, batch = small_objective(), random_batch(0)
    halves = [made({name: value[half] for name, value in batch.items()}, START) for half in (slice(0, 3), slice(3, 6))]
    mean = {name: (halves[0][name] + halves[1][name]).item() / 2 for name in halves[0]}
    assert two_ranks["False"] == pytest.approx(mean, rel=1e-5)


def test_two_ranks_have_the_queue_of_one_process(two_ranks: dict[str, Any]) -> None:
    made, found = small_objective(**MOMENTUM, batch_size=6), two_ranks["slow"]
    for step in range(2):
        losses = made(random_batch(step), Clock(step, 0))
    assert found["loss"] == pytest.approx(losses["loss_contrast"].item(), rel=1e-5)
    assert torch.allclose(found["queue"], made.slow.queue, atol=1e-6)
    assert torch.equal(found["people"], made.slow.people)
