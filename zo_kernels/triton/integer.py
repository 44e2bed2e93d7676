"""Integer arithmetic on the device: what every int8 kernel calls. No float, no 64-bit division.

Contract (twin: `zo_kernels.reference.integer`, equal bit for bit):

- `bits(m)` of a magnitude m is `bit_length(m - 1)`, 0 for m <= 1.
- A shift of x by s >= 0 acts on the magnitude m = |x|: `t = m >> s`, dropped bits
  `p = m & (2^s - 1)`; the result is `sign(x) (t + up)`, with up = 1 where
  - nearest: `2 p >= 2^s` (half away from zero; never for s = 0),
  - pseudo: with `h = s // 2`, `(p >> h) > ((p & (2^h - 1)) << (s % 2))`: the upper half of the
    dropped bits against the lower half, which is doubled where s is odd, as it is a bit shorter;
    for s = 1 there is no lower half, and the one dropped bit decides,
  - stochastic: `p > u`, u the s low bits of the element's word of noise.
- `exp2(d)` is `2^-d` in units of 2^-30, d >= 0 with F fractional bits: one product by a constant,
  truncated, for each bit of the fraction. `log2(S)` by bit length and repeated squaring, one bit of
  the result each. Neither is off by more than 2^-25 of its value.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

from zo_kernels.int8 import FACTORS, LOG2_E, LOG2_E_BITS, MAX_EXPONENT, MIN_EXPONENT
from zo_kernels.triton.philox import interleave4, words
from zo_kernels.triton.shim import jit, tl

NEAREST = tl.constexpr(0)
PSEUDO = tl.constexpr(1)
STOCHASTIC = tl.constexpr(2)
ROUNDING_PURPOSE = tl.constexpr(1 << 24)
SCALE = tl.constexpr(LOG2_E)
SCALE_BITS = tl.constexpr(LOG2_E_BITS)
LOWEST = tl.constexpr(MIN_EXPONENT)
HIGHEST = tl.constexpr(MAX_EXPONENT)
K1, K2, K3, K4, K5, K6, K7, K8 = (tl.constexpr(k) for k in FACTORS[:8])
K9, K10, K11, K12, K13, K14, K15, K16 = (tl.constexpr(k) for k in FACTORS[8:])


@jit
def bit_length(v):
    """Bits of `v >= 0`, a scalar or block of int32 or int64."""
    n = v * 0
    for k in tl.static_range(6):
        if v.dtype.primitive_bitwidth > (32 >> k):
            step = ((v >> (32 >> k)) > 0).to(v.dtype) << (5 - k)
            n += step
            v = v >> step
    return n + v


@jit
def magnitude_less_one(x):
    """`max(|x| - 1, 0)` of int32; no overflow at the smallest one."""
    return tl.where(x < 0, ~x, tl.maximum(x, 1) - 1)


@jit
def round_shift(x, s, b_words, ROUNDING: tl.constexpr):
    """`x / 2^s` [N] int32, rounded by the contract; `s` uint32 in [0, 31], `b_words` [N] uint32."""
    m = x.to(tl.uint32)
    m = tl.where(x < 0, 0 - m, m)
    t = m >> s
    p = m - (t << s)
    step = tl.cast(1, tl.uint32) << s
    if ROUNDING == NEAREST:
        up = 2 * p >= step
    elif ROUNDING == PSEUDO:
        h = s >> 1
        upper = p >> h
        lower = p - (upper << h)
        up = upper > (lower << (s & 1))
    else:
        up = p > (b_words & (step - 1))
    t = (t + up.to(tl.uint32)).to(tl.int32)
    return tl.where(x < 0, 0 - t, t)


@jit
def clip(x):
    return tl.minimum(tl.maximum(x, -127), 127)


@jit
def rounding_words(
    key_ptr, pid, cols, padded_cols, tensor, query, FOUR: tl.constexpr, N: tl.constexpr
):
    """Words [N] uint32 of block `pid`; FOUR: rows are padded to fours, not to eights."""
    o_group = pid * (N // 4) + tl.arange(0, N // 4)
    if not FOUR:
        per_row = padded_cols // 4
        o_group = (o_group // per_row) * ((cols + 3) // 4) + o_group % per_row
    third = ROUNDING_PURPOSE + tl.cast(query, tl.uint32)
    w0, w1, w2, w3 = words(key_ptr, o_group, tensor, third)
    return interleave4(w0, w1, w2, w3).to(tl.uint32)


@jit
def sparse_noise(key_ptr, group, tensor, third, p0, magic, shift, r_max):
    """Integers in [-r_max, r_max] [8 N] int32: `noise.sparse_int8`, its division a product.

    `p0`, `magic`, `shift`: of `_int8.sparse_constants`."""
    w0, w1, w2, w3 = words(key_ptr, group, tensor, third)
    w = interleave4(w0, w1, w2, w3).to(tl.uint32)
    h = tl.reshape(tl.join(w & 0xFFFF, w >> 16), [w.shape[0] * 2]).to(tl.int32)
    n = (tl.maximum(h - p0, 0) * (2 * r_max + 1)).to(tl.uint32)
    value = (tl.umulhi(n, tl.cast(magic, tl.uint32)) >> tl.cast(shift, tl.uint32)).to(tl.int32)
    return tl.where(h < p0, 0, value - r_max)


@jit
def scaled(n, exponent, F: tl.constexpr):
    """`LOG2_E n 2^exponent / 2^15` with F fractional bits, int64, halves up; n int32 >= 0."""
    exponent = tl.minimum(tl.maximum(exponent, LOWEST), HIGHEST)
    shift = exponent + (F - SCALE_BITS)
    left = tl.maximum(shift, 0).to(tl.int64)
    right = tl.maximum(0 - shift, 0).to(tl.int64)
    half = (tl.cast(1, tl.int64) << right) >> 1
    return (((n * SCALE).to(tl.int64) << left) + half) >> right


@jit
def _factor(y, f, AT: tl.constexpr, K: tl.constexpr):
    """`y * K / 2^32` where bit AT of `f` is set; nothing for AT < 0."""
    if AT >= 0:
        return tl.where(((f >> AT) & 1) != 0, tl.umulhi(y, tl.full(y.shape, K, tl.uint32)), y)
    else:
        return y


@jit
def exp2(d, F: tl.constexpr):
    """`2^-d` in units of 2^-30, uint32; d >= 0 int64 with F fractional bits."""
    whole = tl.minimum(d >> F, 31).to(tl.uint32)
    f = (d & ((1 << F) - 1)).to(tl.uint32)
    y = tl.full(d.shape, 1 << 30, tl.uint32)
    y = _factor(y, f, F - 1, K1)
    y = _factor(y, f, F - 2, K2)
    y = _factor(y, f, F - 3, K3)
    y = _factor(y, f, F - 4, K4)
    y = _factor(y, f, F - 5, K5)
    y = _factor(y, f, F - 6, K6)
    y = _factor(y, f, F - 7, K7)
    y = _factor(y, f, F - 8, K8)
    y = _factor(y, f, F - 9, K9)
    y = _factor(y, f, F - 10, K10)
    y = _factor(y, f, F - 11, K11)
    y = _factor(y, f, F - 12, K12)
    y = _factor(y, f, F - 13, K13)
    y = _factor(y, f, F - 14, K14)
    y = _factor(y, f, F - 15, K15)
    y = _factor(y, f, F - 16, K16)
    return y >> whole


@jit
def log2(total, F: tl.constexpr):
    """`log2(total / 2^30)` with F fractional bits, int64, halves up; total >= 2^30, int64."""
    n = bit_length(total)
    m = (total >> (n - 31)).to(tl.uint32)  # in [2^30, 2^31)
    result = n - 31
    for _ in tl.static_range(F + 1):
        twice = m << 1
        m = tl.umulhi(twice, twice)  # m^2 / 2^30
        bit = m >> 31
        m = m >> bit
        result = (result << 1) + bit.to(tl.int64)
    return (result + 1) >> 1
