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
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from zo_kernels.cpu.compiled import njit
from zo_kernels.cpu.memory import octets as octets_at
from zo_kernels.cpu.memory import spots as spots_at
from zo_kernels.cpu.memory import words as words_at

i8, i32, u8 = np.int8, np.int32, np.uint8
LANES = 16  # channels of a panel, of `zo_kernels.cpu.int8_pack`
SLACK = 64  # bytes that may be read, never used, beyond an image
ZERO = 128  # what a 0 becomes
WINDOWS, ALL = 1, 2  # maxima: of windows 2 x 2, of all positions
POINTS = 64  # positions whose sums stay in cache on the way to their maximum

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


def _vector(context, builder, signature, args, i):
    """A pointer to 16 words of the array `args[i]`, from its place `args[i + 1]` on."""
    array = context.make_array(signature.args[i])(context, builder, args[i])
    return builder.bitcast(builder.gep(array.data, [args[i + 1]]), WORDS.as_pointer())


@intrinsic
def _move(typing_context, x, at, out, out_at):
    """16 words of `x` to `out`."""

    def generate(context, builder, signature, args):
        words = builder.load(_vector(context, builder, signature, args, 0), align=4)
        builder.store(words, _vector(context, builder, signature, args, 2), align=4)
        return context.get_dummy_value()

    return types.void(x, types.int64, out, types.int64), generate


@intrinsic
def _finish(typing_context, x, count, relu, tops, n):
    """ReLU of `x` [count, 16] in place, where asked; `tops` [n .. n + 15] rise to `|x| - 1`."""

    def generate(context, builder, signature, args):
        data = context.make_array(x)(context, builder, args[0]).data
        p_top = _vector(context, builder, signature, args, 3)
        zero, one = ir.Constant(WORDS, [0] * LANES), ir.Constant(WORDS, [1] * LANES)
        top = cgutils.alloca_once_value(builder, builder.load(p_top, align=4))
        with cgutils.for_range(builder, args[1]) as loop:
            p_x = builder.gep(data, [builder.mul(loop.index, LONG(LANES))])
            p_x = builder.bitcast(p_x, WORDS.as_pointer())
            words = builder.load(p_x, align=4)
            rectified = builder.select(builder.icmp_signed("<", words, zero), zero, words)
            words = builder.select(args[2], rectified, words)
            builder.store(words, p_x, align=4)
            # ~x of a negative x, so that the smallest int32 is no trap
            negative = builder.icmp_signed("<", words, zero)
            less = builder.select(negative, builder.not_(words), builder.sub(words, one))
            best = builder.load(top)
            larger = builder.icmp_signed(">", less, best)
            builder.store(builder.select(larger, less, best), top)
        builder.store(builder.load(top), p_top, align=4)
        return context.get_dummy_value()

    return types.void(x, types.int64, types.boolean, tops, types.int64), generate


@intrinsic
def _maxima(typing_context, x, at, below, out, out_at, places):
    """The largest of a window: of 16 words of `x`, the 16 behind them, and those `below` both; and
    in `places` the first of the four that is as large."""

    def generate(context, builder, signature, args):
        p_x = builder.bitcast(_vector(context, builder, signature, args, 0), WORD.as_pointer())
        best = place = None
        distances = (LONG(0), LONG(LANES), args[2], builder.add(args[2], LONG(LANES)))
        for i, distance in enumerate(distances):
            p_words = builder.bitcast(builder.gep(p_x, [distance]), WORDS.as_pointer())
            words, here = builder.load(p_words, align=4), ir.Constant(WORDS, [i] * LANES)
            if best is None:
                best, place = words, here
                continue
            larger = builder.icmp_signed(">", words, best)
            best, place = builder.select(larger, words, best), builder.select(larger, here, place)
        builder.store(best, _vector(context, builder, signature, args, 3), align=4)
        p_places = builder.gep(
            context.make_array(places)(context, builder, args[5]).data, [args[4]]
        )
        p_places = builder.bitcast(p_places, ir.VectorType(BYTE, LANES).as_pointer())
        builder.store(builder.trunc(place, ir.VectorType(BYTE, LANES)), p_places, align=1)
        return context.get_dummy_value()

    return types.void(x, types.int64, types.int64, out, types.int64, places), generate


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


