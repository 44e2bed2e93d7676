"""CPU kernels of the integer ops in numba; the contract is that of `zo_kernels.reference.integer`.

Loops over flat memory without branches, in the narrowest type that holds every value, so that LLVM
widens them to the machine's vectors. numba promotes int32 to int64: hence the casts.

Philox comes from the file of the float sweeps; it is a fixed definition, so a function cached here
cannot grow stale by it.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg"

from __future__ import annotations

import numpy as np
from numba import carray

from zo_kernels.cpu.compiled import njit
from zo_kernels.cpu.kernels import philox
from zo_kernels.cpu.memory import octets as octets_at
from zo_kernels.cpu.memory import words as words_at
from zo_kernels.int8 import (
    ERROR_BITS,
    ERROR_EXPONENT,
    FACTORS,
    LOG2_E,
    LOG2_E_BITS,
    MAX_EXPONENT,
    MIN_EXPONENT,
    ONE_BITS,
)

i8, i32, u32, u64 = np.int8, np.int32, np.uint32, np.uint64
NEAREST, PSEUDO, STOCHASTIC = 0, 1, 2
TABLE = np.array(FACTORS, np.uint64)
CHUNK = 8192  # elements of noise in the buffer


@njit(inline="always")
def bit_length(v):
    n = 0
    while v > 0:
        n += 1
        v >>= 1
    return n


@njit(nogil=True, cache=True)
def range_flat(acc):
    """Bits of the largest magnitude of a flat int32 array."""
    largest = i32(0)  # of |x| - 1: ~x for a negative x, so that the smallest int32 is no trap
    for i in range(acc.shape[0]):
        x = acc[i]
        v = i32(~x) if x < 0 else i32(x - (x > 0))
        largest = max(largest, v)
    return bit_length(largest)


@njit(inline="always")
def round_shift(x, s, word, rounding):
    """`x / 2^s` of an int32; `s` uint32 in [0, 31], `word` uint32."""
    negative = x < 0
    m = u32(u32(0) - u32(x)) if negative else u32(x)
    t = u32(m >> s)
    p = u32(m - u32(t << s))
    step = u32(u32(1) << s)
    if rounding == NEAREST:
        up = u32(u32(p << u32(1)) >= step)
    elif rounding == PSEUDO:
        h = u32(s >> u32(1))
        upper = u32(p >> h)
        lower = u32(u32(p - u32(upper << h)) << u32(s & u32(1)))
        up = u32(upper > lower)
    else:
        up = u32(p > u32(word & u32(step - u32(1))))
    t = u32(t + up)
    return i32(u32(0) - t) if negative else i32(t)


@njit(inline="always")
def clip(x):
    return min(max(x, i32(-127)), i32(127))


@njit(nogil=True, cache=True)
def _requantize(acc, out, s, rounding, words, floor):
    if rounding == NEAREST:
        for i in range(acc.shape[0]):
            out[i] = i8(max(clip(round_shift(acc[i], s, u32(0), NEAREST)), floor))
    elif rounding == PSEUDO:
        for i in range(acc.shape[0]):
            out[i] = i8(max(clip(round_shift(acc[i], s, u32(0), PSEUDO)), floor))
    else:
        for i in range(acc.shape[0]):
            out[i] = i8(max(clip(round_shift(acc[i], s, u32(words[i]), STOCHASTIC)), floor))


@njit(nogil=True, cache=True)
def requantize_flat(source, target, count, total, halves, exponents, rounding, words, floor):
    """`out = max(clip(acc / 2^s), floor)` of `count` sums in `halves` equal parts, all by address.

    `exponents` = (address, elements) of bits, exponent and the weight's exponent: each of the
    halves or one for all. `words` is read by the stochastic rounding only.
    """
    (bits_at, bits_n), (own_at, own_n), (added_at, added_n) = exponents
    bits, own = carray(words_at(bits_at), (bits_n,)), carray(words_at(own_at), (own_n,))
    added, totals = carray(words_at(added_at), (added_n,)), carray(words_at(total), (halves,))
    acc, out = carray(words_at(source), (count,)), carray(octets_at(target), (count,))
    size = count // halves
    for h in range(halves):
        s = min(max(bits[h % bits_n] - 7, 0), 31)
        totals[h] = i32(i32(s + own[h % own_n]) + added[h % added_n])
        part = slice(h * size, (h + 1) * size)
        _requantize(acc[part], out[part], u32(s), rounding, words, i32(floor))


@njit(nogil=True, cache=True)
def gradient_update(w, g, b_bp, rounding, words):
    """`w = clip(w - clip(g / 2^s))` over flat arrays, `s = bits of g - b_bp`."""
    s = u32(min(max(range_flat(g) - b_bp, 0), 31))
    if rounding == NEAREST:
        for i in range(w.shape[0]):
            w[i] = i8(clip(i32(i32(w[i]) - clip(round_shift(g[i], s, u32(0), NEAREST)))))
    elif rounding == PSEUDO:
        for i in range(w.shape[0]):
            w[i] = i8(clip(i32(i32(w[i]) - clip(round_shift(g[i], s, u32(0), PSEUDO)))))
    else:
        for i in range(w.shape[0]):
            step = clip(round_shift(g[i], s, u32(words[i]), STOCHASTIC))
            w[i] = i8(clip(i32(i32(w[i]) - step)))


@njit(inline="always")
def sparse(h, p0, width, magic, shift, r_max):
    """One 16-bit number of noise -> [-r_max, r_max], int32; the division is a product."""
    n = u32(i32(max(h - p0, i32(0))) * width)
    value = i32(i32(u32(u64(u64(n) * magic) >> u64(32)) >> shift) - r_max)
    return i32(0) if h < p0 else value


@njit(nogil=True, cache=True)
def fill_sparse(z, group, count, settings, words):
    """Sparse noise of `count` groups of 8 from `group` on, into an int32 buffer."""
    p0, magic, shift, r_max = settings
    c1, c2, c3, k0, k1 = words
    c1, c2, c3, k0, k1 = u32(c1), u32(c2), u32(c3), u32(k0), u32(k1)
    p0, magic, shift, r_max = i32(p0), u64(u32(magic)), u32(shift), i32(r_max)
    width = i32(2 * r_max + 1)
    for g in range(count):
        w0, w1, w2, w3 = philox(u32(group + g), c1, c2, c3, k0, k1)
        z[8 * g] = sparse(i32(w0 & u32(0xFFFF)), p0, width, magic, shift, r_max)
        z[8 * g + 1] = sparse(i32(w0 >> u32(16)), p0, width, magic, shift, r_max)
        z[8 * g + 2] = sparse(i32(w1 & u32(0xFFFF)), p0, width, magic, shift, r_max)
        z[8 * g + 3] = sparse(i32(w1 >> u32(16)), p0, width, magic, shift, r_max)
        z[8 * g + 4] = sparse(i32(w2 & u32(0xFFFF)), p0, width, magic, shift, r_max)
        z[8 * g + 5] = sparse(i32(w2 >> u32(16)), p0, width, magic, shift, r_max)
        z[8 * g + 6] = sparse(i32(w3 & u32(0xFFFF)), p0, width, magic, shift, r_max)
        z[8 * g + 7] = sparse(i32(w3 >> u32(16)), p0, width, magic, shift, r_max)


@njit(inline="always")
def _offset(row, col, layout):
    _, inner, s_row, s_outer, s_inner = layout
    return row * s_row + (col // inner) * s_outer + (col % inner) * s_inner


@njit(nogil=True, cache=True)
def shifted_run(w, base, s_w, out, base_out, s_out, z, at, run, sign):
    """`out = clip(w + sign * z)` over a run of elements; strides of 1 vectorise."""
    z = z[at : at + run]
    if s_w == 1 and s_out == 1:
        w, out = w[base : base + run], out[base_out : base_out + run]
        for i in range(run):
            out[i] = i8(clip(i32(i32(w[i]) + i32(sign * z[i]))))
    else:
        for i in range(run):
            x = i32(i32(w[base + i * s_w]) + i32(sign * z[i]))
            out[base_out + i * s_out] = i8(clip(x))


@njit(nogil=True, cache=True)
def perturb_int8(w, plus, minus, has_plus, has_minus, layout, to, groups, settings, words):
    """`plus = clip(w + z)`, `minus = clip(w - z)`, whichever are wanted, in one sweep.

    `w`, `plus` and `minus` are flat views of memory; `layout` and `to` = (cols, inner, s_row,
    s_outer, s_inner) of the weight and of a half.
    """
    cols, inner = layout[0], layout[1]
    per_row = (cols + 7) // 8
    z = np.empty(CHUNK, np.int32)
    for g0 in range(0, groups, CHUNK // 8):
        end = min(g0 + CHUNK // 8, groups)
        fill_sparse(z, g0, end - g0, settings, words)
        g = g0
        while g < end:  # a row, or what of it is in the buffer
            row = g // per_row
            g_end = min((row + 1) * per_row, end)
            col = (g - row * per_row) * 8
            stop = min(cols, (g_end - row * per_row) * 8)
            at = (g - g0) * 8
            while col < stop:  # runs along the innermost dimension
                run = min(inner - col % inner, stop - col)
                base, base_to = _offset(row, col, layout), _offset(row, col, to)
                if has_plus:
                    shifted_run(w, base, layout[4], plus, base_to, to[4], z, at, run, i32(1))
                if has_minus:
                    shifted_run(w, base, layout[4], minus, base_to, to[4], z, at, run, i32(-1))
                col += run
                at += run
            g = g_end


@njit(nogil=True, cache=True)
def round_run(total, first, count, s, rounding, group, words):
    """Round the sums of a row's run in place; `group` is that of its first rounding word."""
    c1, c2, _, k0, k1 = words
    s = u32(s)
    if rounding == STOCHASTIC:
        for i in range(0, count, 4):
            four = philox(u32(group + i // 4), u32(c1), u32(c2), u32(1 << 24), u32(k0), u32(k1))
            for k in range(4):
                j = first + i + k
                total[j] = round_shift(total[j], s, four[k], STOCHASTIC)
    else:
        run = total[first : first + count]
        if rounding == PSEUDO:
            for j in range(count):
                run[j] = round_shift(run[j], s, u32(0), PSEUDO)
        else:
            for j in range(count):
                run[j] = round_shift(run[j], s, u32(0), NEAREST)


@njit(nogil=True, cache=True)
def update_int8(w, g_q, s, rounding, layout, groups, settings, words):
    """`w = clip(w - shift(sum_q g_q z_q))` in one sweep; rounding words are those of query 0."""
    cols, inner = layout[0], layout[1]
    per_row = (cols + 7) // 8
    c1, c2, c3, k0, k1 = words
    z = np.empty(CHUNK, np.int32)
    total = np.empty(CHUNK, np.int32)
    for g0 in range(0, groups, CHUNK // 8):
        end = min(g0 + CHUNK // 8, groups)
        total[: (end - g0) * 8] = 0
        for q in range(g_q.shape[0]):
            c = g_q[q]
            if c != 0:
                fill_sparse(z, g0, end - g0, settings, (c1, c2, u64(c3 + u64(q)), k0, k1))
                for i in range((end - g0) * 8):
                    total[i] = i32(total[i] + i32(c * z[i]))
        g = g0
        while g < end:
            row = g // per_row
            g_end = min((row + 1) * per_row, end)
            col = (g - row * per_row) * 8
            stop = min(cols, (g_end - row * per_row) * 8)
            at = (g - g0) * 8
            first = row * ((cols + 3) // 4) + col // 4
            round_run(total, at, stop - col, s, rounding, first, words)
            while col < stop:
                run = min(inner - col % inner, stop - col)
                base = _offset(row, col, layout)
                shifted_run(w, base, layout[4], w, base, layout[4], total, at, run, i32(-1))
                col += run
                at += run
            g = g_end


@njit(inline="always")
def scaled(n, exponent, fraction_bits):
    exponent = min(max(exponent, MIN_EXPONENT), MAX_EXPONENT)
    shift = exponent + fraction_bits - LOG2_E_BITS
    n = np.int64(n) * LOG2_E
    if shift >= 0:
        return n << shift
    return (n + (1 << (-shift - 1))) >> -shift


@njit(inline="always")
def exp2(d, fraction_bits):
    y = u64(1 << ONE_BITS)
    for k in range(fraction_bits):
        if (d >> (fraction_bits - 1 - k)) & 1:
            y = u64(y * TABLE[k]) >> u64(32)
    return np.int64(y) >> min(d >> fraction_bits, 31)


@njit(inline="always")
def log2(total, fraction_bits):
    n = bit_length(total)
    m = total >> (n - ONE_BITS - 1)
    result = n - ONE_BITS - 1
    for _ in range(fraction_bits + 1):
        m = (m * m) >> ONE_BITS
        bit = m >> (ONE_BITS + 1)
        m >>= bit
        result = 2 * result + bit
    return (result + 1) >> 1


@njit(inline="always")
def _powers(q, y, exponent, fraction_bits):
    """Fill `y[j] = 2^-(p_max - p_j)`; returns the largest q and the sum."""
    top = q[0]
    for j in range(q.shape[0]):
        top = max(top, q[j])
    total = 0
    for j in range(q.shape[0]):
        y[j] = exp2(scaled(np.int64(top) - q[j], exponent, fraction_bits), fraction_bits)
        total += y[j]
    return np.int64(top), total


@njit(nogil=True, cache=True)
def cross_entropy(logits, exponent, target, fraction_bits, losses):
    y = np.empty(logits.shape[2], np.int64)
    for h in range(logits.shape[0]):
        loss = 0
        for b in range(logits.shape[1]):
            q = logits[h, b]
            top, total = _powers(q, y, exponent[h], fraction_bits)
            loss += scaled(top - q[target[b]], exponent[h], fraction_bits)
            loss += log2(total, fraction_bits)
        losses[h] = loss


@njit(nogil=True, cache=True)
def softmax_error(logits, exponent, target, fraction_bits, rounding, words, out):
    y = np.empty(logits.shape[2], np.int64)
    s = u32(ERROR_BITS + ERROR_EXPONENT)
    for h in range(logits.shape[0]):
        for b in range(logits.shape[1]):
            _, total = _powers(logits[h, b], y, exponent[h], fraction_bits)
            for j in range(y.shape[0]):
                error = (y[j] << ERROR_BITS) // total
                if j == target[b]:
                    error -= 1 << ERROR_BITS
                if rounding == NEAREST:
                    out[h, b, j] = i8(clip(round_shift(i32(error), s, u32(0), NEAREST)))
                elif rounding == PSEUDO:
                    out[h, b, j] = i8(clip(round_shift(i32(error), s, u32(0), PSEUDO)))
                else:
                    word = u32(words[b, j])
                    out[h, b, j] = i8(clip(round_shift(i32(error), s, word, STOCHASTIC)))
