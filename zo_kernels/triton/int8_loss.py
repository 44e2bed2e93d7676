"""`zo_kernels.integer_cross_entropy`, its sign and its softmax error in Triton."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.int8 import BAD_LABEL, ERROR_BITS, ERROR_EXPONENT, ROUNDINGS
from zo_kernels.triton.integer import STOCHASTIC, clip, exp2, log2, round_shift, scaled
from zo_kernels.triton.philox import words
from zo_kernels.triton.shim import jit, tl, triton

TILE = 1024  # logits of a tile
MAX_COLS = 1024
MAX_ROWS = 64
WARPS = 4
INT32_MAX = 2**31 - 1
BAD = tl.constexpr(BAD_LABEL)
SIGN_BLOCK = 128
BITS = tl.constexpr(ERROR_BITS)
SHIFT = tl.constexpr(ERROR_BITS + ERROR_EXPONENT)
ONE = tl.constexpr(1 << ERROR_BITS)
EXPONENT = tl.constexpr(ERROR_EXPONENT)
PURPOSE = tl.constexpr(1 << 24)


@jit
def largest(p_q, m_row, classes, BM: tl.constexpr, BN: tl.constexpr):
    """The largest logit of each row [BM], int32; `p_q` [BM, 1] point to its first one."""
    b_top = tl.full([BM], -128, tl.int32)
    for c in range(0, classes, BN):
        o_c = (c + tl.arange(0, BN))[None, :]
        b_q = tl.load(p_q + o_c, mask=m_row[:, None] & (o_c < classes), other=-128)
        b_top = tl.maximum(b_top, tl.max(b_q.to(tl.int32), 1))
    return b_top


@jit
def sum_of_powers(
    p_q, m_row, b_top, exponent, classes, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """`sum_j 2^-d_j` of each row [BM] in units of 2^-30, int64; at least 1, of its largest."""
    b_sum = tl.zeros([BM], tl.int64)
    for c in range(0, classes, BN):
        o_c = (c + tl.arange(0, BN))[None, :]
        m_q = m_row[:, None] & (o_c < classes)
        b_q = tl.load(p_q + o_c, mask=m_q, other=-128).to(tl.int32)
        b_y = exp2(scaled(b_top[:, None] - b_q, exponent, F), F)
        b_sum += tl.sum(tl.where(m_q, b_y.to(tl.int64), 0), 1)
    return tl.maximum(b_sum, 1 << 30)  # rows that are not there


@jit(do_not_specialize=["blocks"])
def _cross_entropy_kernel(
    logits_ptr,
    exponent_ptr,
    target_ptr,
    losses_ptr,
    blocks,
    batch,
    classes,
    F: tl.constexpr,
    INT64: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    half = tl.program_id(0) // blocks
    exponent = tl.load(exponent_ptr + half)
    o_row = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    m_row = o_row < batch
    first = half
    if INT64:
        first = half.to(tl.int64)
    p_q = logits_ptr + ((first * batch + o_row) * classes)[:, None]
    b_target = tl.load(target_ptr + o_row, mask=m_row, other=0)
    m_known = m_row & (b_target >= 0) & (b_target < classes)
    b_top = largest(p_q, m_row, classes, BM, BN)
    b_sum = sum_of_powers(p_q, m_row, b_top, exponent, classes, F, BM, BN)
    b_q = tl.load(p_q + b_target[:, None], mask=m_known[:, None], other=-128).to(tl.int32)
    b_d = tl.sum(scaled(b_top[:, None] - b_q, exponent, F), 1)
    b_loss = tl.where(m_known, b_d + log2(b_sum, F), BAD)
    tl.atomic_add(losses_ptr + half, tl.sum(tl.where(m_row, b_loss, 0), 0))


def tile(classes: int, batch: int) -> tuple[int, int]:
    """Rows and columns of a tile of logits."""
    cols = min(triton.next_power_of_2(classes), MAX_COLS)
    return min(TILE // cols, MAX_ROWS, triton.next_power_of_2(batch)), cols


def integer_cross_entropy(
    logits: Tensor, exponent: Tensor, target: Tensor, *, fraction_bits: int = 12
) -> Tensor:
    logits, exponent, target = logits.contiguous(), exponent.contiguous(), target.contiguous()
    halves, batch, classes = logits.shape
    losses = torch.zeros(halves, dtype=torch.int64, device=logits.device)
    if logits.numel() == 0:
        return losses
    rows, cols = tile(classes, batch)
    blocks = triton.cdiv(batch, rows)
    _cross_entropy_kernel[(halves * blocks,)](
        *(logits, exponent, target, losses, blocks, batch, classes),
        F=fraction_bits,
        INT64=logits.numel() + (rows + 1) * classes + cols > INT32_MAX,
        BM=rows,
        BN=cols,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    return losses


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
) -> tuple[Tensor, Tensor]:
    logits, exponent, target = logits.contiguous(), exponent.contiguous(), target.contiguous()
    halves, batch, classes = logits.shape
    out, total = torch.empty_like(logits), torch.empty_like(exponent)
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


@jit(do_not_specialize=["queries"])
def _sign_kernel(losses_ptr, out_ptr, queries, BLOCK: tl.constexpr):
    o_q = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_q = o_q < queries
    b_plus = tl.load(losses_ptr + 2 * o_q, mask=m_q, other=0)
    b_minus = tl.load(losses_ptr + 2 * o_q + 1, mask=m_q, other=0)
    b_sign = (b_plus > b_minus).to(tl.int32) - (b_plus < b_minus).to(tl.int32)
    tl.store(out_ptr + o_q, b_sign, mask=m_q)


def integer_projected_sign(losses: Tensor) -> Tensor:
    signs = losses.new_empty(losses.shape[0] // 2, dtype=torch.int32)
    if signs.numel():
        grid = (triton.cdiv(signs.numel(), SIGN_BLOCK),)
        settings = {"BLOCK": SIGN_BLOCK, "num_warps": 1, "enable_fp_fusion": True}
        _sign_kernel[grid](losses, signs, signs.numel(), **settings)
    return signs