@njit(inline="always")
def _fill(image, plain, x, at, size, strides, pad, padded_w):
    """`x + 128` of one image into the middle of a padded one, channels innermost; `plain` holds it
    while it is turned."""
    channels, height, width = size
    s_c, s_h, s_w = strides
    line = width * channels
    lined = (s_c == 1 or channels == 1) and (s_w == channels or width == 1)
    if not lined:
        for c in range(channels):
            if s_w > 0 and s_h == width * s_w:  # rows follow each other
                p = at + c * s_c
                channel = x[p : p + (height * width - 1) * s_w + 1 : s_w]
                to = plain[c : height * line : channels]
                for i in range(to.shape[0]):
                    to[i] = channel[i]
            else:
                for h in range(height):
                    for i in range(width):
                        plain[h * line + i * channels + c] = x[at + c * s_c + h * s_h + i * s_w]
    for h in range(height):
        p = at + h * s_h
        row = x[p : p + line] if lined else plain[h * line : (h + 1) * line]
        p = ((h + pad[0]) * padded_w + pad[1]) * channels
        to_row = image[p : p + line]
        for i in range(to_row.shape[0]):
            to_row[i] = u8(u8(row[i]) ^ u8(ZERO))


@njit(inline="always")
def _scatter(sums, height, width, out, at, channels, strides):
    """Sums `[height, width, 16]` to where they belong: `channels` of the 16."""
    s_n, s_h, s_w = strides
    if s_n == 1:
        for h in range(height):
            for i in range(width):
                p, place = at + h * s_h + i * s_w, (h * width + i) * LANES
                if channels == LANES:
                    _move(sums, place, out, p)
                else:
                    for n in range(channels):
                        out[p + n] = sums[place + n]
        return
    lines, wide = height, width
    if s_h == width * s_w:  # rows follow each other: one long row
        lines, wide = 1, height * width
    for n in range(channels):
        for h in range(lines):
            p = at + n * s_n + h * s_h
            row = sums[h * wide * LANES + n : (h + 1) * wide * LANES : LANES]
            if s_w == 1:
                to = out[p : p + wide]
                for i in range(to.shape[0]):
                    to[i] = row[i]
            else:
                for i in range(wide):
                    out[p + i * s_w] = row[i]


@njit(inline="always")
def _scatter_places(places, height, width, out, at, channels, strides):
    """Bytes `[height, width, 16]` to where they belong: `channels` of the 16."""
    s_n, s_h, s_w = strides
    lines, wide = height, width
    if s_h == width * s_w:  # rows follow each other: one long row
        lines, wide = 1, height * width
    for n in range(channels):
        for h in range(lines):
            p = at + n * s_n + h * s_h
            row = places[h * wide * LANES + n : (h + 1) * wide * LANES : LANES]
            if s_w == 1:
                to = out[p : p + wide]
                for i in range(to.shape[0]):
                    to[i] = row[i]
            else:
                for i in range(wide):
                    out[p + i * s_w] = row[i]


@njit(inline="always")
def _raise(best, values, count, begin):
    """The largest of `count` positions, lane by lane, into `best` [16]."""
    if begin:
        best[:] = values[:LANES]
    for i in range(count):
        for n in range(LANES):
            best[n] = max(best[n], values[i * LANES + n])


