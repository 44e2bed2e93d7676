"""The integer tail's products in Triton, and what torch adds to them on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.geometry import Pair, empty_output, geometry, kernel_size, patches
from zo_kernels.int8 import LIMIT
from zo_kernels.triton.int8_conv import int8_paired_conv2d
from zo_kernels.triton.int8_linear import launch_product
from zo_kernels.triton.int8_range import int8_range, int8_requantize


def int8_matmul(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    acc = torch.empty((a.shape[0], b.shape[1]), dtype=torch.int32, device=a.device)
    bits = torch.zeros((), dtype=torch.int32, device=a.device)
    if acc.numel():
        launch_product(a, b.t(), acc, bits, None, 0, 0, 1, False, 0.0, 1, False)
    return acc, bits


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
    places = torch.zeros_like(acc, dtype=torch.uint8)
    sums, _ = int8_paired_conv2d(
        *(x, w, None), stop=halves, stride=geo.stride, padding=geo.padding, dilation=geo.dilation
    )
    height, width = (2 * n for n in acc.shape[2:])
    corners = [sums[:, :, i:height:2, j:width:2] for i in range(2) for j in range(2)]
    acc.copy_(corners[0])
    for place, corner in enumerate(corners[1:], 1):
        places.masked_fill_(corner > acc, place)  # strictly: the first of equal ones stays
        torch.maximum(acc, corner, out=acc)
    acc = acc.clamp_min_(0) if relu else acc
    return acc, int8_range(acc, halves=halves), places


def int8_conv2d_gradient(
    error: Tensor,
    x: Tensor,
    kernel: Pair,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    size, geo = kernel_size(kernel), geometry(stride, padding, dilation)
    if x.numel() == 0:
        shape = (error.shape[1], x.shape[1], *size)
        return torch.zeros(shape, dtype=torch.int32, device=x.device)
    rows = error.permute(0, 2, 3, 1).flatten(0, 2)
    sums, _ = int8_matmul(patches(x, size, geo), rows)
    return sums.t().reshape(error.shape[1], x.shape[1], *size).contiguous()


def int8_unpool(error: Tensor, places: Tensor, size: Sequence[int]) -> Tensor:
    out = error.new_zeros((*error.shape[:2], *size))
    height, width = (2 * n for n in error.shape[2:])
    for place in range(4):
        to = out[:, :, place // 2 : height : 2, place % 2 : width : 2]
        torch.mul(error, places == place, out=to)
    return out


def int8_gradient_update_(
    w: Tensor,
    gradient: Tensor,
    *,
    b_bp: int,
    rounding: str = "pseudo",
    key: Tensor | None = None,
    tensor: int = 0,
) -> None:
    bits = int8_range(gradient)
    update, _ = int8_requantize(
        *(gradient, bits + (7 - b_bp), bits),  # requantising shifts by bits - 7
        rounding=rounding,
        key=key,
        tensor=tensor,
    )
    w.copy_((w.to(torch.int16) - update).clamp_(-LIMIT, LIMIT))
