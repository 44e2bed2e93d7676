"""What the integer ops share on the host: constants of their arithmetic, and checks. No Triton.

A tensor is `(q int8 in [-127, 127], exponent int32)` of value `q * 2^exponent`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from zo_kernels.layout import check_groups
from zo_kernels.registry import check_indices, check_key, check_tensor

ROUNDINGS = {"nearest": 0, "pseudo": 1, "stochastic": 2}
LIMIT = 127

# Base-2 logits are `p = LOG2_E q 2^exponent / 2^15`.
LOG2_E = 47274
LOG2_E_BITS = 15
MIN_EXPONENT, MAX_EXPONENT = -24, 8
MAX_FRACTION_BITS = 16
ONE_BITS = 30  # exp2 gives 2^-d in units of 2^-30
# round(2^32 * 2^-(2^-k)), k = 1 .. 16: exp2 multiplies by those whose bit of the fraction is set.
FACTORS = (
    *(0xB504F334, 0xD744FCCB, 0xEAC0C6E8, 0xF5257D15),
    *(0xFA83B2DB, 0xFD3E0C0D, 0xFE9E115C, 0xFF4ECB59),
    *(0xFFA75652, 0xFFD3A752, 0xFFE9D2B3, 0xFFF4E91C),
    *(0xFFFA747F, 0xFFFD3A3B, 0xFFFE9D1D, 0xFFFF4E8E),
)
# What a sample with a label outside [0, C) adds on a device that cannot raise: more than any loss.
BAD_LABEL = 1 << 38
MAX_BATCH = 1 << 24
ERROR_BITS = 23  # a softmax in units of 2^-23, before it is rounded to 2^-7
ERROR_EXPONENT = -7


@lru_cache(maxsize=1024)
def sparse_constants(p_zero: float, r_max: int) -> tuple[int, int, int]:
    """`(p0, magic, shift)`: for d = 65536 - p0 and every n < 255 d,
    `n // d == (n * magic >> 32) >> shift`. The magic word comes as a signed 32-bit number.

    Granlund and Montgomery 1994: with `magic = ceil(2^(32 + shift) / d)` the product is too large
    by less than `n d`, which is below `2^(32 + shift)` for d <= 2^16 and `shift = bits of d - 1`.
    """
    p0 = round(65536 * p_zero)
    divisor = max(65536 - p0, 1)
    shift = max((divisor - 1).bit_length() - 1, 0)
    magic = min(-(-(1 << (32 + shift)) // divisor), (1 << 32) - 1)
    return p0, magic - (1 << 32) if magic >> 31 else magic, shift


def update_shift(queries: int, r_max: int, b_zo: int) -> int:
    """`max(0, bits(Q * r_max) - b_zo)`: how far the sum of Q directions is shifted right."""
    return max(0, (queries * r_max - 1).bit_length() - b_zo)


def half_shape(shape: torch.Size, halves: int | None) -> tuple[int, ...]:
    """The shape of one half of a tensor whose dimension 0 holds them one behind the other."""
    return tuple(shape) if halves is None else (shape[0] // halves, *shape[1:])


def dense(t: Tensor) -> bool:
    """Whether memory has no gaps, with dimension 0 outermost: a half is one piece of it."""
    if t.is_contiguous():
        return True
    if t.ndim == 4:
        return t.is_contiguous(memory_format=torch.channels_last)
    return t.ndim == 5 and t.is_contiguous(memory_format=torch.channels_last_3d)


def check_halves(name: str, t: Tensor, halves: int | None) -> None:
    if halves is None:
        return
    if halves < 1:
        raise ValueError(f"halves must be at least 1, got {halves}")
    if t.ndim == 0 or t.shape[0] % halves:
        raise ValueError(
            f"{name} must have a dimension 0 that divides by {halves} halves, "
            f"got shape {list(t.shape)}"
        )


def check_exponent(name: str, t: Any, halves: int | None, device: torch.device) -> None:
    """One int32 for all halves, or one for each."""
    check_tensor(name, t, dtype=[torch.int32], device=device)
    if t.ndim > 1 or t.numel() not in {1, halves or 1}:
        counts = "1 element" if halves in (None, 1) else f"1 or {halves} elements"
        raise ValueError(f"{name} must have {counts}, got shape {list(t.shape)}")


def check_rounding(
    rounding: str,
    key: Tensor | None,
    shape: tuple[int, ...],
    tensor: int,
    query: int,
    device: torch.device,
) -> None:
    """A stochastic rounding needs noise for every element of `shape`."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {tuple(ROUNDINGS)}, got {rounding!r}")
    if rounding == "stochastic" and key is None:
        raise ValueError("rounding 'stochastic' needs a key, got None")
    if key is not None:
        check_key(key, device)
    check_indices(tensor, query)
    if rounding == "stochastic":
        check_groups(shape, "bits")


def check_sparse(p_zero: float, r_max: int) -> None:
    if not 0.0 <= p_zero < 1.0:
        raise ValueError(f"p_zero must be in [0, 1), got {p_zero}")
    if not 1 <= r_max <= LIMIT:
        raise ValueError(f"r_max must be in [1, {LIMIT}], got {r_max}")


def check_logits(logits: Any, exponent: Any, target: Any, fraction_bits: int) -> None:
    check_tensor("logits", logits, dtype=[torch.int8])
    if logits.ndim != 3 or logits.shape[2] == 0:
        raise ValueError(f"logits must have shape [H, B, C], C > 0, got {list(logits.shape)}")
    halves, batch, _ = logits.shape
    device = logits.device
    check_tensor("exponent", exponent, shape=[halves], dtype=[torch.int32], device=device)
    check_tensor("target", target, shape=[batch], dtype=[torch.int64], device=device)
    if batch > MAX_BATCH:
        raise ValueError(f"the batch may have at most 2^24 samples, got {batch}")
    if not 0 <= fraction_bits <= MAX_FRACTION_BITS:
        raise ValueError(f"fraction_bits must be in [0, {MAX_FRACTION_BITS}], got {fraction_bits}")


def check_target(target: Tensor, classes: int) -> None:
    """Labels can be looked at where that stops no device."""
    if target.numel() and not 0 <= int(target.min()) <= int(target.max()) < classes:
        bad = target[(target < 0) | (target >= classes)][0]
        raise ValueError(f"target must be in [0, {classes}), got {int(bad)}")
