"""3D ResNet: AnatCL's backbone.

Source: the released encoder definition of AnatCL (3D ResNet-18: convolution 7^3 of stride 2, batch norm, ReLU, max pool
3^3 of stride 2, four levels of basic blocks, mean over positions to 512 values). The names of the weights are those of
the released files. It computes what MONAI's ResNet does, which is tested; importing MONAI's networks would cost every
rank 6 s at its start. Shapes: B batch, C channels, X Y Z space.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ResNet3DConfig


class ResidualBlock(nn.Module):
    """Two convolutions 3^3, or 1^3, 3^3, 1^3 with four times the channels at the end; the input is added."""

    def __init__(self, before: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        after = 4 * width if bottleneck else width
        basic = ((width, 3, stride), (width, 3, 1))
        steps = ((width, 1, 1), (width, 3, stride), (after, 1, 1)) if bottleneck else basic
        self.count, channels = len(steps), before
        for number, (out, kernel, step) in enumerate(steps, start=1):
            convolution = nn.Conv3d(channels, out, kernel, stride=step, padding=kernel // 2, bias=False)
            self.add_module(f"conv{number}", convolution)
            self.add_module(f"bn{number}", nn.BatchNorm3d(out))
            channels = out
        self.downsample: nn.Module | None = None
        if stride > 1 or before != after:
            project = nn.Conv3d(before, after, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(project, nn.BatchNorm3d(after))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z); with stride 2 edges are halved, rounded up."""
        y = x
        for number in range(1, self.count + 1):
            y = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(y))
            y = F.relu(y) if number < self.count else y
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet3D(nn.Module):
    """Encoder of four levels at strides 4, 8, 16 and 32; edges are rounded up, so any size from 1 voxel on will do."""

    def __init__(self, config: ResNet3DConfig) -> None:
        super().__init__()
        self.config = config
        bottleneck, channels = config.block == "bottleneck", config.widths[0]
        self.conv1 = nn.Conv3d(config.in_channels, channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(channels)
        for level, (width, count) in enumerate(zip(config.widths, config.blocks, strict=True), start=1):
            blocks = []
            for number in range(count):
                blocks.append(ResidualBlock(channels, width, 2 if level > 1 and not number else 1, bottleneck))
                channels = 4 * width if bottleneck else width
            self.add_module(f"layer{level}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCXYZ: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the input and the four levels (B, C, X, Y, Z), fine to coarse; the mean of the last is the embedding.

        121 x 128 x 121 voxels give 31 x 32 x 31, 16^3, 8^3 and 4^3.
        """
        y = self._mirrored(x_BCXYZ)
        outputs = [F.max_pool3d(F.relu(self.bn1(self.conv1(y))), 3, stride=2, padding=1)]
        for level in (1, 2, 3, 4):
            outputs.append(self.get_submodule(f"layer{level}")(outputs[-1]))
        first, second, third, fourth = (self._mirrored(level) for level in outputs[1:])
        return x_BCXYZ, first, second, third, fourth

    def _mirrored(self, x_BCXYZ: Tensor) -> Tensor:
        return x_BCXYZ.flip(2) if self.config.mirror_x else x_BCXYZ
