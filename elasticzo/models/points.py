"""The maximum over the points of a cloud."""

from __future__ import annotations

from torch import Tensor, nn


class MaxPoints(nn.Module):
    """`[B, C, N] -> [B, C]`: the largest value of each channel over N points."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(-1)
