"""ResNet-20 for 32x32 images (He et al. 2015, section 4.2)."""

from __future__ import annotations

import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm; the shortcut is a 1x1 where the shape changes."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet20(nn.Module):
    """Three stages of three blocks with 16, 32, 64 channels, then one linear layer.

    Args:
        classes: of the output.
        channels: of the input.
        width: multiplies the channels of the stages.
    Shapes: `[B, channels, H, W]` -> `[B, classes]`.
    """

    def __init__(self, classes: int = 10, channels: int = 3, width: int = 1) -> None:
        super().__init__()
        sizes = [16 * width, 32 * width, 64 * width]
        self.conv = nn.Conv2d(channels, sizes[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(sizes[0])
        blocks: list[nn.Module] = []
        inner = sizes[0]
        for stage, outer in enumerate(sizes):
            for block in range(3):
                blocks.append(BasicBlock(inner, outer, 2 if stage and block == 0 else 1))
                inner = outer
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(sizes[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.fc(reduce(x, "b c h w -> b c", "mean"))  # type: ignore[no-any-return]
