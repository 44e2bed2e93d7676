"""Reference of the integer tail: products, gradients, maxima and their places, the update.

Each window of a pooling is one row of four; a gradient is one product for each place of the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from zo_kernels.geometry import Pair, empty_output, geometry, kernel_size
from zo_kernels.reference.int8_conv import convolved
from zo_kernels.reference.int8_linear import integer_product
from zo_kernels.reference.int8_range import int8_range
from zo_kernels.reference.integer import clip, round_shift, rounding_words


def int8_matmul(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    acc = integer_product(a, b.mT)
    return acc, int8_range(acc)


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


def int8_conv2d_gradient(
    error: Tensor,
    x: Tensor,
    kernel: Pair,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    (s_h, s_w), (p_h, p_w), (d_h, d_w) = geometry(stride, padding, dilation)
    height, width = error.shape[2:]
    x = F.pad(x, (p_w, p_w, p_h, p_h))
    rows = rearrange(error, "b o h w -> o (b h w)")
    kh, kw = kernel_size(kernel)
    taps = []
    for u in range(0, kh * d_h, d_h):
        for v in range(0, kw * d_w, d_w):
            seen = x[:, :, u : u + (height - 1) * s_h + 1 : s_h]
            seen = seen[..., v : v + (width - 1) * s_w + 1 : s_w]
            taps.append(integer_product(rows, rearrange(seen, "b i h w -> i (b h w)")))
    return rearrange(torch.stack(taps), "(u v) o i -> o i u v", u=kh).contiguous()


def int8_unpool(error: Tensor, places: Tensor, size: Sequence[int]) -> Tensor:
    if error.numel() == 0:
        return error.new_zeros((*error.shape[:2], *size))
    rows = error.new_zeros((*error.shape, 4))
    rows.scatter_(4, places.to(torch.int64).unsqueeze(4), error.unsqueeze(4))
    out = rearrange(rows, "b c h w (i j) -> b c (h i) (w j)", i=2)
    return F.pad(out, (0, size[1] - out.shape[3], 0, size[0] - out.shape[2])).contiguous()


def int8_gradient_update_(
    w: Tensor,
    gradient: Tensor,
    *,
    b_bp: int,
    rounding: str = "pseudo",
    key: Tensor | None = None,
    tensor: int = 0,
) -> None:
    s = (int8_range(gradient).long() - b_bp).clamp(0, 31)
    words = rounding_words(gradient.shape, key, rounding, tensor)
    update = clip(round_shift(gradient.long(), s, rounding, words))
    w.copy_(clip(w.long() - update))
