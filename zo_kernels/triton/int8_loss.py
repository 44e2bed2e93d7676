"""`log2 sum_j 2^p_j - p_y`, summed over the batch, in fixed point: no float takes part.

`p_j = 47274 q_j 2^e / 2^15` is the logit `q_j 2^e` times log2(e) = 1.44269 to five digits, so this
is the cross-entropy in bits. With `d_j = p_max - p_j` a sample's loss is `d_y + log2 sum_j 2^-d_j`;
`d`, the logarithm and the loss have F fractional bits, rounded to nearest, powers have 30. An error
of at most 1.5 units of 2^-F a sample: half a unit from `d_y`, from the other `d_j` and from the
logarithm. Powers and logarithms are integer products (`zo_kernels.triton.integer`), the same
everywhere; no table in memory.

A program owns a block of rows of one half; halves are summed by atomic additions of integers, whose
order does not show. Traffic: the logits, read twice, once from cache. Operations: F high products a
logit, F + 1 a sample.

ElasticZO-INT8 (arXiv:2501.04287), abstract: the ZO gradient from integer cross-entropy values.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.int8 import BAD_LABEL, check_logits
from zo_kernels.registry import register, resolve_backend, twin
from zo_kernels.triton.integer import exp2, log2, scaled
from zo_kernels.triton.shim import jit, tl, triton

TILE = 1024  # logits of a tile
MAX_COLS = 1024
MAX_ROWS = 64
WARPS = 4
INT32_MAX = 2**31 - 1
BAD = tl.constexpr(BAD_LABEL)


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


def _launch_integer_cross_entropy(
    logits: Tensor, exponent: Tensor, target: Tensor, fraction_bits: int
) -> Tensor:
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


def _implementation(
    logits: Tensor, exponent: Tensor, target: Tensor, fraction_bits: int, backend: str
) -> Tensor:
    backend = resolve_backend(backend, logits.device)
    where = (logits.contiguous(), exponent.contiguous(), target.contiguous())
    if backend == "triton":
        return _launch_integer_cross_entropy(*where, fraction_bits)
    losses: Tensor = twin("integer_cross_entropy", backend)(*where, fraction_bits=fraction_bits)
    return losses


def _fake(logits: Tensor, exponent: Tensor, target: Tensor, bits: int, backend: str) -> Tensor:
    return torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)


_OP = register(
    "integer_cross_entropy(Tensor logits, Tensor exponent, Tensor target, int fraction_bits, "
    "str backend) -> Tensor",
    _implementation,
    _fake,
)


def integer_cross_entropy(
    logits: Tensor,
    exponent: Tensor,
    target: Tensor,
    *,
    fraction_bits: int = 12,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of int8 logits in bits, summed over the batch, in units of 2^-F.

    `sum_b log2 sum_j 2^p_bj - p_by`, `p = 47274 q 2^e / 2^15`; within 1.5 units a sample.

    Args:
        logits: `[H, B, C]` int8, each half with its own exponent; B <= 2^24.
        exponent: `[H]` int32; on the device it is clamped to [-24, 8], which saturates: above,
            all but the largest logits vanish; below, all classes are alike.
        target: `[B]` int64 in [0, C). On the CPU a label outside is an error; a GPU cannot raise
            without waiting, and adds 2^38 for it to the losses of all halves alike.
        fraction_bits: F in [0, 16]; 0 is integers alone.
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[H]` int64 >= 0, below 2^58 (B = 0 gives 0).
    Determinism: equal on all backends, for any launch.
    Source: arXiv:2501.04287, abstract (ElasticZO-INT8); 47274 / 2^15 from NITI (arXiv:2009.13108).
    """
    check_logits(logits, exponent, target, fraction_bits)
    losses: Tensor = _OP(logits, exponent, target, fraction_bits, backend)
    return losses


__all__ = ["integer_cross_entropy", "largest", "sum_of_powers", "tile"]
