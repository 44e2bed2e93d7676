"""Sizes and memory format of a product's result: what its kernel and its twins share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = int | Sequence[int]


class Geometry(NamedTuple):
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def _pair(name: str, value: Any, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else value
    good = isinstance(pair, (tuple, list)) and len(pair) == 2
    # Spelled out: a layer asks six times or more, and a generator costs more than the rest.
    if not good or not isinstance(pair[0], int) or not isinstance(pair[1], int):
        good = False
    if not good or pair[0] < least or pair[1] < least:
        raise ValueError(f"{name} must be an integer >= {least} or two of them, got {value!r}")
    return pair[0], pair[1]


def geometry(stride: Pair, padding: Pair, dilation: Pair) -> Geometry:
    """The three as pairs (height, width)."""
    return Geometry(
        _pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1)
    )


def kernel_size(kernel: Pair) -> tuple[int, int]:
    return _pair("kernel", kernel, 1)


def conv_size(size: Sequence[int], kernel: Sequence[int], geo: Geometry) -> tuple[int, int]:
    """Height and width of the convolution, before pooling."""
    (s_h, s_w), (p_h, p_w), (d_h, d_w) = geo
    height = (size[0] + 2 * p_h - d_h * (kernel[0] - 1) - 1) // s_h + 1
    return height, (size[1] + 2 * p_w - d_w * (kernel[1] - 1) - 1) // s_w + 1


def empty_product(
    x: Tensor, w: Tensor, halves: int, shared: bool, dtype: torch.dtype | None
) -> Tensor:
    """`[H B, N]` of a linear layer."""
    rows = x.shape[0] * halves if shared else x.shape[0]
    return torch.empty((rows, w.shape[0]), dtype=dtype or x.dtype, device=x.device)


def empty_output(
    x: Tensor,
    w: Tensor,
    halves: int,
    shared: bool,
    geo: Geometry,
    pool: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    """`[H B, Co, OH, OW]` in the memory format of x."""
    height, width = conv_size(x.shape[2:], w.shape[2:], geo)
    if pool:
        height, width = height // 2, width // 2
    rows = x.shape[0] * halves if shared else x.shape[0]
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty(
        (rows, w.shape[0], height, width),
        dtype=dtype or x.dtype,
        device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


def patches(x: Tensor, kernel: tuple[int, int], geo: Geometry) -> Tensor:
    """im2col: `[B, Ci, H, W]` -> `[Ci KH KW, B OH OW]`, a copy. Columns last: whole rows of an
    image are copied, not the few elements of a window's row."""
    (s_h, s_w), (p_h, p_w), (d_h, d_w) = geo
    height, width = conv_size(x.shape[2:], kernel, geo)
    padded = F.pad(x, (p_w, p_w, p_h, p_h))
    t_b, t_c, t_h, t_w = padded.stride()
    view = padded.as_strided(
        (x.shape[1], *kernel, x.shape[0], height, width),
        (t_c, t_h * d_h, t_w * d_w, t_b, t_h * s_h, t_w * s_w),
    )
    return view.reshape(x.shape[1] * kernel[0] * kernel[1], -1)
