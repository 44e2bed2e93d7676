"""The fused sweeps: noise made in a buffer that stays in cache, and used from there at once.

Both walk a weight of any `Layout` over a range of Philox groups, so that ranges can go to threads.
A group never crosses a row; `lanes` is the number of columns it serves.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import njit

from zo_kernels.cpu.noise import fill_float

CHUNK = 16384  # elements of noise in the buffer: 64 KiB, a small part of a core's L2


@njit(nogil=True, fastmath={"contract"}, cache=True)
def perturb_sweep(w, out, has_plus, has_minus, minus, amplitude, layout, noise, first, last):
    """`out[i] = w[i] + a z` and `out[minus + i] = w[i] - a z`, whichever halves are wanted.

    `w` and `out` are flat views of memory, `minus` the distance between the halves;
    layout = (cols, inner, s_row, s_outer, s_inner); noise = (kind, lanes, counter words c1, c2, c3, the key's two words).
    """
    cols, inner, s_row, s_outer, s_inner = layout
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
                base = row * s_row + (col // inner) * s_outer + (col % inner) * s_inner
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
    cols, inner, s_row, s_outer, s_inner = layout
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
                base = row * s_row + (col // inner) * s_outer + (col % inner) * s_inner
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


__all__ = ["perturb_sweep", "update_sweep"]
