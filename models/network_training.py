"""A supervised classifier of connectomes, trained in this process: the baseline of prompting and probing.

Source: BrainNetworkTransformer (Kan et al., NeurIPS 2022) and its released training: Adam 1e-4 with a cosine to 1e-5,
weight decay 1e-4, batch 16, 200 epochs, mixup of matrices and classes. No data are held out for stopping: all epochs
are trained (the reference's validation set is drawn unseeded and swapped with its test set).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from models.config_cinp import NetworkClassificationConfig
from models.networks.connectome import NetworkClassifierNet

BATCH = 64
"""Matrices in one forward pass of a prediction."""


@dataclass(frozen=True)
class NetworkClassifier:
    """A trained network."""

    network: nn.Module
    regions: int

    def predict_proba(self, matrices_NRR: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the probabilities (N, K) of the classes; raises ValueError for another number of regions."""
        matrices = _checked(matrices_NRR, self.regions)
        with torch.inference_mode():
            found = [self.network(part).double().softmax(1) for part in matrices.split(BATCH)]
        return torch.cat(found).numpy()


def fit_network_classifier(
    matrices_NRR: NDArray[np.floating],
    targets_N: NDArray[np.integer],
    config: NetworkClassificationConfig | None = None,
    seed: int = 0,
    threads: int = 1,
) -> NetworkClassifier:
    """Train a network on connectomes (N, R, R), NaN for missing regions, and their classes 0, 1, ... (N,).

    Deterministic on the CPU, on which it runs, by seed and threads; torch's global random numbers, threads and modes
    are left as they were. Raises ValueError for fewer than two classes, classes without a case, and unequal lengths.
    """
    settings = config or NetworkClassificationConfig()
    matrices, targets = _checked(matrices_NRR), torch.from_numpy(np.asarray(targets_N, dtype=np.int64))
    classes = int(targets.max()) + 1 if len(targets) else 0
    if len(targets) != len(matrices) or classes < 2 or len(targets.unique()) != classes or int(targets.min()) < 0:
        raise ValueError(
            f"a network classifier needs a class 0, 1, ... for each connectome, two classes or more, each with a case; "
            f"got {len(targets)} targets with values {targets.unique().tolist()} for {len(matrices)} connectomes"
        )
    with _repeatable(seed, threads):
        network = NetworkClassifierNet(settings.network, matrices.shape[1], classes)
        _train(network, torch.nan_to_num(matrices, nan=0.0), F.one_hot(targets, classes).float(), settings, seed)
    return NetworkClassifier(network.eval(), matrices.shape[1])


def _train(
    network: nn.Module, matrices: Tensor, shares_NK: Tensor, settings: NetworkClassificationConfig, seed: int
) -> None:
    rng, size = np.random.default_rng(seed), settings.batch_size
    optimiser = torch.optim.Adam(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    batches = math.ceil(len(matrices) / size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimiser, T_max=settings.epochs * batches, eta_min=min(settings.lr_end, settings.lr)
    )
    network.train()
    for _ in range(settings.epochs):
        order = torch.from_numpy(rng.permutation(len(matrices)))
        for rows in order.split(size):
            image, share = _mixed(matrices[rows], shares_NK[rows], settings.mixup, rng)
            loss = F.cross_entropy(network(image), share)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()


def _mixed(matrices: Tensor, shares: Tensor, alpha: float, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return a convex combination of a batch with itself in another order, and of its classes."""
    if not alpha:
        return matrices, shares
    weight, other = float(rng.beta(alpha, alpha)), torch.from_numpy(rng.permutation(len(matrices)))
    return torch.lerp(matrices[other], matrices, weight), torch.lerp(shares[other], shares, weight)


def _checked(matrices_NRR: NDArray[np.floating], regions: int = 0) -> Tensor:
    shape = matrices_NRR.shape
    if len(shape) != 3 or shape[1] != shape[2] or (regions and shape[1] != regions):
        raise ValueError(f"connectomes must be (N, R, R){f' with {regions} regions' if regions else ''}, got {shape}")
    if np.isinf(matrices_NRR).any():
        raise ValueError("connectomes must not be infinite; a correlation of 1 between two regions has no Fisher z")
    return torch.from_numpy(np.ascontiguousarray(matrices_NRR, dtype=np.float32))


@contextmanager
def _repeatable(seed: int, threads: int) -> Iterator[None]:
    """Seed torch and make it deterministic for a while."""
    before, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(True)
            yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(strict)