@njit(inline="always")
def _panel(image, steps, size, offsets, w, w_at, first, n, pool, scratch):
    """The sums of 16 channels of an image, pooled: `[positions, 16]`. `steps` are the places from
    row to row and from column to column."""
    (line, step), (height, width), (sums, pair, places) = steps, size, scratch
    chunk = POINTS if pool == ALL else width
    for h in range(height // 2 * 2 if pool == WINDOWS else height):
        for i in range(0, width, chunk):
            some, at = min(chunk, width - i), h * line + i * step
            to = (h % 2 * width if pool == WINDOWS else 0 if pool == ALL else h * width) * LANES
            _row(some, image, at, step, offsets, w, w_at, first, n, pair if pool else sums, to)
            if pool == ALL:
                _raise(sums, pair, some, h == 0 and i == 0)
        if pool == WINDOWS and h % 2 == 1:
            for i in range(width // 2):
                to = (h // 2 * (width // 2) + i) * LANES
                _maxima(pair, 2 * i * LANES, width * LANES, sums, to, places)


def scratch_sizes(
    size: tuple[int, ...], pad: tuple[int, int], grid: tuple[int, ...], pool: int
) -> tuple[int, ...]:
    """Elements of what `convolve` works in: the padded image (bytes), the image while it is turned
    (bytes), sums (words), sums before pooling (words), places of maxima (bytes)."""
    (channels, height, width), (high, wide) = size, grid[-2:]
    image = (height + 2 * pad[0]) * (width + 2 * pad[1]) * channels + SLACK
    positions = {0: high * wide, WINDOWS: (high // 2) * (wide // 2), ALL: 1}[pool]
    before = {0: 0, WINDOWS: 2 * wide, ALL: min(POINTS, wide)}[pool]
    places = positions * LANES if pool == WINDOWS else 0
    return image, channels * height * width, positions * LANES, before * LANES, places


@njit(inline="always")
def _deliver(found, positions, target, walk, channels, total):
    """The 16 sums from channel `n` on, of all halves' channels in a row, to where they belong."""
    (sums, places, n), (out, spots, keep) = found, target
    (high, broad), (at, s_half, s_n, s_h, s_w) = positions, walk
    end, c = min(n + LANES, total), n
    while c < end:
        half, channel = c // channels, c % channels
        some, lane = min(end - c, channels - channel), c - n
        to, strides = at + half * s_half + channel * s_n, (s_n, s_h, s_w)
        _scatter(sums[lane:], high, broad, out, to, some, strides)
        if keep:
            _scatter_places(places[lane:], high, broad, spots, to, some, strides)
        c += some


@njit(inline="always")
def bit_length(v):
    n = i32(0)
    while v > 0:
        n, v = i32(n + i32(1)), v >> 1
    return n


@njit(nogil=True, cache=True)
def convolve(
    places, x_walk, size, geometry, grid, panels, first, offsets, out_walk, after, span, room
):
    """A convolution by the weights of some halves; returns the bits of each.

    `places`: address and extent of the images (bytes), of the results (words), and of the places of
    their maxima (bytes, laid as the results; the extent is 0 where nobody wants them). `x_walk` and
    `out_walk`: strides of a half, an image, a channel, a row, a column. `size` = (channels, height,
    width) of an image, `geometry` = (stride, padding) as pairs, `grid` = (groups, halves of a
    group, channels, height, width) of the convolution before pooling: halves of a group read the
    same images. `panels` and `first` by `pack`, of all groups or one for them all; `offsets`
    [steps] of their steps in a padded image. `after` = (relu, pool); `span` = (first, end, images
    of a half, columns of them all): images of all groups in a row; the last one of a half may be
    narrower. `room` = `scratch_sizes` and as many bytes, words at the end.
    """
    (stride, pad), (relu, pool), (sizes, memory) = geometry, after, room
    x = carray(octets_at(places[0][0]), (places[0][1],))
    out = carray(words_at(places[1][0]), (places[1][1],))
    spots, keep = carray(spots_at(places[2][0]), (places[2][1],)), places[2][1] > 0
    groups, together, channels, height, width = grid
    padded_w = size[2] + 2 * pad[1]
    words = memory[memory.shape[0] - 4 * (sizes[2] + sizes[3]) :].view(np.int32)
    image, plain = memory[: sizes[0]], memory[sizes[0] : sizes[0] + sizes[1]].view(np.int8)
    corners = memory[sizes[0] + sizes[1] : sizes[0] + sizes[1] + sizes[4]]
    scratch = (words[: sizes[2]], words[sizes[2] :], corners)
    image[:] = ZERO
    steps = (stride[0] * padded_w * size[0], stride[1] * size[0])
    tops = np.zeros((groups, first.shape[1]), np.int32)
    for place in range(span[0], span[1]):
        group, b = place // span[2], place % span[2]
        left = span[3] - b * width
        wide = min(width, left)
        inside = (size[0], size[1], size[2] if left >= width else left)
        at = group * x_walk[0] + b * x_walk[1]
        _fill(image, plain, x, at, inside, x_walk[2:], pad, padded_w)
        high, broad = (height // 2, wide // 2) if pool == WINDOWS else (height, wide)
        if pool == ALL:
            high, broad = 1, 1
        at = group * together * out_walk[0] + b * out_walk[1]
        walk = (at, out_walk[0], out_walk[2], out_walk[3], out_walk[4])
        own = group if group < panels.shape[0] else 0
        w, begin = panels[own], first[own]
        for n in range(0, together * channels, LANES):
            w_at = n * offsets.shape[0] * 4
            _panel(image, steps, (height, wide), offsets, w, w_at, begin, n, pool, scratch)
            _finish(scratch[0], high * broad, relu, tops[group], n)
            found, to = (scratch[0], corners, n), (out, spots, keep)
            _deliver(found, (high, broad), to, walk, channels, together * channels)
    largest = np.zeros((groups, together), np.int32)
    for group in range(groups):
        for n in range(together * channels):
            half = n // channels
            largest[group, half] = max(largest[group, half], bit_length(tops[group, n]))
    return largest
