"""Optimisers by name: Adam, AdamW, and Muon for matrices with AdamW for the rest.

Source of Muon: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): the momentum of a
weight matrix is replaced by the nearest matrix whose singular values are all about 1, so that directions with small
gradients learn as fast as the others. torch.optim.Muon takes 2-dimensional parameters only; convolutions are matrices
too, with one row per output channel (per input channel when transposed).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from models.config import OptimiserConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration; they trade exactness for a steep slope at 0."""
ITERATIONS = 5
MOMENTUM = 0.95
MIN_SIDE = 16
"""Weights with a smaller side (stems that read an image, heads) are left to AdamW, as the authors advise."""


def build_optimiser(
    groups: list[dict[str, Any]], options: OptimiserConfig, modules: Iterable[nn.Module], fused: bool
) -> torch.optim.Optimizer:
    """Return the optimiser that a config names, with `initial_lr` in every group.

    groups: from `Objective.parameter_groups`; modules: where the matrices for Muon are looked for.
    """
    if options.kind == "muon":
        groups = split_matrices(groups, options, matrices(modules))
    optimiser = Mixed(
        groups,
        lr=options.lr,
        weight_decay=options.weight_decay,
        fused=fused or None,
        decoupled_weight_decay=options.kind != "adam",
    )
    for group in optimiser.param_groups:
        group["initial_lr"] = group["lr"]
    return optimiser


def matrices(modules: Iterable[nn.Module]) -> set[Tensor]:
    """Return the weights of dense layers and full convolutions that are at least `MIN_SIDE` on both sides."""
    found = set()
    for module in modules:
        if not isinstance(module, nn.Linear | nn.Conv3d | nn.ConvTranspose3d) or getattr(module, "groups", 1) > 1:
            continue
        if min(as_matrix(module.weight).shape) >= MIN_SIDE:
            found.add(module.weight)
    return found


def as_matrix(weight: Tensor) -> Tensor:
    """(A, ...) -> (A, B)."""
    return weight.reshape(len(weight), -1)


def split_matrices(groups: list[dict[str, Any]], options: OptimiserConfig, chosen: set[Tensor]) -> list[dict[str, Any]]:
    """Return the groups, each divided into its matrices (with the rate of Muon) and the rest."""
    result = []
    for group in groups:
        inside = [parameter for parameter in group["params"] if parameter in chosen]
        outside = [parameter for parameter in group["params"] if parameter not in chosen]
        scale = group["lr"] / options.lr
        parts = (
            {**group, "params": outside, "muon": False},
            {
                **group,
                "params": inside,
                "muon": True,
                "lr": options.muon_lr * scale,
                "name": f"{group['name']} matrices",
            },
        )
        result += [part for part in parts if part["params"]]
    return result


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients, sparse ones (coalesced) too, to a common norm of at most `limit`; return the norm before."""
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    values = [gradient.values() if gradient.is_sparse else gradient for gradient in found]
    norm = torch.nn.utils.get_total_norm(values)
    torch._foreach_mul_(values, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


class Mixed(torch.optim.Adam):
    """Adam or AdamW; Muon in the groups with `muon` true; lazy Adam where the gradient is sparse. One checkpoint.

    Lazy: of a sparse gradient (the template bank's) only the touched rows move, and only their moments decay; a row
    counts its own steps for the bias correction. Rows of other modalities and places stay as they are, to the bit.
    Dense Adam would go on moving them by their old momentum and forget their second moment between two visits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # A fused AdamW is called even after an overflow in fp16 and skips the update itself; Muon's part would not.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step and free the gradients of the matrices, so that AdamW leaves them alone."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or not (parameter.grad.is_sparse or group.get("muon")):
                    continue
                if parameter.grad.is_sparse:
                    self._step_rows(parameter, group)
                else:
                    self._step_matrix(parameter, group["lr"], group["weight_decay"])
                parameter.grad = None
        return super().step(closure)

    def _step_rows(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        gradient, state, (beta1, beta2) = parameter.grad.coalesce(), self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros(())  # AdamW expects one when it loads a state
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["visits"] = parameter.new_zeros(parameter.shape[: gradient.sparse_dim()])
        rows, values = tuple(gradient.indices()), gradient.values()
        visits = state["visits"][rows] + 1
        first = torch.lerp(values, state["exp_avg"][rows], beta1)
        second = torch.lerp(values.square(), state["exp_avg_sq"][rows], beta2)
        state["visits"][rows], state["exp_avg"][rows], state["exp_avg_sq"][rows] = visits, first, second
        scale = (1 - beta2**visits).sqrt() / (1 - beta1**visits)
        # as in torch: eps is added to the corrected root
        root = second.sqrt() + group["eps"] * (1 - beta2**visits).sqrt()[:, None]
        parameter[rows] = parameter[rows] - group["lr"] * scale[:, None] * first / root

    def _step_matrix(self, parameter: nn.Parameter, lr: float, weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # AdamW expects one when it loads a state
            state["momentum"] = torch.zeros_like(parameter)
        gradient = parameter.grad
        assert gradient is not None
        state["momentum"].mul_(MOMENTUM).add_(gradient)
        direction = orthogonalise(as_matrix(gradient + MOMENTUM * state["momentum"]))
        stretch = max(1.0, direction.shape[0] / direction.shape[1]) ** 0.5
        parameter.mul_(1 - lr * weight_decay).add_(direction.view_as(parameter), alpha=-lr * stretch)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return about U V^T of a matrix U S V^T: singular values between 0.7 and 1.2, where they are not tiny."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x
