"""AnatCL's losses equal a slow, plain numpy implementation of the formulas: in one process and on two ranks."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from anat_phantoms import SPEC, settings, tiny_config
from torch import multiprocessing as mp

from models.anatomy import MEASURES
from models.config_anatcl import AnatCLConfig
from models.distributed import World, wrap
from models.objectives.anatcl import AnatCL
from models.objectives.base import Clock
from models.objectives.similarity import anatomical_weights, kernel_of, weighted_contrast

CASES, DIM = 6, 5
SIGMA, TEMPERATURE = 2.0, 0.1


# --- the formulas, one loop a sum


def slow_kernel(d: float, kernel: str) -> float:
    if kernel == "cauchy":
        return 1 / (SIGMA * d * d + 1)
    rbf = math.exp(-d * d / (2 * SIGMA**2))
    return rbf / (math.sqrt(2 * math.pi) * SIGMA) if kernel == "gaussian" else rbf


def slow_cosine(one: np.ndarray, other: np.ndarray) -> float:
    both = np.isfinite(one) & np.isfinite(other)
    a, b = one[both].astype(float), other[both].astype(float)
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def slow_anatomy(one: np.ndarray, other: np.ndarray, variant: str, negative: str) -> float:
    """one, other: z-scores (measures, regions)."""
    if variant == "global":
        found = [slow_cosine(one[m], other[m]) for m in range(len(one)) if np.isfinite(one[m] + other[m]).any()]
    else:
        whole = [r for r in range(one.shape[1]) if np.isfinite(one[:, r]).all() and np.isfinite(other[:, r]).all()]
        found = [slow_cosine(one[:, r], other[:, r]) for r in whole]
    if not found:
        return 0.0
    similarity = sum(found) / len(found)
    return (1 + similarity) / 2 if negative == "shift" else max(similarity, 0.0)


def slow_contrast(z: np.ndarray, weights: np.ndarray, form: str) -> float:
    """Every image an anchor, all others its candidates; weights (N, N), the diagonal is never read."""
    count = len(z)
    s = [[float(z[i] @ z[j]) / TEMPERATURE for j in range(count)] for i in range(count)]
    total = 0.0
    for i in range(count):
        others = [j for j in range(count) if j != i]
        norm = sum(weights[i][k] for k in others)
        for j in others:
            if form == "expw":
                denominator = sum(math.exp(s[i][t] * (1 - weights[i][t])) for t in others)
            elif form == "threshold":
                denominator = sum(math.exp(s[i][t]) for t in others if weights[i][t] < weights[i][j])
            else:
                denominator = sum(math.exp(s[i][t]) for t in others)
            if denominator > 0:
                total -= weights[i][j] / norm * (s[i][j] - math.log(denominator))
    return total / count


def slow_terms(case: dict[str, np.ndarray], z: np.ndarray, config: AnatCLConfig) -> dict[str, float]:
    """The terms over all first views, then all second ones; to itself a case differs by nothing."""
    count = len(case["age"])
    age, anatomy = np.zeros((2, 2 * count, 2 * count))
    for i, j in itertools.product(range(2 * count), repeat=2):
        a, b = i % count, j % count
        difference = 0.0 if a == b else float(case["age"][a] - case["age"][b])
        age[i, j] = 0.0 if math.isnan(difference) else slow_kernel(difference, config.kernel)
        own = a == b
        anatomy[i, j] = (
            1.0 if own else slow_anatomy(case["scores"][a], case["scores"][b], config.variant, config.negative)
        )
    return {"age": slow_contrast(z, age, config.form), "anatomy": slow_contrast(z, anatomy, config.form)}


# --- random batches


def random_case(seed: int, regions: int = 68, holes: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mean, std = rng.uniform(1, 5, (3, regions)), rng.uniform(0.2, 1, (3, regions))
    scores = rng.standard_normal((CASES, 3, regions))
    if holes:
        scores[1, 0, :5] = np.nan  # five regions without thickness
        scores[2, 1] = np.nan  # no volume at all
        scores[3] = np.nan  # no descriptors
    age = rng.uniform(20, 30, CASES)
    age[4] = np.nan if holes else age[4]
    descriptors = (scores * std + mean).astype(np.float32)
    scores = (descriptors - mean.astype(np.float32)) / std.astype(np.float32)
    return {"age": age.astype(np.float32), "descriptors": descriptors, "scores": scores, "mean": mean, "std": std}


def objective(case: dict[str, np.ndarray], **changes: Any) -> tuple[AnatCL, dict[str, torch.Tensor]]:
    config = tiny_config(Path("a"), "s", objective=settings(**changes), world_size=2)
    torch.manual_seed(0)
    made = AnatCL(config, SPEC)
    made.descriptor_mean.copy_(torch.from_numpy(case["mean"]))
    made.descriptor_std.copy_(torch.from_numpy(case["std"]))
    batch = {name: torch.from_numpy(case[name]) for name in ("age", "descriptors")}
    return made, {**batch, "identity": torch.arange(CASES)}


def embeddings(seed: int) -> torch.Tensor:
    return F.normalize(torch.from_numpy(np.random.default_rng(seed).standard_normal((2 * CASES, DIM))).float(), dim=1)


@pytest.mark.parametrize("variant", ["global", "local"])
@pytest.mark.parametrize("form", ["yaware", "expw", "threshold"])
@pytest.mark.parametrize("negative", ["shift", "clamp"])
def test_both_terms_equal_plain_numpy(variant: str, form: str, negative: str) -> None:
    for seed in range(2):
        case, z = random_case(seed), embeddings(seed)
        made, batch = objective(case, variant=variant, form=form, negative=negative, base_temperature=TEMPERATURE)
        expected = slow_terms(case, z.numpy().astype(float), made.settings)
        found = {name: term.item() for name, term in made.terms(z, batch).items()}
        assert found == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("kernel", ["rbf", "gaussian", "cauchy"])
def test_kernels_equal_plain_numpy(kernel: str) -> None:
    differences = np.linspace(-30, 30, 61)
    found = kernel_of(torch.from_numpy(differences), kernel, SIGMA)
    assert found.numpy() == pytest.approx([slow_kernel(d, kernel) for d in differences])
    peak = 1.0 if kernel != "gaussian" else 1 / (math.sqrt(2 * math.pi) * SIGMA)
    assert kernel_of(torch.zeros(()), kernel, SIGMA).item() == pytest.approx(peak)
    case, z = random_case(7), embeddings(7)
    made, batch = objective(case, kernel=kernel, base_temperature=TEMPERATURE)
    expected = slow_terms(case, z.numpy().astype(float), made.settings)
    assert made.terms(z, batch)["age"].item() == pytest.approx(expected["age"], rel=2e-5)


def test_the_reference_multiplies_by_temperature_over_base_temperature() -> None:
    case, z = random_case(0), embeddings(0)
    made, batch = objective(case)
    plain, _ = objective(case, base_temperature=TEMPERATURE)
    for name, term in made.terms(z, batch).items():
        assert term.item() == pytest.approx(0.1 / 0.07 * plain.terms(z, batch)[name].item(), rel=1e-5)


def test_the_loss_is_the_weighted_sum_of_the_terms() -> None:
    case = random_case(0)
    made, batch = objective(case, weight_age=0.5, weight_anatomy=2.0, weight_self=0.25)
    batch |= {"image": torch.rand(CASES, 1, *SPEC.grid)}
    losses = made(batch, Clock(0, 0))
    weighted = 0.5 * losses["loss_age"] + 2 * losses["loss_anatomy"] + 0.25 * losses["loss_self"]
    assert losses["loss"].item() == pytest.approx(weighted.item(), rel=1e-6)


def test_views_that_are_one_image_are_encoded_once_with_the_same_loss() -> None:
    case = random_case(1)
    made, batch = objective(case)
    image = torch.rand(CASES, 1, *SPEC.grid)
    calls: list[int] = []
    made.encoder.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    once = made({**batch, "image": image}, Clock(0, 0))["loss"]
    twice = made({**batch, "image": image.repeat(1, 2, 1, 1, 1)}, Clock(0, 0))["loss"]
    assert calls == [CASES, 2 * CASES]
    assert once.item() == pytest.approx(twice.item(), rel=1e-4)


# --- defects of the code that AnatCL comes from (docs/anatcl.md); each formula below is that code's


def test_rows_are_normalised_not_columns() -> None:
    """y-Aware's code divides by a row sum without keeping its dimension, so columns are divided."""
    weights = torch.tensor([[0.0, 1.0, 3.0], [1.0, 0.0, 1.0], [3.0, 1.0, 0.0]])
    logits = torch.tensor([[0.0, 0.5, 0.1], [0.5, 0.0, 0.9], [0.1, 0.9, 0.0]])
    keep = ~torch.eye(3, dtype=torch.bool)
    log_p = logits - logits.masked_fill(~keep, -torch.inf).logsumexp(1, keepdim=True)
    right = -((weights / weights.sum(1, keepdim=True)) * log_p).sum(1).mean().item()
    wrong = -((weights / weights.sum(1)) * log_p).sum(1).mean().item()
    assert weighted_contrast(logits, weights, keep).item() == pytest.approx(right)
    assert right != pytest.approx(wrong, rel=0.01)


