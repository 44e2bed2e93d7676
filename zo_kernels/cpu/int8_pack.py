"""Weights of int8 products, perturbed and packed row by row: no half of a layer is ever whole.

Noise comes from the file of the integer ops; it is a fixed definition, so a function cached here
cannot grow stale by it.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg"

from __future__ import annotations

import numpy as np
from numba import carray

from zo_kernels.cpu.compiled import njit
from zo_kernels.cpu.int8_kernels import fill_sparse
from zo_kernels.cpu.memory import octets

i8, i32, u64 = np.int8, np.int32, np.uint64
u8, u32 = np.uint8, np.uint32
LANES = 16  # channels of a panel
ZERO = 128  # what a 0 of the other operand becomes


@njit(inline="always")
def _clip(x):
    return i8(min(max(x, i32(-127)), i32(127)))


@njit(inline="always")
def _place(row, channel, runs, length, panels, first):
    """One channel's row into its panel, and the sum that undoes the 128."""
    per_run = (length + 3) // 4
    total = i32(0)
    for k in range(row.shape[0]):
        total = i32(total + i32(row[k]))
    first[channel] = i32(-ZERO * total)
    place = channel // LANES * runs * per_run * 4 * LANES + channel % LANES * 4
    if length % 4 == 0:
        words, to = row.view(np.int32), panels[place:].view(np.int32)
        for q in range(words.shape[0]):
            to[q * LANES] = words[q]
    else:
        for run in range(runs):
            for j in range(length):
                q = run * per_run + j // 4
                panels[place + q * 4 * LANES + j % 4] = row[run * length + j]


@njit(inline="always")
def _transposed(w, rows, cols, s_inner, panels, first):
    """Rows that are neighbours in memory: 16 of them at a time, four columns to a word."""
    steps = (cols + 3) // 4
    words = panels.view(np.uint32)
    for n in range(0, rows, LANES):
        some = min(LANES, rows - n)
        sums = first[n : n + some]
        for q in range(steps):
            p = (n // LANES * steps + q) * LANES
            to = words[p : p + some]
            for j in range(min(4, cols - 4 * q)):
                p = (4 * q + j) * s_inner + n
                column = w[p : p + some]
                for i in range(some):
                    to[i] |= u32(u32(u8(column[i])) << u32(8 * j))
                    sums[i] = i32(sums[i] - ZERO * i32(column[i]))


@njit(nogil=True, cache=True)
def pack(place, walk, shape, halves, settings, words, panels, first):
    """The rows of `clip(w +- z)` as panels of 16 channels, `[groups, C / 16, steps, 16, 4]`: each
    run of a row filled up to whole steps of 4 by the zeros that stand there.

    `place`: address and extent of the weight; `walk` = (cols, inner, s_row, s_outer, s_inner);
    `shape` = (rows, runs of neighbours, their length). `halves` = (start, stop, together): halves
    `start .. stop - 1`, as many of them channels side by side in a group as `together`; where it is
    0 the weight itself is packed, as one group. `settings` and `words` of the noise, of query 0.
    `first` [groups, channels, up to whole panels].
    """
    w = carray(octets(place[0]), (place[1],))
    cols, inner, s_row, s_outer, s_inner = walk
    (rows, runs, length), (start, stop, together) = shape, halves
    c1, c2, c3, k0, k1 = words
    per_row = (cols + 7) // 8
    own, row, z = np.empty(cols, np.int8), np.empty(cols, np.int8), np.empty(8 * per_row, np.int32)
    if together == 0 and s_row == 1 and inner == cols and s_inner > 1:
        _transposed(w, rows, cols, s_inner, panels[0], first[0])
        return
    for n in range(rows):
        for outer in range(0, cols, inner):
            p = n * s_row + outer // inner * s_outer
            if s_inner == 1:
                own[outer : outer + inner] = w[p : p + inner]
            else:
                for i in range(inner):
                    own[outer + i] = w[p + i * s_inner]
        if together == 0:
            _place(own, n, runs, length, panels[0], first[0])
            continue
        for half in range(start, stop):
            if half == start or half % 2 == 0:
                query = (c1, c2, u64(c3 + u64(half // 2)), k0, k1)
                fill_sparse(z, n * per_row, per_row, settings, query)
            if half % 2 == 0:
                for i in range(cols):
                    row[i] = _clip(i32(i32(own[i]) + z[i]))
            else:
                for i in range(cols):
                    row[i] = _clip(i32(i32(own[i]) - z[i]))
            group, channel = (half - start) // together, (half - start) % together * rows + n
            _place(row, channel, runs, length, panels[group], first[group])
