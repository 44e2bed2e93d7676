"""The kernel of `int8_unpool` on the CPU: of a row of 16 errors two rows of 16 words of two bytes.

Words are written in the order of memory, whole vectors at a time: what one writes beyond its row
the next one writes again. Only the last rows go word by word.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,attr-defined,call-arg"

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from zo_kernels.cpu.compiled import njit

u8, u16 = np.uint8, np.uint16
WIDE = 16
WORD = ir.IntType(32)
OCTETS, WORDS = (ir.VectorType(ir.IntType(bits), WIDE) for bits in (8, 16))


@intrinsic
def _route(typing_context, error, places, at, out, to, row):
    """16 errors from `at` on to the words from `to` on: those whose place is in `row`."""

    def generate(context, builder, signature, args):
        def pointer(i, place, form):
            data = context.make_array(signature.args[i])(context, builder, args[i]).data
            return builder.bitcast(builder.gep(data, [place]), form.as_pointer())

        one, eight = ir.Constant(OCTETS, [1] * WIDE), ir.Constant(WORDS, [8] * WIDE)
        spots = builder.load(pointer(1, args[2], OCTETS), align=1)
        left = builder.zext(builder.load(pointer(0, args[2], OCTETS), align=1), WORDS)
        right = builder.icmp_unsigned("!=", builder.and_(spots, one), ir.Constant(OCTETS, None))
        words = builder.select(right, builder.shl(left, eight), left)
        first = builder.insert_element(ir.Constant(OCTETS, ir.Undefined), args[5], WORD(0))
        wanted = builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(WORD, WIDE), None))
        here = builder.icmp_unsigned("==", builder.lshr(spots, one), wanted)
        words = builder.select(here, words, ir.Constant(WORDS, None))
        builder.store(words, pointer(3, args[4], WORDS), align=2)
        return context.get_dummy_value()

    return types.void(error, places, types.int64, out, types.int64, types.uint8), generate


@njit(nogil=True, cache=True)
def unpool(error, places, rows, width, out):
    """Flat errors `[rows, width]` and places to words `[rows, 2, width]`."""
    for r in range(rows):
        for row in range(2):
            for w in range(0, width, WIDE):
                at, to = r * width + w, (2 * r + row) * width + w
                if to + WIDE <= out.shape[0] and at + WIDE <= error.shape[0]:
                    _route(error, places, at, out, to, u8(row))
                    continue
                for i in range(min(WIDE, width - w)):
                    place, value = places[at + i], u16(u8(error[at + i]))
                    shifted = u16(value << u16(8 * (place & 1)))
                    out[to + i] = shifted if place >> 1 == row else u16(0)
