"""The weight gradient of an int8 convolution on the CPU: `sum over images of err * x`, in numba.

A convolution of each image by its errors, which play the weights: the depth are pixels, four
neighbours of a row a step, the outputs are the places of the kernel. Sums over images stay in one
buffer of the gradient's size; nothing of the size of patches is made.

The block of products comes from the file of the convolution: change it there, and remove numba's
cache of this file, which does not look at the files it calls.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg"

from __future__ import annotations

import numpy as np
from numba import carray
from numba.extending import intrinsic

from zo_kernels.cpu.compiled import njit
from zo_kernels.cpu.int8_dot import LANES, WORD, ZERO, _block, types
from zo_kernels.cpu.memory import octets

i32, u8 = np.int32, np.uint8


@intrinsic
def _word(typing_context, x, at):
    """Four bytes of `x` from its place `at` on."""

    def generate(context, builder, signature, args):
        data = context.make_array(x)(context, builder, args[0]).data
        p_x = builder.bitcast(builder.gep(data, [args[1]]), WORD.as_pointer())
        return builder.load(p_x, align=1)

    return types.int32(x, types.int64), generate


@njit(inline="always")
def _planes(image, x, at, size, strides, pad):
    """`x + 128` of one image into the middle of a padded one, columns innermost."""
    channels, height, width = size
    s_c, s_h, s_w = strides
    high, wide = height + 2 * pad[0], width + 2 * pad[1]
    for c in range(channels):
        for h in range(height):
            p, place = at + c * s_c + h * s_h, (c * high + h + pad[0]) * wide + pad[1]
            to = image[place : place + width]
            if s_w == 1:
                row = x[p : p + width]
                for i in range(width):
                    to[i] = u8(u8(row[i]) ^ u8(ZERO))
            else:
                for i in range(width):
                    to[i] = u8(u8(x[p + i * s_w]) ^ u8(ZERO))


@njit(inline="always")
def _pack_errors(panels, err, at, grid, strides):
    """The errors of an image as panels of 16 channels, `[N / 16, rows * steps, 16, 4]`."""
    channels, height, width = grid
    s_n, s_h, s_w = strides
    steps, words = (width + 3) // 4, panels.view(np.int32)
    last = i32(-1) if width % 4 == 0 else i32((1 << 8 * (width % 4)) - 1)  # of a row's last four
    for n in range(channels):
        for h in range(height):
            p = at + n * s_n + h * s_h
            to = ((n // LANES * height + h) * steps) * LANES + n % LANES
            if s_w == 1 and p + 4 * steps <= err.shape[0]:
                for q in range(steps - 1):
                    words[to + q * LANES] = _word(err, p + 4 * q)
                words[to + (steps - 1) * LANES] = _word(err, p + 4 * (steps - 1)) & last
            else:
                for i in range(width):
                    panels[4 * (to + i // 4 * LANES) + i % 4] = err[p + i * s_w]


@njit(inline="always")
def _outputs(count, x, at, step, offsets, w, w_at, zero, out):
    """`count` outputs `step` apart, each 16 sums, in blocks."""
    done = 0
    while done < count:
        left, x_at, to = count - done, at + done * step, done * LANES
        if left >= 8:
            _block(8, x, x_at, step, offsets, w, w_at, zero, 0, out, to)
            done += 8
        elif left >= 5:
            _block(5, x, x_at, step, offsets, w, w_at, zero, 0, out, to)
            done += 5
        elif left >= 3:
            _block(3, x, x_at, step, offsets, w, w_at, zero, 0, out, to)
            done += 3
        else:
            _block(1, x, x_at, step, offsets, w, w_at, zero, 0, out, to)
            done += 1


@njit(nogil=True, cache=True)
def correlate(
    places,
    x_walk,
    size,
    geometry,
    err_walk,
    grid,
    lines,
    offsets,
    sums,
    totals,
    line,
    panels,
    image,
    span,
):
    """Add the products of some images to `sums` [N / 16, lines, outputs, 16].

    `places`: address and extent of images and errors (bytes); `x_walk`, `err_walk`: strides of an
    image, a channel, a row, a column. `size` = (channels, height, width) of an image, `grid` that
    of its errors; `geometry` = (padding, step from output to output). `lines` [lines]: places in
    the padded image from which a line of outputs begins; `offsets` [steps] of the pixels of a
    step. `totals` [N]: the sums of the errors, with which the 128 in every `x` is undone. `line`
    (one line of sums), `panels` and `image` are room; `span` = (first image, end).
    """
    x = carray(octets(places[0][0]), (places[0][1],))
    err = carray(octets(places[1][0]), (places[1][1],))
    pad, step = geometry
    image[:] = ZERO
    panels[:] = 0
    zero, nowhere = np.zeros(LANES, np.int32), np.zeros(offsets.shape[0], np.int64)
    ones = np.ones(4, np.uint8)
    outputs = line.shape[0] // LANES
    for b in range(span[0], span[1]):
        _planes(image, x, b * x_walk[0], size, x_walk[1:], pad)
        _pack_errors(panels, err, b * err_walk[0], grid, err_walk[1:])
        for n in range(0, grid[0], LANES):
            w_at = n * offsets.shape[0] * 4
            _block(1, ones, 0, 0, nowhere, panels, w_at, totals, n, totals, n)
            for k in range(lines.shape[0]):
                _outputs(outputs, image, lines[k], step, offsets, panels, w_at, zero, line)
                p = (n // LANES * lines.shape[0] + k) * outputs * LANES
                to = sums[p : p + outputs * LANES]
                for i in range(to.shape[0]):
                    to[i] = i32(to[i] + line[i])


@njit(nogil=True, cache=True)
def collect(sums, totals, walk, out):
    """Add what `correlate` found to `out` [N, outputs of all lines]; `walk` = (lines, outputs, and
    how far a line and an output lie from the next one in `out`)."""
    lines, outputs, s_line, s_output = walk
    for n in range(out.shape[0]):
        excess = i32(ZERO * totals[n])
        for k in range(lines):
            p = ((n // LANES * lines + k) * outputs) * LANES + n % LANES
            for j in range(outputs):
                to = k * s_line + j * s_output
                out[n, to] = i32(out[n, to] + i32(sums[p + j * LANES] - excess))
