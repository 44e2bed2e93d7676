"""Reference of `zo_kernels.int8_conv2d_gradient`: one product for each place of the kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from zo_kernels.geometry import Pair, geometry, kernel_size
from zo_kernels.reference.int8_linear import integer_product


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


__all__ = ["int8_conv2d_gradient"]