def test_expw_has_the_value_of_its_formula_whatever_the_largest_similarity() -> None:
    """The parent code takes off the row's maximum before it multiplies by 1 - w, which changes the denominator."""
    z, rng = embeddings(3), np.random.default_rng(3)
    weights = rng.uniform(0, 1, (2 * CASES, 2 * CASES))
    keep = ~torch.eye(2 * CASES, dtype=torch.bool)
    logits = z @ z.T / TEMPERATURE
    found = weighted_contrast(logits, torch.from_numpy(weights).float(), keep, "expw").item()
    right = slow_contrast(z.numpy().astype(float), weights, "expw")
    assert found == pytest.approx(right, rel=1e-5)
    shifted = logits - logits.max(1, keepdim=True).values
    w = torch.from_numpy(weights).float()
    log_p = shifted - (torch.exp(shifted * (1 - w)) * keep).sum(1, keepdim=True).log()
    wrong = -((w * keep) * log_p).sum(1).div((w * keep).sum(1)).mean().item()
    assert found != pytest.approx(wrong, rel=0.05)


def test_sigma_is_a_width_in_years_not_a_variance() -> None:
    """nidl's scalar bandwidth is a variance: with 2 it would be exp(-d^2 / 4)."""
    assert kernel_of(torch.tensor(2.0), "rbf", 2.0).item() == pytest.approx(math.exp(-0.5))
    assert kernel_of(torch.tensor(2.0), "rbf", 2.0).item() != pytest.approx(math.exp(-1.0), rel=0.1)


