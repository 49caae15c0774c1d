"""Networks of connectomes: tokens, missing regions, sizes of the reference, and the supervised baseline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.config_cinp import ConnectomeNetworkConfig, NetworkClassificationConfig
from models.network_training import fit_network_classifier
from models.networks.connectome import BrainNetworkTransformer, Readout, build_network_encoder

SMALL = ConnectomeNetworkConfig(width=16, heads=2, hidden=16)


def matrices(count: int, regions: int = 8, seed: int = 0) -> np.ndarray:
    """Return random connectomes (N, R, R) float32."""
    noise = np.random.default_rng(seed).standard_normal((count, regions, regions)).astype(np.float32) / 2
    return (noise + noise.transpose(0, 2, 1)) * (1 - np.eye(regions, dtype=np.float32))


def without(matrix: np.ndarray, region: int) -> np.ndarray:
    """Return a copy in which a region is missing."""
    out = matrix.copy()
    out[region] = out[:, region] = np.nan
    return out


@pytest.mark.parametrize("regions", [116, 200, 400])
def test_brain_network_transformer_has_the_sizes_of_the_reference(regions: int) -> None:
    """Methods: 1.69 M, 3.98 M and 13.6 M with the frozen centres."""
    with torch.device("meta"):
        network = BrainNetworkTransformer(ConnectomeNetworkConfig(kind="bnt"), regions, 2)
    parts = [*network.parameters(), *network.buffers()]
    assert sum(part.numel() for part in parts) == {116: 1_688_530, 200: 3_980_890, 400: 13_585_290}[regions]


def test_centres_are_orthonormal_and_frozen_and_clusters_are_fewer_than_regions() -> None:
    readout = Readout(20, 7)
    assert torch.allclose(readout.centres @ readout.centres.T, torch.eye(7), atol=1e-5)
    assert "centres" not in dict(readout.named_parameters())
    assert readout(torch.randn(3, 20, 20)).shape == (3, 7, 20)
    for regions, clusters in ((68, 34), (101, 100)):
        network = BrainNetworkTransformer(ConnectomeNetworkConfig(kind="bnt", hidden=8), regions, 3)
        assert network.readout.centres.shape == (clusters, regions)
    assert network.layers[0].self_attn.num_heads == 1, "101 is a prime number"


@pytest.mark.parametrize("kind", ["transformer", "triangle"])
def test_tokens_do_not_depend_on_the_batch(kind: str) -> None:
    torch.manual_seed(0)
    network = build_network_encoder(SMALL.replace(kind=kind), 8).eval()
    many = torch.from_numpy(matrices(5))
    many[1] = torch.from_numpy(without(many[1].numpy(), 3))
    with torch.no_grad():
        tokens, absent = network(many)
        single = torch.cat([network(matrix[None])[0] for matrix in many])
    known = ~absent
    assert torch.allclose(tokens[known], single[known], atol=1e-5)
    assert tokens.shape == ((5, 9, 16) if kind == "transformer" else (5, 1, 16))
    assert absent.sum() == (kind == "transformer")
    assert torch.isfinite(tokens).all()


def test_nothing_attends_to_a_missing_region() -> None:
    """Its token may hold anything, and [CLS] stays the same."""
    torch.manual_seed(0)
    network = build_network_encoder(SMALL, 8).eval()
    matrix = torch.from_numpy(without(matrices(1)[0], 2))[None]
    with torch.no_grad():
        one, absent = network(matrix)
        network.region[0, 2] = 50.0
        two, _ = network(matrix)
        zeros, _ = network(torch.nan_to_num(matrix))
    assert absent[0].nonzero().flatten().tolist() == [3]
    assert torch.allclose(one[0, 0], two[0, 0], atol=1e-6)
    assert not torch.allclose(one[0, 0], zeros[0, 0], atol=1e-3), "a region without correlations is not a missing one"


def test_a_classifier_gives_no_tokens() -> None:
    with pytest.raises(ValueError, match="network kind 'bnt' gives classes, not tokens"):
        build_network_encoder(ConnectomeNetworkConfig(kind="bnt"), 8)


FAST = NetworkClassificationConfig(
    network=ConnectomeNetworkConfig(kind="bnt", hidden=16, width=8), epochs=30, lr=3e-3, lr_end=3e-4
)


def classes(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return connectomes whose first block is stronger in class 1, one with a missing region, and their classes."""
    found, targets = matrices(count, seed=seed), np.arange(count) % 2
    found[:, :4, :4] += 0.6 * targets[:, None, None]
    found[0] = without(found[0], 7)
    return found, targets


@pytest.mark.parametrize("kind", ["bnt", "transformer", "triangle"])
def test_the_baseline_learns_classes_and_repeats_itself(kind: str) -> None:
    config = FAST.replace(network=FAST.network.replace(kind=kind))
    modes = (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    before = torch.get_rng_state()
    fitted = fit_network_classifier(*classes(48), config, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == modes
    unseen, truth = classes(40, seed=5)
    shares = fitted.predict_proba(unseen)
    assert shares.shape == (40, 2)
    assert shares.sum(axis=1) == pytest.approx(1)
    assert (shares.argmax(axis=1) == truth).mean() > 0.7
    short = config.replace(epochs=2)
    one, two, three = (fit_network_classifier(*classes(48), short, seed).predict_proba(unseen) for seed in (1, 1, 2))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, three)


def test_what_the_baseline_cannot_use_is_refused() -> None:
    found, targets = classes(8)
    for wrong in (np.zeros(8, int), targets[:5], np.array([0, 2] * 4), targets - 1, np.array([], int)):
        with pytest.raises(ValueError, match=r"needs a class 0, 1, \.\.\. for each connectome, two classes or more"):
            fit_network_classifier(found, wrong, FAST)
    with pytest.raises(ValueError, match=r"connectomes must be \(N, R, R\), got \(8, 8\)"):
        fit_network_classifier(found[0], targets, FAST)
    fitted = fit_network_classifier(found, targets, FAST.replace(epochs=1))
    with pytest.raises(ValueError, match=r"connectomes must be \(N, R, R\) with 8 regions, got \(4, 6, 6\)"):
        fitted.predict_proba(matrices(4, 6))
    found[1, 2, 3] = np.inf
    with pytest.raises(ValueError, match="must not be infinite"):
        fit_network_classifier(found, targets, FAST)
