"""`softmax(logits) - onehot(target)` as int8: the integer gradient of the cross-entropy.

Powers `y_j = 2^-d_j` are those of `integer_cross_entropy`; `error_j = y_j 2^23 / sum y`, truncated,
less 2^23 for the label, shifted right by 16 with rounding: a tensor of exponent -7, in [-127, 127].
NITI makes it from 2^p - 1 and a Taylor form for small exponents, with 11 bits before a stochastic
shift by 4; one form in fixed point serves all exponents, and the 23 bits let a stochastic rounding
keep small errors on average.

A program owns a block of rows. Traffic: the logits read three times from cache, the errors written.

NITI: Wang et al., arXiv:2009.13108 (error of the loss).
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.int8 import (
    ERROR_BITS,
    ERROR_EXPONENT,
    ROUNDINGS,
    check_logits,
    check_rounding,
)
from zo_kernels.registry import register, resolve_backend, twin
from zo_kernels.triton.int8_loss import largest, sum_of_powers, tile
from zo_kernels.triton.integer import STOCHASTIC, clip, exp2, round_shift, scaled
from zo_kernels.triton.philox import words
from zo_kernels.triton.shim import jit, tl, triton

WARPS = 4
INT32_MAX = 2**31 - 1
BITS = tl.constexpr(ERROR_BITS)
SHIFT = tl.constexpr(ERROR_BITS + ERROR_EXPONENT)
ONE = tl.constexpr(1 << ERROR_BITS)
EXPONENT = tl.constexpr(ERROR_EXPONENT)
PURPOSE = tl.constexpr(1 << 24)


@jit
def _tile_words(key_ptr, o_row, o_c, classes, tensor, query):
    """The rounding word of each element [BM, BN]: a call serves 4 columns, each makes its own."""
    o_row = o_row.to(tl.uint32)
    group = o_row * tl.cast((classes + 3) // 4, tl.uint32) + (o_c // 4).to(tl.uint32)
    third = PURPOSE + tl.cast(query, tl.uint32)
    w0, w1, w2, w3 = words(key_ptr, group, tensor, third)
    lane = o_c % 4
    low, high = tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3)
    return tl.where(lane < 2, low, high).to(tl.uint32)


@jit(do_not_specialize=["blocks", "tensor", "query"])
def _softmax_error_kernel(
    logits_ptr,
    exponent_ptr,
    target_ptr,
    key_ptr,
    out_ptr,
    total_ptr,
    blocks,
    batch,
    classes,
    tensor,
    query,
    ROUNDING: tl.constexpr,
    F: tl.constexpr,
    INT64: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    half = tl.program_id(0) // blocks
    exponent = tl.load(exponent_ptr + half)
    tl.store(total_ptr + half, EXPONENT)
    o_row = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_row = o_row < batch
    first = half
    if INT64:
        first = half.to(tl.int64)
    o_first = ((first * batch + o_row) * classes)[:, None]
    b_target = tl.load(target_ptr + o_row, mask=m_row, other=0)
    b_top = largest(logits_ptr + o_first, m_row, classes, BM, BN)
    b_sum = sum_of_powers(logits_ptr + o_first, m_row, b_top, exponent, classes, F, BM, BN)
    for c in range(0, classes, BN):
        o_c = (c + tl.arange(0, BN))[None, :]
        m_q = m_row[:, None] & (o_c < classes)
        b_q = tl.load(logits_ptr + o_first + o_c, mask=m_q, other=-128).to(tl.int32)
        b_y = exp2(scaled(b_top[:, None] - b_q, exponent, F), F).to(tl.int64)
        b_error = ((b_y << BITS) // b_sum[:, None]).to(tl.int32)
        b_error -= tl.where(o_c == b_target[:, None], ONE, 0)
        b_words = 0
        if ROUNDING == STOCHASTIC:
            b_words = _tile_words(key_ptr, o_row[:, None], o_c, classes, tensor, query)
        b_error = clip(round_shift(b_error, tl.cast(SHIFT, tl.uint32), b_words, ROUNDING))
        tl.store(out_ptr + o_first + o_c, b_error.to(tl.int8), mask=m_q)


def _launch_integer_softmax_error(
    logits: Tensor,
    exponent: Tensor,
    target: Tensor,
    fraction_bits: int,
    rounding: str,
    noise: tuple[Tensor | None, int, int],
) -> tuple[Tensor, Tensor]:
    halves, batch, classes = logits.shape
    key, tensor, query = noise
    out, total = _empty(logits)
    if logits.numel() == 0:
        return out, total.fill_(ERROR_EXPONENT)
    rows, cols = tile(classes, batch)
    blocks = triton.cdiv(batch, rows)
    _softmax_error_kernel[(halves * blocks,)](
        *(logits, exponent, target, exponent if key is None else key, out, total),
        *(blocks, batch, classes, tensor, query),
        ROUNDING=ROUNDINGS[rounding],
        F=fraction_bits,
        INT64=logits.numel() + (rows + 1) * classes + cols > INT32_MAX,
        BM=rows,
        BN=cols,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return out, total


def _implementation(
    logits: Tensor,
    exponent: Tensor,
    target: Tensor,
    fraction_bits: int,
    rounding: str,
    key: Tensor | None,
    tensor: int,
    query: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    backend = resolve_backend(backend, logits.device)
    where = (logits.contiguous(), exponent.contiguous(), target.contiguous())
    if backend == "triton":
        noise = (key, tensor, query)
        return _launch_integer_softmax_error(*where, fraction_bits, rounding, noise)
    named = {"rounding": rounding, "key": key, "tensor": tensor, "query": query}
    error: tuple[Tensor, Tensor] = twin("integer_softmax_error", backend)(
        *where, fraction_bits=fraction_bits, **named
    )
    return error


def _empty(logits: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(logits.shape, dtype=torch.int8, device=logits.device)
    return out, torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)


def _fake(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _empty(logits)


_OP = register(
    "integer_softmax_error(Tensor logits, Tensor exponent, Tensor target, int fraction_bits, "
    "str rounding, Tensor? key, int tensor, int query, str backend) -> (Tensor, Tensor)",
    _implementation,
    _fake,
)


def integer_softmax_error(
    logits: Tensor,
    exponent: Tensor,
    target: Tensor,
    *,
    fraction_bits: int = 12,
    rounding: str = "stochastic",
    key: Tensor | None = None,
    tensor: int = 0,
    query: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`softmax(logits) - onehot(target)`, int8 of exponent -7, for each half.

    Args:
        logits: `[H, B, C]` int8; B <= 2^24.
        exponent: `[H]` int32, clamped to [-24, 8] on the device.
        target: `[B]` int64 in [0, C). On the CPU a label outside is an error; on a GPU nothing is
            subtracted for it.
        fraction_bits: F in [0, 16], of the base-2 logits; as in `integer_cross_entropy`.
        rounding: "nearest", "pseudo" or "stochastic" (of noise of purpose "rounding").
        key: `[2]` int64, (seed, step); needed by "stochastic".
        tensor, query: place in the noise, whose rows are the batch: halves share it.
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[H, B, C]` int8 in [-127, 127], contiguous; `[H]` int32 exponents, all -7.
    Determinism: equal on all backends, for any launch.
    Source: NITI (arXiv:2009.13108), error of the loss, here without its Taylor form.
    """
    check_logits(logits, exponent, target, fraction_bits)
    check_rounding(rounding, key, logits.shape[1:], tensor, query, logits.device)
    args = (logits, exponent, target, fraction_bits, rounding, key, tensor, query, backend)
    error: tuple[Tensor, Tensor] = _OP(*args)
    return error


__all__ = ["integer_softmax_error"]
