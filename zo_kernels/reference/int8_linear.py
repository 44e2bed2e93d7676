"""Reference of `zo_kernels.int8_paired_linear`: halves staged, products of integers."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from zo_kernels.reference.int8_range import int8_range
from zo_kernels.reference.int8_weights import int8_perturbed_weights

ROWS = 64  # of a product on a device that multiplies no matrices of integers


def integer_product(x: Tensor, w: Tensor) -> Tensor:
    """`x w^T` in int32, exact: `[M, K]` and `[N, K]`."""
    x, w = x.to(torch.int32), w.to(torch.int32)
    if x.device.type == "cpu":
        return x @ w.mT
    parts = torch.split(rearrange(x, "m k -> m 1 k"), ROWS)
    return torch.cat([(rows * w).sum(2, dtype=torch.int32) for rows in parts])


def int8_halves(
    w: Tensor,
    key: Tensor | None,
    tensor: int | None,
    start: int,
    stop: int,
    p_zero: float,
    r_max: int,
) -> Tensor:
    """`clip(w +- z)`, or `w` for every half where there is no key: `[H, ...]`."""
    if key is None:
        return w.expand(stop - start, *w.shape)
    assert tensor is not None
    span = {"tensor": tensor, "start": start, "stop": stop, "r_max": r_max}
    return int8_perturbed_weights(w, key, p_zero=p_zero, **span)


def int8_paired_linear(
    x: Tensor,
    w: Tensor,
    key: Tensor | None,
    *,
    tensor: int | None = None,
    start: int = 0,
    stop: int = 2,
    shared: bool = False,
    p_zero: float = 0.0,
    r_max: int = 1,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    halves = int8_halves(w, key, tensor, start, stop, p_zero, r_max)
    count = len(halves)
    rows = [x] * count if shared else x.tensor_split(count)
    acc = torch.cat([integer_product(*both) for both in zip(rows, halves, strict=True)])
    acc = acc.clamp_min(0) if relu else acc
    return acc, int8_range(acc, halves=count)
