"""Reference of `zo_kernels.int8_paired_conv2d`: halves staged, patches as rows of a product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from zo_kernels.geometry import Geometry, Pair, conv_size, empty_output, geometry
from zo_kernels.reference.int8_linear import int8_halves, integer_product
from zo_kernels.reference.int8_range import int8_range


def convolved(x: Tensor, w: Tensor, geo: Geometry) -> Tensor:
    """A convolution of int8 in int32, exact."""
    height, width = conv_size(x.shape[2:], w.shape[2:], geo)
    (s_h, s_w), (p_h, p_w), (d_h, d_w) = geo
    x = F.pad(x, (p_w, p_w, p_h, p_h))
    taps = [
        x[:, :, u : u + (height - 1) * s_h + 1 : s_h, v : v + (width - 1) * s_w + 1 : s_w]
        for u in range(0, w.shape[2] * d_h, d_h)
        for v in range(0, w.shape[3] * d_w, d_w)
    ]
    patches = rearrange(torch.stack(taps), "k b i h w -> (b h w) (k i)")
    y = integer_product(patches, rearrange(w, "o i h w -> o (h w i)"))
    return rearrange(y, "(b h w) o -> b o h w", h=height, w=width)


def int8_paired_conv2d(
    x: Tensor,
    w: Tensor,
    key: Tensor | None,
    *,
    tensor: int | None = None,
    start: int = 0,
    stop: int = 2,
    shared: bool = False,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    p_zero: float = 0.0,
    r_max: int = 1,
    relu: bool = False,
    pool: bool = False,
) -> tuple[Tensor, Tensor]:
    geo = geometry(stride, padding, dilation)
    halves = int8_halves(w, key, tensor, start, stop, p_zero, r_max)
    count = len(halves)
    acc = empty_output(x, w, count, shared, geo, pool, torch.int32)
    for half, (w_half, to) in enumerate(zip(halves, acc.tensor_split(count), strict=True)):
        y = convolved(x if shared else x.tensor_split(count)[half], w_half, geo)
        if pool:
            y = y[:, :, : 2 * to.shape[2], : 2 * to.shape[3]]
            y = rearrange(y, "b o (h i) (w j) -> b o h w (i j)", i=2, j=2).amax(4)
        to.copy_(y.clamp_min(0) if relu else y)
    return acc, int8_range(acc.contiguous(), halves=count)


def int8_paired_conv1d_max(
    x: Tensor,
    w: Tensor,
    key: Tensor | None,
    *,
    tensor: int | None = None,
    start: int = 0,
    stop: int = 2,
    shared: bool = False,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    p_zero: float = 0.0,
    r_max: int = 1,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    sums, _ = int8_paired_conv2d(
        *(x.unsqueeze(2), w.unsqueeze(2), key),
        tensor=tensor,
        start=start,
        stop=stop,
        shared=shared,
        stride=(1, stride),
        padding=(0, padding),
        dilation=(1, dilation),
        p_zero=p_zero,
        r_max=r_max,
        relu=relu,
    )
    acc = sums.squeeze(2).amax(2)
    return acc, int8_range(acc, halves=stop - start)
