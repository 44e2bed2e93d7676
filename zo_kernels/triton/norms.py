"""What the kernels of the stacked pair share: alignment, moments of the lanes of a tile."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

from math import gcd

from zo_kernels.triton.shim import jit, tl


def alignment(*extents: int) -> int:
    """The largest power of two, at most 16, that divides all: sizes are passed in units of it.

    Triton assumes of an integer that 16 divides it, or nothing: rows of 1000 or 14 x 14 elements
    would be read one by one.
    """
    return gcd(16, *extents)


def power_of_two(n: int) -> int:
    """The smallest one that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


@jit
def lane_moments(b_x, b_mean, b_m2, m_x, turn):
    """Every lane takes its `turn`-th value (from 1) into its mean and sum of squared deviations."""
    b_delta = tl.where(m_x, b_x - b_mean, 0.0)
    b_mean += b_delta * (1.0 / tl.cast(turn, tl.float32))
    b_m2 += b_delta * (b_x - b_mean)  # 0 where masked
    return b_mean, b_m2


@jit
def merge_moments(b_n, b_mean, b_m2, n, AXIS: tl.constexpr):
    """Mean and sum of squared deviations of `n` values, from those of groups of `b_n` (Chan)."""
    mean = tl.sum(b_n * b_mean, AXIS) / n
    b_dev = b_mean - tl.expand_dims(mean, AXIS)
    # What rounding left in the first sum is in the second.
    return mean + tl.sum(b_n * b_dev, AXIS) / n, tl.sum(b_m2 + b_n * b_dev * b_dev, AXIS)
