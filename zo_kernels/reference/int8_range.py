"""Reference of `zo_kernels.int8_range` and `int8_requantize`: int32 to int8 with an exponent."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.int8 import half_shape
from zo_kernels.reference.integer import bit_length, clip, round_shift, rounding_words


def int8_range(acc: Tensor, *, halves: int | None = None) -> Tensor:
    parts = acc.long().abs().reshape(halves or 1, acc.numel() // (halves or 1))
    largest = parts.amax(1) if acc.numel() else parts.new_zeros(parts.shape[0])
    bits = bit_length((largest - 1).clamp_min(0)).to(torch.int32)
    return bits.squeeze(0) if halves is None else bits


def int8_requantize(
    acc: Tensor,
    bits: Tensor | None,
    exponent: Tensor,
    *,
    weight_exponent: Tensor | None = None,
    halves: int | None = None,
    rounding: str = "nearest",
    key: Tensor | None = None,
    tensor: int = 0,
    query: int = 0,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    if bits is None:
        bits = int8_range(acc, halves=halves)
    s = (bits.long().reshape(-1) - 7).clamp(0, 31).expand(halves or 1)
    shape = half_shape(acc.shape, halves)
    words = rounding_words(shape, key, rounding, tensor, query)  # the same for all halves
    x = acc.long().reshape(halves or 1, *shape)
    q = clip(round_shift(x, s.reshape(-1, *[1] * len(shape)), rounding, words))
    if relu:
        q = q.clamp_min(0)
    total = exponent.reshape(-1) + s
    if weight_exponent is not None:
        total = total + weight_exponent.reshape(-1)
    out = torch.empty_like(acc, dtype=torch.int8).copy_(q.reshape(acc.shape))
    total = total.to(torch.int32)
    return out, total.squeeze(0) if halves is None else total
