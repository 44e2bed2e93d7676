"""Reference of `zo_kernels.int8_range`: the bits that int32 magnitudes need."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.reference.integer import bit_length


def int8_range(acc: Tensor, *, halves: int | None = None) -> Tensor:
    parts = acc.long().abs().reshape(halves or 1, acc.numel() // (halves or 1))
    largest = parts.amax(1) if acc.numel() else parts.new_zeros(parts.shape[0])
    bits = bit_length((largest - 1).clamp_min(0)).to(torch.int32)
    return bits.squeeze(0) if halves is None else bits


__all__ = ["int8_range"]
