"""CPU kernels in numba: noise for LLVM's vectoriser, and the fused sweeps over a weight.

Polynomials and bit casts, no calls to libm: one loop body makes one Philox call and four lanes, and
LLVM widens it to the machine's vectors. The definition is that of `zo_kernels.reference.noise`;
normals stay within 1.5e-6 of float64.

The sweeps make noise in a buffer that stays in cache and use it from there at once. They walk a
weight of any `Layout` over a range of Philox groups, so that ranges can go to threads; a group
never crosses a row, and `lanes` is the number of columns it serves.

One file, because numba's cache looks at the time of the file a function stands in, not at those of
the functions it calls.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg"

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from zo_kernels.cpu.compiled import njit

f32, i32, u32, u64 = np.float32, np.int32, np.uint32, np.uint64

NORMAL, RADEMACHER = 0, 1
SPARSE, BITS = 0, 1
SQRT_HALF = i32(0x3F3504F3)  # bits of sqrt(1/2): mantissas are centred on 1
LN2 = f32(math.log(2.0))
TURN = f32(2.0 * math.pi * 2.0**-23)


@intrinsic
def _bits_of(typing_context, x):
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def _float_of(typing_context, x):
    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), generate


@njit(inline="always")
def philox(c0, c1, c2, c3, k0, k1):
    for _ in range(10):
        p0 = u64(u32(0xD2511F53)) * u64(c0)
        p1 = u64(u32(0xCD9E8D57)) * u64(c2)
        c0, c1, c2, c3 = (
            u32(u32(p1 >> u64(32)) ^ c1 ^ k0),
            u32(p1),
            u32(u32(p0 >> u64(32)) ^ c3 ^ k1),
            u32(p0),
        )
        k0 = u32(k0 + u32(0x9E3779B9))
        k1 = u32(k1 + u32(0xBB67AE85))
    return c0, c1, c2, c3


@njit(inline="always")
def radius(w):
    """`sqrt(-2 ln u)`: exponent apart, then log1p of the mantissa (Cephes' logf polynomial)."""
    u = (f32(i32(w >> u32(9))) + f32(0.5)) * f32(2.0**-23)
    bits = i32(_bits_of(u) - SQRT_HALF)
    exponent = i32(bits >> i32(23))
    m = _float_of(i32((bits & i32(0x7FFFFF)) + SQRT_HALF)) - f32(1.0)
    p = f32(7.0376836292e-2)
    p = p * m - f32(1.1514610310e-1)
    p = p * m + f32(1.1676998740e-1)
    p = p * m - f32(1.2420140846e-1)
    p = p * m + f32(1.4249322787e-1)
    p = p * m - f32(1.6668057665e-1)
    p = p * m + f32(2.0000714765e-1)
    p = p * m - f32(2.4999993993e-1)
    p = p * m + f32(3.3333331174e-1)
    m2 = m * m
    log = m2 * m * p - f32(0.5) * m2 + m
    return np.sqrt(f32(-2.0) * (f32(exponent) * LN2 + log))


@njit(inline="always")
def sincos_turns(w):
    """sin and cos of 2 pi u: the quadrant from integer bits, polynomials on [-pi/4, pi/4]."""
    k = i32(w >> u32(9))
    quadrant = i32((k + i32(1 << 20)) >> i32(21))
    r = (f32(i32(k - (quadrant << i32(21)))) + f32(0.5)) * TURN
    r2 = r * r
    s = f32(-1.9515295891e-4)
    s = s * r2 + f32(8.3321608736e-3)
    s = s * r2 - f32(1.6666654611e-1)
    s = s * r2 * r + r
    c = f32(2.443315711809948e-5)
    c = c * r2 - f32(1.388731625493765e-3)
    c = c * r2 + f32(4.166664568298827e-2)
    c = c * r2 * r2 - f32(0.5) * r2 + f32(1.0)
    odd = (quadrant & i32(1)) != 0
    sin, cos = (c, s) if odd else (s, c)
    sin = -sin if (quadrant & i32(2)) != 0 else sin
    cos = -cos if ((quadrant + i32(1)) & i32(2)) != 0 else cos
    return sin, cos


@njit(nogil=True, fastmath={"contract"}, cache=True)
def fill_float(z, kind, group, count, c1, c2, c3, k0, k1):
    """Noise of `count` groups from `group` on: 4 normals or 128 signs a group."""
    c1, c2, c3, k0, k1 = u32(c1), u32(c2), u32(c3), u32(k0), u32(k1)
    if kind == NORMAL:
        for g in range(count):
            w0, w1, w2, w3 = philox(u32(group + g), c1, c2, c3, k0, k1)
            r0 = radius(w0)
            s0, x0 = sincos_turns(w1)
            r1 = radius(w2)
            s1, x1 = sincos_turns(w3)
            z[4 * g] = r0 * x0
            z[4 * g + 1] = r0 * s0
            z[4 * g + 2] = r1 * x1
            z[4 * g + 3] = r1 * s1
    else:
        for g in range(count):
            words = philox(u32(group + g), c1, c2, c3, k0, k1)
            for word in range(4):
                w = words[word]
                for bit in range(32):
                    z[128 * g + 32 * word + bit] = f32(i32((w >> u32(bit)) & u32(1)) * 2 - 1)


@njit(nogil=True, cache=True)
def fill_int(z, kind, group, count, p0, r_max, c1, c2, c3, k0, k1):
    """Sparse integers (8 a group) or raw words (4 a group), into an int64 buffer."""
    c1, c2, c3, k0, k1 = u32(c1), u32(c2), u32(c3), u32(k0), u32(k1)
    for g in range(count):
        words = philox(u32(group + g), c1, c2, c3, k0, k1)
        for word in range(4):
            if kind == BITS:
                z[4 * g + word] = np.int64(words[word])
            else:
                for half in range(2):
                    h = np.int64((words[word] >> u32(16 * half)) & u32(0xFFFF))
                    value = (h - p0) * (2 * r_max + 1) // max(65536 - p0, 1) - r_max
                    z[8 * g + 2 * word + half] = 0 if h < p0 else value


CHUNK = 16384  # elements of noise in the buffer: 64 KiB, a small part of a core's L2


@njit(nogil=True, fastmath={"contract"}, cache=True)
def perturb_sweep(w, out, has_plus, has_minus, minus, amplitude, layout, noise, first, last):
    """`out[i] = w[i] + a z` and `out[minus + i] = w[i] - a z`, whichever halves are wanted.

    `w` and `out` are flat views of memory, `minus` the distance between the halves;
    layout = (cols, inner, s_row, s_outer, s_inner, first row: where `w` is a slice of rows, its
    first one); noise = (kind, lanes, counter words c1, c2, c3, the key's two words).
    """
    cols, inner, s_row, s_outer, s_inner, first_row = layout
    kind, lanes, w1, w2, w3, w4, w5 = noise
    c1, c2, c3 = np.uint32(w1), np.uint32(w2), np.uint32(w3)
    k0, k1 = np.uint32(w4), np.uint32(w5)
    per_row = (cols + lanes - 1) // lanes
    z = np.empty(CHUNK, np.float32)
    step = CHUNK // lanes
    for g0 in range(first, last, step):
        end = min(g0 + step, last)
        fill_float(z, kind, g0, end - g0, c1, c2, c3, k0, k1)
        g = g0
        while g < end:
            row = g // per_row
            g_end = min((row + 1) * per_row, end)
            col = (g - row * per_row) * lanes
            stop = min(cols, (g_end - row * per_row) * lanes)
            at = (g - g0) * lanes
            while col < stop:  # runs along the innermost dimension
                run = min(inner - col % inner, stop - col)
                base = (
                    (row - first_row) * s_row + (col // inner) * s_outer + (col % inner) * s_inner
                )
                if s_inner == 1:
                    # Slices, indexed from 0: no wrap-around checks, so the loops vectorise.
                    w_run, z_run = w[base : base + run], z[at : at + run]
                    if has_plus:
                        plus_run = out[base : base + run]
                        for i in range(run):
                            plus_run[i] = w_run[i] + amplitude * z_run[i]
                    if has_minus:
                        minus_run = out[minus + base : minus + base + run]
                        for i in range(run):
                            minus_run[i] = w_run[i] - amplitude * z_run[i]
                else:
                    for i in range(run):
                        p = base + i * s_inner
                        if has_plus:
                            out[p] = w[p] + amplitude * z[at + i]
                        if has_minus:
                            out[minus + p] = w[p] - amplitude * z[at + i]
                col += run
                at += run
            g = g_end


@njit(nogil=True, fastmath={"contract"}, cache=True)
def update_sweep(w, coeff, scale, lr, decay, layout, noise, first, last):
    """`w -= lr * (scale * sum_q coeff_q z_q + decay * w)`: one read and one write of `w`."""
    cols, inner, s_row, s_outer, s_inner, first_row = layout
    kind, lanes, w1, w2, w3, w4, w5 = noise
    c1, c2, c3 = np.uint32(w1), np.uint32(w2), np.uint32(w3)
    k0, k1 = np.uint32(w4), np.uint32(w5)
    per_row = (cols + lanes - 1) // lanes
    z = np.empty(CHUNK, np.float32)
    total = np.empty(CHUNK, np.float32)
    step = CHUNK // lanes
    queries = coeff.shape[0]
    for g0 in range(first, last, step):
        end = min(g0 + step, last)
        n = (end - g0) * lanes
        fill_float(total, kind, g0, end - g0, c1, c2, c3, k0, k1)
        weight = scale
        if queries == 1:
            weight = scale * coeff[0]
        else:
            c = coeff[0]
            for i in range(n):
                total[i] *= c
        for q in range(1, queries):
            fill_float(z, kind, g0, end - g0, c1, c2, np.uint32(c3 + np.uint32(q)), k0, k1)
            c = coeff[q]
            for i in range(n):
                total[i] += c * z[i]
        g = g0
        while g < end:
            row = g // per_row
            g_end = min((row + 1) * per_row, end)
            col = (g - row * per_row) * lanes
            stop = min(cols, (g_end - row * per_row) * lanes)
            at = (g - g0) * lanes
            while col < stop:
                run = min(inner - col % inner, stop - col)
                base = (
                    (row - first_row) * s_row + (col // inner) * s_outer + (col % inner) * s_inner
                )
                if s_inner == 1:
                    w_run, total_run = w[base : base + run], total[at : at + run]
                    for i in range(run):
                        x = w_run[i]
                        w_run[i] = x - lr * (weight * total_run[i] + decay * x)
                else:
                    for i in range(run):
                        p = base + i * s_inner
                        w[p] -= lr * (weight * total[at + i] + decay * w[p])
                col += run
                at += run
            g = g_end


@intrinsic
def _pointer_to(typing_context, address):
    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(address), generate


@njit(nogil=True, cache=True)
def update_all(table, scales, coeff, lr, decay, words):
    """`update_sweep` over many weights in one call: entering a compiled function from Python costs
    as much as a small layer's update.

    A row of `table` [T, 12] int64: address, extent, cols, inner, the three strides, kind, lanes,
    groups, tensor, parameter group. `words` = (c2, c3, k0, k1).
    """
    c2, c3, k0, k1 = words
    for t in range(table.shape[0]):
        row = table[t]
        w = carray(_pointer_to(row[0]), (row[1],), np.float32)
        layout = (row[2], row[3], row[4], row[5], row[6], 0)
        noise = (row[7], row[8], row[10], c2, c3, k0, k1)
        g = row[11]
        update_sweep(w, coeff, scales[t], lr[g], decay[g], layout, noise, 0, row[9])


@njit(nogil=True, cache=True)
def stage_all(table, scales, out, eps, start, stop, words):
    """`perturb_sweep` over many weights in one call; a row of `table` as in `update_all`, but the
    last field is the place of the weight's halves in `out`, which lie one behind the other."""
    c2, c3, k0, k1 = words
    for t in range(table.shape[0]):
        row = table[t]
        size = row[1]
        w = carray(_pointer_to(row[0]), (size,), np.float32)
        layout = (row[2], row[3], row[4], row[5], row[6], 0)
        amplitude = eps * scales[t]
        for query in range(start // 2, (stop + 1) // 2):
            plus, minus = 2 * query >= start, 2 * query + 1 < stop
            first = row[11]
            if plus:
                first += (2 * query - start) * size
            noise = (row[7], row[8], row[10], c2, c3 + query, k0, k1)
            distance = size if plus and minus else 0
            halves = out[first:]
            perturb_sweep(w, halves, plus, minus, distance, amplitude, layout, noise, 0, row[9])
