"""Noise in the shape in which a product needs it: a tile [rows, columns] of a weight, in registers.

The noise is that of `triton.philox`, times an amplitude. Normals: lanes joined and reshaped, so
that a thread holds the 4 columns of a call (four products instead would triple the shared memory).
Signs: a call serves 128 columns; its words are computed once a row, by one thread or two, and
spread through shared memory; then a sign costs two instructions.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

from zo_kernels.triton.philox import NORMAL, normal, radius, sincos_turns, words
from zo_kernels.triton.shim import jit, tl


@jit
def _normal_tile(key_ptr, group, tensor, third):
    """Standard normals [N, 4 G] of groups [N, G]."""
    w0, w1, w2, w3 = words(key_ptr, group, tensor, third)
    r0 = radius(w0)
    s0, c0 = sincos_turns(w1)
    r1 = radius(w2)
    s1, c1 = sincos_turns(w3)
    lanes = tl.join(tl.join(r0 * c0, r1 * c1), tl.join(r0 * s0, r1 * s1))
    return tl.reshape(lanes, [group.shape[0], group.shape[1] * 4])


@jit
def _sign_tile(key_ptr, group, tensor, third, part, amplitude, BK: tl.constexpr):
    """`+-amplitude` [N, BK]: columns `part * BK ...` of the 128 that groups [N] serve."""
    w0, w1, w2, w3 = words(key_ptr, group, tensor, third)
    if BK == 128:
        b_word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [group.shape[0], 4])
    elif BK == 64:
        b_word = tl.join(tl.where(part == 0, w0, w2), tl.where(part == 0, w1, w3))
    else:
        b_low, b_high = tl.where(part == 0, w0, w1), tl.where(part == 2, w2, w3)
        b_word = tl.where(part < 2, b_low, b_high)[:, None]
    # Bit 1 is +: the complement of the bit, moved to the place of the sign.
    o_shift = (31 - tl.arange(0, 32)).to(tl.uint32)
    b_sign = ((b_word ^ 0xFFFFFFFF)[:, :, None] << o_shift[None, None, :]) & 0x80000000
    b_bits = tl.reshape(b_sign, [group.shape[0], BK]) ^ amplitude.to(tl.uint32, bitcast=True)
    return b_bits.to(tl.float32, bitcast=True)


@jit
def shift_tile(
    key_ptr, o_row, k, cols, tensor, third, amplitude, NOISE: tl.constexpr, BK: tl.constexpr
):
    """`amplitude * z` [N, BK] of rows [N] and columns `k ...`."""
    o_row = o_row.to(tl.uint32)  # a group's number may need all 32 bits
    if NOISE == NORMAL:
        per_row = tl.cast((cols + 3) // 4, tl.uint32)
        o_group = (k // 4 + tl.arange(0, BK // 4)).to(tl.uint32)
        group = (o_row * per_row)[:, None] + o_group[None, :]
        return amplitude * _normal_tile(key_ptr, group, tensor, third)
    else:
        per_row = tl.cast((cols + 127) // 128, tl.uint32)
        group = o_row * per_row + tl.cast(k // 128, tl.uint32)
        part = tl.cast(k % 128 // BK, tl.int32)
        return _sign_tile(key_ptr, group, tensor, third, part, amplitude, BK)


@jit
def shift_vector(key_ptr, o_n, first, tensor, third, amplitude, NOISE: tl.constexpr):
    """`amplitude * z` [N] of elements `first ...` of a vector."""
    if NOISE == NORMAL:
        group = first // 4 + tl.arange(0, o_n.shape[0] // 4)
        return amplitude * normal(key_ptr, group, tensor, third)
    else:
        w0, w1, w2, w3 = words(key_ptr, o_n // 128, tensor, third)
        part = o_n // 32 % 4
        b_low, b_high = tl.where(part == 0, w0, w1), tl.where(part == 2, w2, w3)
        b_word = tl.where(part < 2, b_low, b_high)
        b_bit = (b_word >> (o_n % 32).to(tl.uint32)) & 1
        return tl.where(b_bit == 1, amplitude, -amplitude)
