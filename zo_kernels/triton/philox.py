"""The noise definition on the device: what every kernel that needs `z` calls.

`z` is a pure function of (seed, step, query, tensor, row, column): key = seed, counter words
c0 = element group, c1 = tensor, c2 = step, c3 = query + 2^24 * purpose, all uint32 (an int64
counter would silently select another generator, Philox4x64). A group lies inside one row and serves
4 columns (normal), 128 (rademacher) or 8 (sparse int8). Twin: `zo_kernels.reference.noise`.

Normals are Box-Muller on `((u >> 9) + 0.5) 2^-23`: sin and cos from the quadrant in the integer
bits and a polynomial, so no slow range reduction and no local memory; within 1.5e-6 of float64.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,attr-defined"

from __future__ import annotations

from zo_kernels.triton.shim import jit, tl

# Kinds of noise as kernels see them.
KIND = {"normal": 0, "rademacher": 1, "sparse_int8": 2, "bits": 3}
NORMAL = tl.constexpr(0)
RADEMACHER = tl.constexpr(1)
SPARSE = tl.constexpr(2)


@jit
def words(key_ptr, group, tensor, third):
    """Four Philox words for each group; `group` [N] uint32, `tensor` and `third` scalars."""
    seed = tl.load(key_ptr)
    step = tl.load(key_ptr + 1)
    c1 = tl.cast(tensor, tl.uint32)
    c2 = step.to(tl.uint32)
    c3 = tl.cast(third, tl.uint32)
    return tl.philox(seed, group.to(tl.uint32), c1, c2, c3)


@jit
def interleave4(a, b, c, d):
    """Lanes of 4 blocks [N] in a row: [4 N] = a0 b0 c0 d0 a1 ..."""
    lanes = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(lanes, [a.shape[0] * 4])


@jit
def radius(w):
    """`sqrt(-2 ln u)`: exponent apart, then log1p of the mantissa by a polynomial."""
    u = ((w >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    bits = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    exponent = (bits >> 23).to(tl.float32)
    m = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = m * 7.0376836292e-2 - 1.1514610310e-1
    p = p * m + 1.1676998740e-1
    p = p * m - 1.2420140846e-1
    p = p * m + 1.4249322787e-1
    p = p * m - 1.6668057665e-1
    p = p * m + 2.0000714765e-1
    p = p * m - 2.4999993993e-1
    p = p * m + 3.3333331174e-1
    m2 = m * m
    log = m2 * m * p - 0.5 * m2 + m
    return tl.sqrt(-2.0 * (exponent * 0.6931471805599453 + log))


@jit
def sincos_turns(w):
    """sin and cos of 2 pi u."""
    k = (w >> 9).to(tl.int32)
    quadrant = (k + (1 << 20)) >> 21
    r = ((k - (quadrant << 21)).to(tl.float32) + 0.5) * 7.490140565847157e-07
    r2 = r * r
    s = r2 * -1.9515295891e-4 + 8.3321608736e-3
    s = s * r2 - 1.6666654611e-1
    s = s * r2 * r + r
    c = r2 * 2.443315711809948e-5 - 1.388731625493765e-3
    c = c * r2 + 4.166664568298827e-2
    c = c * r2 * r2 - 0.5 * r2 + 1.0
    odd = (quadrant & 1) != 0
    # The sign goes in as a bit: sin is negative in quadrants 2, 3, cos in 1, 2.
    sin = tl.where(odd, c, s).to(tl.int32, bitcast=True) ^ ((quadrant & 2) << 30)
    cos = tl.where(odd, s, c).to(tl.int32, bitcast=True) ^ (((quadrant + 1) & 2) << 30)
    return sin.to(tl.float32, bitcast=True), cos.to(tl.float32, bitcast=True)


@jit
def normal(key_ptr, group, tensor, third):
    """Standard normals [4 N] fp32 of groups [N]."""
    w0, w1, w2, w3 = words(key_ptr, group, tensor, third)
    r0 = radius(w0)
    s0, c0 = sincos_turns(w1)
    r1 = radius(w2)
    s1, c1 = sincos_turns(w3)
    return interleave4(r0 * c0, r0 * s0, r1 * c1, r1 * s1)


@jit
def rademacher(key_ptr, group, tensor, third):
    """Signs +-1 [128 N] fp32 of groups [N]: bit 1 is +1."""
    w0, w1, w2, w3 = words(key_ptr, group, tensor, third)
    w = interleave4(w0, w1, w2, w3).to(tl.uint32, bitcast=True)
    bits = (w[:, None] >> tl.arange(0, 32).to(tl.uint32)[None, :]) & 1
    # 1.0 with the sign bit set where the bit is 0.
    signs = ((bits ^ 1) << 31) | 0x3F800000
    return tl.reshape(signs, [w.shape[0] * 32]).to(tl.float32, bitcast=True)


@jit
def sparse_int8(key_ptr, group, tensor, third, p0, r_max):
    """Integers in [-r_max, r_max] [8 N] int32 of groups [N]; zero below the threshold p0."""
    w0, w1, w2, w3 = words(key_ptr, group, tensor, third)
    w = interleave4(w0, w1, w2, w3)
    h = tl.reshape(tl.join(w & 0xFFFF, w >> 16), [w.shape[0] * 2]).to(tl.int32)
    # 65535 * 255 < 2^24; where h < p0 the quotient is not used.
    b_n = ((h - p0) * (2 * r_max + 1)).to(tl.uint32)
    value = (b_n // tl.cast(tl.maximum(65536 - p0, 1), tl.uint32)).to(tl.int32) - r_max
    return tl.where(h < p0, 0, value)


@jit
def float_noise(key_ptr, group, tensor, third, NOISE: tl.constexpr):
    """Normals or signs of groups [N], as the kernel was specialised."""
    if NOISE == NORMAL:
        return normal(key_ptr, group, tensor, third)
    else:
        return rademacher(key_ptr, group, tensor, third)
