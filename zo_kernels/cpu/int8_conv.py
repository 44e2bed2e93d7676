"""CPU twins of the integer convolutions of both halves; one dimension is images of height 1."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.cpu.int8_dot import ALL, WINDOWS
from zo_kernels.cpu.int8_products import After, Noise, convolution
from zo_kernels.geometry import Pair, empty_output, geometry


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
    count, geo = stop - start, geometry(stride, padding, dilation)
    out = empty_output(x, w, count, shared, geo, pool, torch.int32)
    if out.numel() == 0:
        return out, torch.zeros(count, dtype=torch.int32, device="cpu")
    noise = Noise(key, tensor or 0, start, stop, p_zero, r_max)
    after = After(relu, WINDOWS if pool else 0)
    return out, convolution(x, w, out, noise, geo, shared, after)


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
    count, geo = stop - start, geometry((1, stride), (0, padding), (1, dilation))
    x, w = x.unsqueeze(2), w.unsqueeze(2)
    acc = torch.empty(
        (x.shape[0] * (count if shared else 1), w.shape[0]), dtype=torch.int32, device="cpu"
    )
    if acc.numel() == 0:
        return acc, torch.zeros(count, dtype=torch.int32, device="cpu")
    noise, to = Noise(key, tensor or 0, start, stop, p_zero, r_max), acc.unsqueeze(2).unsqueeze(3)
    return acc, convolution(x, w, to, noise, geo, shared, After(relu, ALL))
