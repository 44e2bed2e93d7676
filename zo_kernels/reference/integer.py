"""Integer arithmetic in plain torch int64: bits, roundings, fixed-point powers and logarithms.

Contract, for every backend, bit for bit:

- `bits(x) = bit_length(max|x| - 1)`, and 0 for a maximum of 0 or 1.
- A shift of x by s >= 0 acts on the magnitude m = |x|: `t = m >> s`, dropped bits
  `p = m & (2^s - 1)`; the result is `sign(x) (t + up)`, with up = 1 where
  - nearest: `2 p >= 2^s` (half away from zero; never for s = 0),
  - pseudo: with `h = s // 2`, `(p >> h) > ((p & (2^h - 1)) << (s % 2))`: the upper half of the
    dropped bits against the lower half, which is doubled where s is odd, as it is a bit shorter;
    for s = 1 there is no lower half, and the one dropped bit decides,
  - stochastic: `p > u`, u the s low bits of the element's word of noise.
- Results of a shift or a cast to int8 are clipped to [-127, 127].

Bias of a rounding: the mean of (magnitude of the result - m / 2^s) over all dropped bits, in units
of the result. Signed values lose it where both signs are as frequent.
  nearest and, for odd s, pseudo: `2^-(s + 1)` away from zero; pseudo for even s: toward zero by
  `(n - 1) / (2 n^2)`, n = 2^(s/2), which is 1/8, 3/32, 7/128 for s = 2, 4, 6; stochastic: 0.
Only nearest is monotone: pseudo rounds 2 of 4 up and 3 of 4 down.

NITI: Wang et al., arXiv:2009.13108.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zo_kernels.int8 import (
    FACTORS,
    LIMIT,
    LOG2_E,
    LOG2_E_BITS,
    MAX_EXPONENT,
    MIN_EXPONENT,
    ONE_BITS,
)
from zo_kernels.reference.noise import sample


def bit_length(v: Tensor) -> Tensor:
    """Bits of `v >= 0`, int64: 0 for 0, 1 for 1, 2 for 2 and 3, ..."""
    n = torch.zeros_like(v)
    for k in (32, 16, 8, 4, 2, 1):
        step = ((v >> k) > 0).to(torch.int64) * k
        n, v = n + step, v >> step
    return n + v


def round_shift(x: Tensor, s: Tensor | int, rounding: str, words: Tensor | None = None) -> Tensor:
    """`x / 2^s`, int64, rounded as the contract says; `words` in [0, 2^32) for "stochastic"."""
    s = torch.as_tensor(s, device=x.device)
    magnitude = x.abs()
    t = magnitude >> s
    p = magnitude - (t << s)
    step = torch.ones_like(s) << s
    if rounding == "nearest":
        up = 2 * p >= step
    elif rounding == "pseudo":
        h = s // 2
        upper = p >> h
        lower = p - (upper << h)
        up = upper > lower << (s % 2)
    else:
        assert words is not None
        up = p > (words & (step - 1))
    return x.sign() * (t + up)


def rounding_words(
    shape: Sequence[int],
    key: Tensor | None,
    rounding: str,
    tensor: int,
    query: int = 0,
    draw: Callable[..., Tensor] = sample,
) -> Tensor | None:
    """The words of a stochastic rounding, None for the others."""
    if rounding != "stochastic":
        return None
    assert key is not None
    return draw(shape, key, tensor=tensor, query=query, noise="bits", purpose="rounding")


def clip(x: Tensor) -> Tensor:
    return x.clamp(-LIMIT, LIMIT)


def scaled(n: Tensor, exponent: Tensor, fraction_bits: int) -> Tensor:
    """`LOG2_E n 2^exponent / 2^15` with F fractional bits, halves up; n >= 0."""
    shift = exponent.long().clamp(MIN_EXPONENT, MAX_EXPONENT) + (fraction_bits - LOG2_E_BITS)
    left, right = shift.clamp_min(0), (-shift).clamp_min(0)
    half = (torch.ones_like(right) << right) >> 1
    return ((n * LOG2_E << left) + half) >> right


def exp2(d: Tensor, fraction_bits: int) -> Tensor:
    """`2^-d` in units of 2^-30; d >= 0 with F fractional bits.

    One product, truncated, for each bit of the fraction: within 2^-25 of its value and a unit.
    """
    whole = (d >> fraction_bits).clamp_max(31)
    y = torch.full_like(d, 1 << ONE_BITS)
    for k in range(fraction_bits):
        bit = (d >> (fraction_bits - 1 - k)) & 1
        y = torch.where(bit == 1, (y * FACTORS[k]) >> 32, y)
    return y >> whole


def log2(total: Tensor, fraction_bits: int) -> Tensor:
    """`log2(total / 2^30)` with F fractional bits, halves up; total >= 2^30.

    The bit length is the whole part. Squaring the mantissa doubles its logarithm, whose next bit is
    1 where the square reaches 2.
    """
    n = bit_length(total)
    m = total >> (n - ONE_BITS - 1)  # in [2^30, 2^31)
    result = n - ONE_BITS - 1
    for _ in range(fraction_bits + 1):
        m = (m * m) >> ONE_BITS
        bit = m >> (ONE_BITS + 1)
        m = m >> bit
        result = 2 * result + bit
    return (result + 1) >> 1
