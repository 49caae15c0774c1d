"""Layers of the UniFormer with the names, parameters and results of torch's own, arranged for speed.

Shapes: B batch, C channels; images are (B, C, D, H, W), in memory as channels_last_3d, where a product over channels
moves no voxel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_weight

FAST_WIDTH = 3
"""oneDNN has a fast kernel for the weight gradient of depth-wise convolutions up to this width, in two dimensions."""


class PointwiseConv3d(nn.Conv3d):
    """Convolution of kernel 1^3 as a linear layer on the channels: torch's own takes a slow path on one thread."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, out_channels, D, H, W)."""
        return F.linear(x.permute(0, 2, 3, 4, 1), self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)


class PatchConv3d(nn.Conv3d):
    """Convolution of kernel 2^3 and stride 2 for few input channels: one matrix product over patches."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, out_channels, D // 2, H // 2, W // 2); odd edges lose their last voxel."""
        depth, height, width = (edge // 2 for edge in x.shape[2:])
        x = x[:, :, : 2 * depth, : 2 * height, : 2 * width]
        patches = x.unflatten(4, (width, 2)).unflatten(3, (height, 2)).unflatten(2, (depth, 2))
        rows = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
        return F.linear(rows, self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)


class DepthwiseConv3d(nn.Conv3d):
    """Depth-wise convolution of an odd kernel; the size is kept.

    On the CPU it has a backward pass of its own, some five times faster than the library's, and always computes in
    fp32: oneDNN's depth-wise gradients in bf16 are slower still.
    """

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W), shape kept."""
        if x.device.type != "cpu":
            return super().forward(x)
        return _DepthwiseOnCpu.apply(x, self.weight, self.bias)


class _DepthwiseOnCpu(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last_3d)
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _convolve(x, weight, bias)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last_3d)
        to_x = _convolve(gradient, weight.flip(2, 3, 4), None) if ctx.needs_input_grad[0] else None
        to_bias = gradient.sum((0, 2, 3, 4)) if ctx.has_bias else None
        return to_x, depthwise_weight_gradient(x, gradient, weight.shape[2]), to_bias


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv3d(x, weight, bias, padding=weight.shape[2] // 2, groups=x.shape[1])


def depthwise_weight_gradient(x: Tensor, gradient: Tensor, kernel: int) -> Tensor:
    """Return the gradient (C, 1, K, K, K) of a depth-wise weight from image and gradient of the output, both (B, C, D,
    H, W): plane by plane of the kernel and in pieces of `FAST_WIDTH`, by two-dimensional convolutions.
    """
    channels, half = x.shape[1], kernel // 2
    result = x.new_zeros((kernel, channels, 1, kernel, kernel))
    for first in range(0, kernel, FAST_WIDTH):
        start = min(first, kernel - FAST_WIDTH)
        # Voxel w of the output meets the voxels w .. w + 2 of this.
        moved = F.pad(x, (half - start, start + FAST_WIDTH - 1 - half))
        for plane in range(kernel):
            piece = _plane_gradient(moved, gradient, plane - half, (channels, 1, kernel, FAST_WIDTH))
            result[plane, ..., start : start + FAST_WIDTH] = piece
    return result.permute(1, 2, 0, 3, 4)


def _plane_gradient(x: Tensor, gradient: Tensor, shift: int, size: tuple[int, int, int, int]) -> Tensor:
    """Return the gradient (C, 1, K, FAST_WIDTH) of the weights between planes d + shift of x and d of the output."""
    depth, padding = x.shape[2], (size[2] // 2, 0)
    total = x.new_zeros(size)
    if abs(shift) >= depth:
        return total
    at, of = slice(max(0, -shift), depth - max(0, shift)), slice(max(0, shift), depth - max(0, -shift))
    for image, result in zip(x, gradient, strict=True):
        planes, results = image[:, of].transpose(0, 1), result[:, at].transpose(0, 1)
        total += conv2d_weight(planes, size, results, padding=padding, groups=size[0])
    return total