# --- what is unknown, negative or alone


def test_negative_similarities_are_shifted_or_clamped_and_no_row_is_empty() -> None:
    case = random_case(0, holes=False)
    case["descriptors"] = np.stack([case["mean"] + (-1) ** k * (k // 2 + 1) * case["std"] for k in range(2)] * 3)
    made, batch = objective({**case, "descriptors": case["descriptors"].astype(np.float32)}, negative="clamp")
    weights = made._weights(batch, lambda x: x[None])["anatomy"]
    assert set(weights.unique().round(decimals=4).tolist()) == {0.0, 1.0}
    opposite = torch.tensor([[[1.0, -1.0]], [[-1.0, 1.0]]])
    for negative in ("shift", "clamp"):
        alike = anatomical_weights(opposite, opposite, "global", negative)
        assert torch.allclose(alike, torch.eye(2), atol=1e-6)
        # All others are opposite: the weight of the own other view keeps the row from being empty.
        alone = weighted_contrast(torch.zeros(2, 2), torch.tensor([[0.0, 0.0], [0.0, 0.0]]), ~torch.eye(2).bool())
        assert alone == 0


def test_cases_without_age_or_descriptors_are_negatives_of_others_and_positives_of_themselves() -> None:
    case = random_case(0)
    made, batch = objective(case)
    weights = made._weights(batch, lambda x: x[None])
    unknown_age, undescribed = 4, 3
    assert weights["age"][unknown_age].sum() == weights["age"][:, unknown_age].sum() == 0
    assert weights["anatomy"][undescribed].sum() == 0
    z = embeddings(0).requires_grad_()
    terms = made.terms(z, batch)
    sum(terms.values()).backward()
    assert torch.isfinite(z.grad).all()
    assert z.grad[[unknown_age, undescribed]].abs().sum(1).min() > 0


def test_simclr_is_nt_xent_and_leaves_out_images_of_the_same_person() -> None:
    case, z = random_case(0), embeddings(0)
    made, batch = objective(case, weight_age=0.0, weight_anatomy=1e-9, weight_self=1.0, base_temperature=TEMPERATURE)
    logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    target = (torch.arange(2 * CASES) + CASES) % (2 * CASES)
    assert made.terms(z, batch)["self"].item() == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
    batch["identity"][1] = batch["identity"][0]
    for i, j in ((0, 1), (0, 7), (6, 1), (6, 7)):
        logits[i, j] = logits[j, i] = -torch.inf
    assert made.terms(z, batch)["self"].item() == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_age": 0.0, "weight_anatomy": 0.0}, "are all 0: nothing would be learned"),
        ({"form": "expw", "kernel": "gaussian"}, "its kernel must have the peak 1"),
        ({"variant": "local", "measures": MEASURES[:1]}, "'local' compares the measures of a region"),
        ({"measures": (MEASURES[0], MEASURES[0])}, "each once"),
        ({"measures": ()}, "one or more descriptors"),
        ({"views": {"flip": True}}, "which tell the hemispheres apart"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_a_contrast_of_one_case_is_refused() -> None:
    case = random_case(0)
    config = tiny_config(Path("a"), "s", batch_size=1)
    with pytest.raises(ValueError, match=r"at least 2 cases a micro-batch .* got 1 on 1 rank; raise batch_size"):
        AnatCL(config, SPEC)
    made, batch = objective(case)
    one = {name: value[:1] for name, value in batch.items()} | {"image": torch.rand(1, 1, *SPEC.grid)}
    with pytest.raises(ValueError, match="at least 2 cases a micro-batch"):
        made(one, Clock(0, 0))
    assert made.eval().validate(one, Clock(0, 0)) == {}


# --- two ranks against one process


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    case = random_case(5)
    half = slice(CASES // 2 * rank, CASES // 2 * (rank + 1))
    found: dict[str, Any] = {}
    for form in ("yaware", "expw", "threshold"):
        made, batch = objective(case, form=form, weight_self=1.0)
        mine = {name: value[half] for name, value in batch.items()}
        z = embeddings(5)
        own = torch.cat([z[:CASES][half], z[CASES:][half]]).requires_grad_()
        terms = made.terms(own, mine, across_ranks=True)
        sum(terms.values()).backward()
        values = torch.stack([term.detach() for term in terms.values()])
        dist.all_reduce(values)
        found[form] = (values / 2, [own.grad.clone() for _ in range(2)])
        dist.all_gather(found[form][1], own.grad)
    made, batch = objective(case)
    for layer in made.modules():  # local batch statistics differ from those of the whole batch
        if isinstance(layer, torch.nn.BatchNorm3d):
            layer.eval()
    model = wrap(made, World(rank, 2, torch.device("cpu")))
    image = torch.rand(CASES, 2, *SPEC.grid, generator=torch.Generator().manual_seed(5))
    mine = {name: value[half] for name, value in {**batch, "image": image}.items()}
    model(mine, Clock(0, 0))["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in made.named_parameters()}
    if rank == 0:
        torch.save({"terms": found, "gradients": gradients}, Path(folder) / "result.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, args=(str(folder),), nprocs=2)
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.mark.parametrize("form", ["yaware", "expw", "threshold"])
def test_two_ranks_equal_plain_numpy_and_their_gradients_one_process(two_ranks: dict[str, Any], form: str) -> None:
    case, z = random_case(5), embeddings(5)
    made, batch = objective(case, form=form, weight_self=1.0)
    values, gradients = two_ranks["terms"][form]
    expected = slow_terms(case, z.numpy().astype(float), made.settings)
    found = {name: value.item() * 0.07 / 0.1 for name, value in zip(("age", "anatomy"), values, strict=False)}
    assert found == pytest.approx(expected, rel=2e-5)
    z.requires_grad_()
    sum(made.terms(z, batch).values()).backward()
    half = CASES // 2
    halves = [torch.cat([z.grad[r * half : (r + 1) * half], z.grad[CASES + r * half : CASES + (r + 1) * half]])
              for r in range(2)]  # fmt: skip
    # DDP takes the mean over ranks of gradients that the gathering has summed.
    for one, other in zip(gradients, halves, strict=True):
        assert torch.allclose(one / 2, other, atol=1e-5)


def test_gradients_of_the_weights_do_not_depend_on_the_ranks(two_ranks: dict[str, Any]) -> None:
    made, batch = objective(random_case(5))
    for layer in made.modules():
        if isinstance(layer, torch.nn.BatchNorm3d):
            layer.eval()
    image = torch.rand(CASES, 2, *SPEC.grid, generator=torch.Generator().manual_seed(5))
    made({**batch, "image": image}, Clock(0, 0))["loss"].backward()
    for name, parameter in made.named_parameters():
        error = (two_ranks["gradients"][name] - parameter.grad).norm()
        assert error <= 1e-3 * parameter.grad.norm() + 1e-6, name
