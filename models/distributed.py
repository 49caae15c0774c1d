"""The ranks of a training: start, agreement, sums. World size 1 needs no process group."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

COLLECTIVE_TIMEOUT = timedelta(minutes=20)
"""Ranks that wait longer for one another fail; the launcher's stall watchdog usually speaks first."""


@dataclass(frozen=True)
class World:
    """This process among the ranks of one training."""

    rank: int
    size: int
    device: torch.device
    local_rank: int = 0
    """Among the ranks of this node, which share its disk."""
    local_size: int = 1
    """Ranks of this node."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files."""
        return self.rank == 0


@contextmanager
def open_world() -> Iterator[World]:
    """Join the ranks that torchrun's environment describes (nccl on CUDA, gloo elsewhere) and leave them at the end.

    Raises ValueError on a host with GPUs, but fewer than ranks.
    """
    size, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    local_size, local_rank = _number("LOCAL_WORLD_SIZE", 1), _number("LOCAL_RANK", 0)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_size > (gpus := torch.cuda.device_count()):
            raise ValueError(
                f"{local_size} ranks are to run on this host, which has {gpus} GPUs, and each needs its own; set ranks "
                f"to {gpus} and raise accumulation, or hide the GPUs (CUDA_VISIBLE_DEVICES='') to train on the CPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if size == 1:
        yield World(0, 1, device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        yield World(rank, size, device, local_rank, local_size)
    finally:
        dist.destroy_process_group()


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def wrap(objective: nn.Module, world: World) -> nn.Module:
    """Return the module whose forward synchronises gradients.

    Batch norm keeps local statistics with gloo; the buffers of rank 0 are given to all ranks before a forward pass and
    are those that are saved. On CUDA the layers become SyncBatchNorm.
    """
    if world.size == 1:
        return objective
    if world.device.type == "cuda":
        objective = nn.SyncBatchNorm.convert_sync_batchnorm(objective)
    # DDP regroups its buckets after the first step unless it searches unused parameters. With more than two ranks the
    # group decides the order of a sum, and a resumed training would differ in the last bit.
    keep_buckets = world.size > 2 and world.device.type == "cpu"
    ignored = [*constant_buffers(objective), *sparse_parameters(objective)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, ignored)
    return DistributedDataParallel(objective, find_unused_parameters=keep_buckets)


def constant_buffers(module: nn.Module) -> list[str]:
    """Return the names of the buffers that are not saved: equal on all ranks from the start and never sent again."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    ]


def sparse_parameters(module: nn.Module) -> list[str]:
    """Return the names of parameters with sparse gradients, which `average_sparse_gradients` synchronises, not DDP."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        if getattr(part, "sparse", False)
        for name, _ in part.named_parameters(recurse=False)
    ]


def average_sparse_gradients(module: nn.Module, world: World) -> None:
    """Coalesce all sparse gradients and average them over ranks, sending the touched rows only."""
    for parameter in module.parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = _mean_of_rows(parameter.grad.coalesce(), world)


def _mean_of_rows(gradient: Tensor, world: World) -> Tensor:
    if world.size == 1:
        return gradient
    count = torch.tensor([gradient._nnz()], device=gradient.device)
    counts = [torch.empty_like(count) for _ in range(world.size)]
    dist.all_gather(counts, count)
    sizes = [int(n) for n in counts]
    indices = _gather_rows(gradient.indices().T.contiguous(), sizes)
    values = _gather_rows(gradient.values(), sizes) / world.size
    return torch.sparse_coo_tensor(indices.T, values, gradient.shape, check_invariants=False).coalesce()


def _gather_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def any_rank(flags: Sequence[bool], world: World) -> list[bool]:
    """Return for each flag whether it is set on any rank."""
    if world.size == 1:
        return list(flags)
    votes = torch.tensor([float(flag) for flag in flags], device=world.device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """Return the element-wise sum over ranks."""
    total = values.detach().clone()
    if world.size > 1:
        dist.all_reduce(total)
    return total


def gather_tensors(value: Tensor, world: World) -> list[Tensor]:
    """Return the tensors of all ranks (equal shapes) in rank order, on every rank."""
    if world.size == 1:
        return [value]
    on_device = value.to(world.device)
    parts = [torch.empty_like(on_device) for _ in range(world.size)]
    dist.all_gather(parts, on_device)
    return [part.cpu() for part in parts]


def gather_objects(value: Any, world: World) -> list[Any]:
    """Return the values of all ranks in rank order, on every rank; they are pickled, so only for our own."""
    if world.size == 1:
        return [value]
    parts: list[Any] = [None] * world.size
    dist.all_gather_object(parts, value)
    return parts


def broadcast_buffers(module: nn.Module, world: World) -> None:
    """Give rank 0's buffers (batch norm statistics) to all ranks."""
    if world.size > 1:
        constant = set(constant_buffers(module))
        for name, buffer in module.named_buffers():
            if name not in constant:
                dist.broadcast(buffer, src=0)


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier()
