"""`y_h = x_h (w +- eps scale z_w)^T + (b +- eps bias_scale z_b)`: both halves from one read of `w`.

Half `2q` is `+`, half `2q + 1` is `-`, of query `q`. A program owns a tile `[BM, BN]` of both halves
of one query. For each tile `[BN, BK]` of `w` that it reads it makes `z` once, in registers, and the
operands of two products. Noise is that of `perturbed_weights`, sums of weights are made in fp32.

Cost of a tile of `w`: its bytes once, `BN BK` noise elements (about 50 instructions a normal, 10 a
sign: a Philox call serves 128 signs) and `4 BM BN BK` multiply-adds' operations for the pair. Each
block of BM rows reads `w` (from L2) and makes `z` anew. Floor of a call, for each query:
`N K` weights and `2 M (K + N)` activations moved (`M (K + 2 N)` where the halves share `x`),
`4 M N K` operations, `ceil(M / BM) N K` noise elements. So normals pay while the rows of a half fit
one or two blocks; signs cost less than the products they feed. Beyond that, stage the weights.

ElasticZO (arXiv:2501.04287), abstract: two forward passes at `w +- eps z`.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels._layout import check_groups
from zo_kernels._lib import (
    check_indices,
    check_key,
    check_noise,
    check_tensor,
    register,
    resolve_backend,
    twin,
)
from zo_kernels._triton import interpreted, jit, tl, triton
from zo_kernels.noise import KIND, NORMAL, interleave4, normal, radius, sincos_turns, words
from zo_kernels.perturbed_weights import INT32_MAX

DTYPES = (torch.float32, torch.bfloat16)
PRECISIONS = ("ieee", "tf32", "tf32x3")
GROUP = tl.constexpr(8)


@jit
def normal_tile(key_ptr, group, tensor, third):
    """Standard normals [N, 4 G] fp32 of groups [N, G]."""
    w0, w1, w2, w3 = words(key_ptr, group, tensor, third)
    r0 = radius(w0)
    s0, c0 = sincos_turns(w1)
    r1 = radius(w2)
    s1, c1 = sincos_turns(w3)
    lanes = tl.join(tl.join(r0 * c0, r1 * c1), tl.join(r0 * s0, r1 * s1))
    return tl.reshape(lanes, [group.shape[0], group.shape[1] * 4])


@jit
def sign_tile(key_ptr, group, tensor, third, part, amplitude, BK: tl.constexpr):
    """`+-amplitude` [N, BK] fp32: columns `part BK ...` of the 128 that groups [N] serve."""
    w0, w1, w2, w3 = words(key_ptr, group, tensor, third)
    if BK == 128:
        b_word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [group.shape[0], 4])
    elif BK == 64:
        b_word = tl.join(tl.where(part == 0, w0, w2), tl.where(part == 0, w1, w3))
    else:
        b_even = tl.where(part < 2, w0, w2)
        b_word = tl.where(part % 2 == 0, b_even, tl.where(part < 2, w1, w3))[:, None]
    # Bit 1 is +: the complement of the bit, moved to the place of the sign.
    o_shift = (31 - tl.arange(0, 32)).to(tl.uint32)
    b_sign = ((b_word ^ 0xFFFFFFFF)[:, :, None] << o_shift[None, None, :]) & 0x80000000
    b_bits = tl.reshape(b_sign, [group.shape[0], BK]) ^ amplitude.to(tl.uint32, bitcast=True)
    return b_bits.to(tl.float32, bitcast=True)


@jit
def _bias_noise(key_ptr, o_n, first, tensor, third, NOISE: tl.constexpr, BN: tl.constexpr):
    """Noise [BN] of a vector from element `first` on: one row of groups."""
    if NOISE == NORMAL:
        return normal(key_ptr, first // 4 + tl.arange(0, BN // 4), tensor, third)
    else:
        w0, w1, w2, w3 = words(key_ptr, o_n // 128, tensor, third)
        o_word = (o_n // 32) % 4
        b_word = tl.where(o_word < 2, tl.where(o_word == 0, w0, w1), tl.where(o_word == 2, w2, w3))
        return ((b_word >> (o_n % 32).to(tl.uint32)) & 1).to(tl.float32) * 2.0 - 1.0
