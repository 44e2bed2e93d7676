"""Dot products of int8 on the CPU in numba: one register block, and the convolution around it.

The block multiplies 1 to 8 neighbouring outputs by 16 channels: lanes of a vector are channels, a
step takes 4 bytes of the depth. Activations come as `x + 128`, unsigned, which is what the
machine's product of unsigned and signed bytes (vpdpbusd) needs; sums wrap, and begin at
`-128 sum(w)`, so that they end exact. Where the machine lacks it LLVM gets the same arithmetic in
plain vectors (vpmaddwd on x86, else what there is).

All functions stand in this file, and call none of another: see `zo_kernels.cpu.kernels`.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg"

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

i8, i32, u8 = np.int8, np.int32, np.uint8
LANES = 16  # channels of a panel
SLACK = 64  # bytes that may be read, never used, beyond an image
ZERO = 128  # what a 0 becomes

BYTE, WORD, LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
WORDS = ir.VectorType(WORD, LANES)


def _every_second(builder, v, first):
    chosen = list(range(first, v.type.count, 2))
    which = ir.Constant(ir.VectorType(WORD, len(chosen)), chosen)
    return builder.shuffle_vector(v, ir.Constant(v.type, ir.Undefined), which)


def _dot4(context, builder, acc, unsigned, signed):
    """`acc[i] += sum_j unsigned[4 i + j] * signed[4 i + j]`, 16 words."""
    if "+avx512vnni" in context.codegen().magic_tuple()[2]:
        form = ir.FunctionType(WORDS, [WORDS] * 3)
        name = "llvm.x86.avx512.vpdpbusd.512"
        call = cgutils.get_or_insert_function(builder.module, form, name)
        return builder.call(call, [acc, unsigned, signed])
    octets, wide = ir.VectorType(BYTE, 4 * LANES), ir.VectorType(WORD, 4 * LANES)
    left = builder.zext(builder.bitcast(unsigned, octets), wide)
    total = builder.mul(left, builder.sext(builder.bitcast(signed, octets), wide))
    for _ in range(2):
        total = builder.add(_every_second(builder, total, 0), _every_second(builder, total, 1))
    return builder.add(acc, total)


@intrinsic(prefer_literal=True)
def _block(typing_context, rows, x, at, step, offsets, w, w_at, first, first_at, out, out_at):
    """`out[16 r + n] = first[n] + sum_q sum_j x[r step + offsets[q] + j] w[64 q + 4 n + j]`, each
    array from its place `at` on; `rows` is a literal."""
    if not isinstance(rows, types.IntegerLiteral):
        return None
    places = (at, step, w_at, first_at, out_at)
    at, step, w_at, first_at, out_at = (types.int64 for _ in places)

    def generate(context, builder, signature, args):
        def array(i):
            return context.make_array(signature.args[i])(context, builder, args[i])

        vector, word = WORDS.as_pointer(), WORD.as_pointer()
        undefined, same = ir.Constant(WORDS, ir.Undefined), ir.Constant(WORDS, [0] * LANES)
        p_x = builder.gep(array(1).data, [args[2]])
        p_w = builder.gep(array(5).data, [args[6]])
        p_first = builder.bitcast(builder.gep(array(7).data, [args[8]]), vector)
        start = builder.load(p_first, align=4)
        count = builder.extract_value(array(4).shape, 0)
        sums = [cgutils.alloca_once_value(builder, start) for _ in range(rows.literal_value)]
        with cgutils.for_range(builder, count) as loop:
            offset = builder.load(builder.gep(array(4).data, [loop.index]))
            p_row = builder.gep(p_x, [offset])
            p_tile = builder.gep(p_w, [builder.mul(loop.index, LONG(4 * LANES))])
            b_w = builder.load(builder.bitcast(p_tile, vector), align=4)
            for r, total in enumerate(sums):
                p_here = builder.gep(p_row, [builder.mul(args[3], LONG(r))])
                four = builder.load(builder.bitcast(p_here, word), align=1)
                b_x = builder.insert_element(undefined, four, WORD(0))
                b_x = builder.shuffle_vector(b_x, undefined, same)
                builder.store(_dot4(context, builder, builder.load(total), b_x, b_w), total)
        p_out = builder.gep(array(9).data, [args[10]])
        for r, total in enumerate(sums):
            p_row = builder.bitcast(builder.gep(p_out, [LONG(LANES * r)]), vector)
            builder.store(builder.load(total), p_row, align=4)
        return context.get_dummy_value()

    arguments = (rows, x, at, step, offsets, w, w_at, first, first_at, out, out_at)
    return types.void(*arguments), generate


@njit(inline="always")
def _row(width, x, at, step, offsets, w, w_at, first, first_at, out, out_at):
    """`width` neighbouring outputs in blocks; the last may overlap the one before it."""
    done = 0
    while done < width:
        left = width - done
        size = 8 if left > 6 else 6 if left > 4 else 4 if left > 2 else left
        if size > width:
            size = 6 if left > 6 else 4 if left > 4 else 2
        done = min(done, width - size)
        x_at, to = at + done * step, out_at + done * LANES
        if size == 8:
            _block(8, x, x_at, step, offsets, w, w_at, first, first_at, out, to)
        elif size == 6:
            _block(6, x, x_at, step, offsets, w, w_at, first, first_at, out, to)
        elif size == 4:
            _block(4, x, x_at, step, offsets, w, w_at, first, first_at, out, to)
        elif size == 2:
            _block(2, x, x_at, step, offsets, w, w_at, first, first_at, out, to)
        else:
            _block(1, x, x_at, step, offsets, w, w_at, first, first_at, out, to)
        done += size


@njit(nogil=True, cache=True)
def pack(w, shape, panels, first):
    """Weights `[N, runs * length]` as panels of 16 channels: `[N / 16, steps, 16, 4]`, each run
    filled up to whole steps with zeros; and the sums `first` [16 (N / 16)] that undo the 128."""
    channels, runs, length = shape
    per_run = (length + 3) // 4
    steps = runs * per_run
    for n in range(channels):
        row = w[n * runs * length : (n + 1) * runs * length]
        total = i32(0)
        for k in range(row.shape[0]):
            total = i32(total + i32(row[k]))
        first[n] = i32(-ZERO * total)
        place = n // LANES * steps * 4 * LANES + n % LANES * 4
        if length % 4 == 0:
            words, to = row.view(np.int32), panels[place:].view(np.int32)
            for q in range(steps):
                to[q * LANES] = words[q]
        else:
            for run in range(runs):
                for j in range(length):
                    q = run * per_run + j // 4
                    panels[place + q * 4 * LANES + j % 4] = row[run * length + j]


@njit(inline="always")
def _fill(image, x, at, size, strides, pad, padded_w):
    """`x + 128` of one image into the middle of a padded one, channels innermost."""
    channels, height, width = size
    s_c, s_h, s_w = strides
    for h in range(height):
        to = ((h + pad[0]) * padded_w + pad[1]) * channels
        line = image[to : to + width * channels]
        if (s_c == 1 or channels == 1) and (s_w == channels or width == 1):
            row = x[at + h * s_h : at + h * s_h + width * channels]
            for j in range(line.shape[0]):
                line[j] = u8(u8(row[j]) ^ u8(ZERO))
        else:
            for c in range(channels):
                p = at + h * s_h + c * s_c
                for i in range(width):
                    line[i * channels + c] = u8(u8(x[p + i * s_w]) ^ u8(ZERO))


@njit(inline="always")
def _finish(rows, width, relu, pool):
    """Pool and rectify sums `[1 or 2, width, 16]` in place; returns how many are left, and their
    largest `|x| - 1`."""
    if pool:
        pairs = width // 2
        upper, lower = rows[: width * LANES], rows[width * LANES :]
        for i in range(pairs):
            for n in range(LANES):
                p = 2 * i * LANES + n
                left, right = max(upper[p], lower[p]), max(upper[p + LANES], lower[p + LANES])
                rows[i * LANES + n] = max(left, right)
        width = pairs
    values = rows[: width * LANES]
    largest = i32(0)
    if relu:
        for i in range(values.shape[0]):
            v = max(values[i], i32(0))
            values[i] = v
            largest = max(largest, v)
        largest = max(i32(largest - i32(1)), i32(0))
    else:
        for i in range(values.shape[0]):
            v = values[i]
            largest = max(largest, i32(~v) if v < 0 else i32(v - i32(v > 0)))
    return width, largest


@njit(inline="always")
def _scatter(rows, width, out, at, channels, s_n, s_w):
    if s_n == 1:
        for i in range(width):
            to, row = out[at + i * s_w : at + i * s_w + channels], rows[i * LANES :]
            for n in range(channels):
                to[n] = row[n]
    elif s_w == 1:
        for n in range(channels):
            to = out[at + n * s_n : at + n * s_n + width]
            for i in range(width):
                to[i] = rows[i * LANES + n]
    else:
        for n in range(channels):
            for i in range(width):
                out[at + n * s_n + i * s_w] = rows[i * LANES + n]


@njit(nogil=True, cache=True)
def convolve(x, x_walk, size, geometry, grid, panels, first, offsets, out, out_walk, after, span):
    """A convolution by the weights of some halves; returns the largest `|x| - 1` of each.

    `x`, `out`: flat views of memory. `x_walk`: place of the first image, the strides of a batch, a
    channel, a row, a column; `out_walk`: place, strides of a half, an image, a channel, a row, a
    column. `size` = (channels, height, width) of an image, `geometry` = (stride, padding) as pairs,
    `grid` = (channels, height, width) of the convolution before pooling. `panels` [halves, bytes]
    and `first` [halves, words] by `pack`, `offsets` [steps] of their steps in a padded image.
    `after` = (relu, pool); `span` = (first image, end, columns of all images): the last image may
    be narrower.
    """
    stride, pad = geometry
    channels, height, width = grid
    relu, pool = after
    lines = 2 if pool else 1
    padded_w = size[2] + 2 * pad[1]
    image = np.full((size[1] + 2 * pad[0]) * padded_w * size[0] + SLACK, ZERO, np.uint8)
    sums = np.empty(lines * width * LANES, np.int32)
    steps = offsets.shape[0]
    largest = np.zeros(panels.shape[0], np.int32)
    step, line = stride[1] * size[0], stride[0] * padded_w * size[0]
    for b in range(span[0], span[1]):
        left = span[2] - b * width
        wide = min(width, left)
        inside = (size[0], size[1], size[2] if left >= width else left)
        _fill(image, x, x_walk[0] + b * x_walk[1], inside, x_walk[2:], pad, padded_w)
        for half in range(panels.shape[0]):
            w, begin = panels[half], first[half]
            for panel in range((channels + LANES - 1) // LANES):
                n, w_at = panel * LANES, panel * steps * 4 * LANES
                some = min(LANES, channels - n)
                place = out_walk[0] + half * out_walk[1] + b * out_walk[2] + n * out_walk[3]
                for h in range(height // lines):
                    for i in range(lines):
                        to = i * wide * LANES
                        at = (h * lines + i) * line
                        _row(wide, image, at, step, offsets, w, w_at, begin, n, sums, to)
                    count, most = _finish(sums, wide, relu, pool)
                    largest[half] = max(largest[half], most)
                    _scatter(
                        sums, count, out, place + h * out_walk[4], some, out_walk[3], out_walk[5]
                    )
    return largest


__all__ = ["LANES", "convolve", "pack"]
