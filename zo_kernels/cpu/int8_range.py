"""CPU twins of `zo_kernels.int8_range` and `int8_requantize`: sweeps over flat memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from zo_kernels.cpu.int8_kernels import range_flat, requantize_flat
from zo_kernels.cpu.int8_weights import memory_of
from zo_kernels.cpu.noise import sample
from zo_kernels.int8 import ROUNDINGS, dense, half_shape
from zo_kernels.reference.integer import rounding_words

NO_WORDS = np.zeros(0, np.int64)
ZERO = torch.zeros(1, dtype=torch.int32, device="cpu")


def int8_range(acc: Tensor, *, halves: int | None = None) -> Tensor:
    flat = memory_of(acc if dense(acc) else acc.contiguous())
    parts = flat.reshape(halves or 1, acc.numel() // (halves or 1))
    bits = torch.tensor([range_flat(part) for part in parts], dtype=torch.int32, device="cpu")
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
    noise = rounding_words(half_shape(acc.shape, halves), key, rounding, tensor, query, sample)
    words = NO_WORDS if noise is None else noise.contiguous().view(-1).numpy()
    source = acc if dense(acc) and noise is None else acc.contiguous()
    q = torch.empty_like(source, dtype=torch.int8)
    total = torch.empty(() if halves is None else (halves,), dtype=torch.int32, device="cpu")
    # Kept here until the call is over; an expanded exponent has one place for all halves.
    exponents = [ZERO if t is None else t.contiguous() for t in (bits, exponent, weight_exponent)]
    requantize_flat(
        *(source.data_ptr(), q.data_ptr(), acc.numel(), total.data_ptr(), halves or 1),
        tuple((t.data_ptr(), t.numel()) for t in exponents),
        *(ROUNDINGS[rounding], words, 0 if relu else -127),
    )
    out = q if source is acc else torch.empty_like(acc, dtype=torch.int8).copy_(q)
    return out, total
