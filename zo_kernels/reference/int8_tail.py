"""Reference of `zo_kernels.int8_conv2d_max_pool`: each window is one row of four."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from zo_kernels.geometry import Pair, empty_output, geometry
from zo_kernels.reference.int8_conv import convolved
from zo_kernels.reference.int8_range import int8_range


def int8_conv2d_max_pool(
    x: Tensor,
    w: Tensor,
    halves: int = 1,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    geo = geometry(stride, padding, dilation)
    acc = empty_output(x, w, halves, False, geo, True, torch.int32)
    height, width = (2 * n for n in acc.shape[2:])
    sums = convolved(x, w, geo)[:, :, :height, :width]
    windows = rearrange(sums, "b o (h i) (w j) -> b o h w (i j)", i=2, j=2)
    places = windows.argmax(4)  # the first of equal ones
    best = windows.gather(4, places.unsqueeze(4)).squeeze(4)
    acc.copy_(best.clamp_min(0) if relu else best)
    where = torch.empty_like(acc, dtype=torch.uint8).copy_(places)
    return acc, int8_range(acc.contiguous(), halves=halves), where


__all__ = ["int8_conv2d_max_pool"]
