"""Integer arithmetic in Python's integers, written from its contract alone."""

from __future__ import annotations

from decimal import Decimal, getcontext
from fractions import Fraction

getcontext().prec = 60
LN2 = Decimal(2).ln()
ROUNDINGS = ("nearest", "pseudo", "stochastic")
SCALE = Fraction(47274, 2**15)


def bits(largest: int) -> int:
    """How many bits magnitudes up to `largest` need: 2^k needs k, 2^k + 1 needs k + 1."""
    k = 0
    while 2**k < largest:
        k += 1
    return k


def rounds_up(dropped: int, s: int, rounding: str, word: int = 0) -> bool:
    """Whether the magnitude goes up for these s dropped bits."""
    if rounding == "nearest":
        return s > 0 and Fraction(dropped, 2**s) >= Fraction(1, 2)
    if rounding == "stochastic":
        return dropped > word % 2**s
    digits = format(dropped, f"0{s}b") if s else ""
    upper, lower = digits[: s - s // 2], digits[s - s // 2 :]
    return int(upper or "0", 2) > int((lower or "0") + "0" * (s % 2), 2)


def rounded(x: int, s: int, rounding: str, word: int = 0) -> int:
    """`x / 2^s`."""
    whole, dropped = divmod(abs(x), 2**s)
    magnitude = whole + rounds_up(dropped, s, rounding, word)
    return magnitude if x >= 0 else -magnitude


def clip(x: int) -> int:
    return max(-127, min(127, x))


def factor(k: int) -> int:
    """`2^-(2^-k)` in units of 2^-32."""
    return int((2**32 * (-LN2 / 2**k).exp()).to_integral_value())


def exp2(d: int, f: int) -> int:
    """`2^-(d / 2^f)` in units of 2^-30: a product for each bit of the fraction."""
    y = 2**30
    for k in range(1, f + 1):
        if d >> (f - k) & 1:
            y = y * factor(k) // 2**32
    return y // 2 ** min(d >> f, 31)


def log2(total: int) -> Decimal:
    """`log2(total / 2^30)`, to 50 digits."""
    return Decimal(total).ln() / LN2 - 30


def scaled(n: int, exponent: int, f: int) -> int:
    """`p` of a difference of logits with f fractional bits; halves up."""
    exact = SCALE * n * Fraction(2) ** (max(-24, min(8, exponent)) + f)
    return (2 * exact.numerator + exact.denominator) // (2 * exact.denominator)


__all__ = [
    "ROUNDINGS",
    "SCALE",
    "bits",
    "clip",
    "exp2",
    "factor",
    "log2",
    "rounded",
    "rounds_up",
    "scaled",
]
