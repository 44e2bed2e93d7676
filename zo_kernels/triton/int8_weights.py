"""`zo_kernels.int8_perturbed_weights` and `int8_update_` in Triton."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.int8 import ROUNDINGS, sparse_constants, update_shift
from zo_kernels.layout import PER_CALL, empty_halves, groups_per_row, layout_of
from zo_kernels.triton import table as tables
from zo_kernels.triton.integer import STOCHASTIC, clip, round_shift, rounding_words, sparse_noise
from zo_kernels.triton.shim import jit, tl, triton
from zo_kernels.triton.table import FIELDS, row_offset, source_row
from zo_kernels.triton.weights import element_offset

BLOCK = 2048  # 16 elements a thread: accesses of 16 bytes, two Philox calls
WARPS = 4
UPDATE_WARPS = 2  # 16 elements a thread: accesses of 16 bytes, two Philox calls a query
INT32_MAX = 2**31 - 1
PER = PER_CALL["sparse_int8"]


@jit(do_not_specialize=["tensor", "first_query", "start", "stop", "p0", "magic", "shift", "r_max"])
def _int8_perturbed_weights_kernel(
    w_ptr,
    out_ptr,
    key_ptr,
    tensor,
    first_query,
    start,  # halves to write, counted from those of first_query
    stop,
    p0,
    magic,
    shift,
    r_max,
    elements,  # padded: groups * 8
    cols,
    padded_cols,
    inner,
    s_row,
    s_outer,
    s_inner,
    t_row,  # the same strides of one half of the output
    t_outer,
    t_inner,
    half_stride,
    QUERIES: tl.constexpr,
    PER: tl.constexpr,
    FLAT: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    o_e = pid * BLOCK + tl.arange(0, BLOCK)
    o_group = pid * (BLOCK // PER) + tl.arange(0, BLOCK // PER)
    if FLAT:
        o_w = o_e
        o_out = o_e
        m_e = o_e < elements
    else:
        o_row = o_e // padded_cols
        o_col = o_e % padded_cols
        m_e = (o_e < elements) & (o_col < cols)
        o_w = element_offset(o_row, o_col, inner, s_row, s_outer, s_inner)
        o_out = element_offset(o_row, o_col, inner, t_row, t_outer, t_inner)
    b_w = tl.load(w_ptr + o_w, mask=m_e, other=0).to(tl.int32)
    for q in tl.static_range(QUERIES):
        b_z = sparse_noise(key_ptr, o_group, tensor, first_query + q, p0, magic, shift, r_max)
        for minus in tl.static_range(2):
            half = 2 * q + minus
            if (half >= start) & (half < stop):
                b_half = b_w - b_z if minus else b_w + b_z
                # int64 also where INT64 is not set: the last half may begin beyond 2^31.
                p_out = out_ptr + (half - start).to(tl.int64) * half_stride + o_out
                tl.store(p_out, clip(b_half).to(tl.int8), mask=m_e)


def _launch(
    w: Tensor,
    out: Tensor,
    key: Tensor,
    tensor: int,
    start: int,
    stop: int,
    p_zero: float,
    r_max: int,
) -> None:
    """Launch over a weight whose layout, and whose halves' layout, a kernel can walk."""
    source, target = layout_of(w), layout_of(out[0])
    assert source is not None and target is not None
    per_row = groups_per_row(source.cols, "sparse_int8")
    padded = source.rows * per_row * PER
    flat = source.flat and target.flat and (source.cols % PER == 0 or source.rows == 1)
    first_query = start // 2
    half_stride = out.stride(0)
    last = max(padded, source.extent, half_stride * out.shape[0])
    _int8_perturbed_weights_kernel[(triton.cdiv(padded, BLOCK),)](
        *(w, out, key, tensor, first_query, start - 2 * first_query, stop - 2 * first_query),
        *(*sparse_constants(p_zero, r_max), r_max),
        *(w.numel() if flat else padded, source.cols, per_row * PER, source.inner),
        *(source.s_row, source.s_outer, source.s_inner),
        *(target.s_row, target.s_outer, target.s_inner, half_stride),
        QUERIES=(stop + 1) // 2 - first_query,
        PER=PER,
        FLAT=flat,
        INT64=last + BLOCK > INT32_MAX,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


def int8_perturbed_weights(
    w: Tensor,
    key: Tensor,
    *,
    tensor: int,
    start: int = 0,
    stop: int = 2,
    p_zero: float = 0.0,
    r_max: int = 1,
) -> Tensor:
    out = empty_halves(w, stop - start, None)
    if w.numel() == 0:
        return out
    if layout_of(w) is not None and layout_of(out[0]) is not None:
        _launch(w, out, key, tensor, start, stop, p_zero, r_max)
        return out
    # No kernel can walk these strides: work on contiguous copies.
    halves = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    _launch(w.contiguous(), halves, key, tensor, start, stop, p_zero, r_max)
    return out.copy_(halves)


@jit
def _sum_of_noise(
    g_ptr,
    key_ptr,
    queries,
    pid,
    tensor,
    p0,
    magic,
    shift,
    r_max,
    PER: tl.constexpr,
    N: tl.constexpr,
):
    """`sum_q g_q z_q` [N] int32 of a block."""
    o_group = pid * (N // PER) + tl.arange(0, N // PER)
    b_total = tl.zeros([N], dtype=tl.int32)
    for q in range(queries):
        b_z = sparse_noise(key_ptr, o_group, tensor, q, p0, magic, shift, r_max)
        b_total += tl.load(g_ptr + q) * b_z
    return b_total


@jit
def _shifted(
    b_total,
    s,
    key_ptr,
    pid,
    cols,
    padded_cols,
    tensor,
    FOUR: tl.constexpr,
    ROUNDING: tl.constexpr,
):
    """The sums [N], shifted right and rounded."""
    if ROUNDING == STOCHASTIC:
        N: tl.constexpr = b_total.shape[0]
        b_words = rounding_words(key_ptr, pid, cols, padded_cols, tensor, 0, FOUR, N)
        return round_shift(b_total, tl.cast(s, tl.uint32), b_words, ROUNDING)
    else:
        return round_shift(b_total, tl.cast(s, tl.uint32), 0, ROUNDING)


@jit(do_not_specialize=["queries", "p0", "magic", "shift", "r_max", "s"])
def _int8_update_kernel(
    table_ptr,  # [T, FIELDS] int64
    block_ptr,  # [programs] int32: the tensor of each program
    key_ptr,
    g_ptr,
    queries,
    p0,
    magic,
    shift,
    r_max,
    s,
    ROUNDING: tl.constexpr,
    PER: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.load(block_ptr + tl.program_id(0))
    p_row = table_ptr + t * FIELDS
    w_ptr = tl.load(p_row).to(tl.pointer_type(tl.int8))
    pid, elements, cols, padded_cols, _ = source_row(table_ptr, t, INT64)
    tensor = tl.load(p_row + 9)
    # fmt: off
    b_total = _sum_of_noise(g_ptr, key_ptr, queries, pid, tensor, p0, magic, shift, r_max,
                            PER, BLOCK)
    # fmt: on
    o_e = pid * BLOCK + tl.arange(0, BLOCK)
    if tl.load(p_row + 11) != 0:
        # 16-byte accesses: pointer and length of a flat tensor are multiples of 16. The product
        # says so of the length; Triton 3.6 does not believe `multiple_of` a loaded one.
        m_e = o_e < elements // 16 * 16
        p_w = tl.multiple_of(w_ptr, 16) + o_e
        b_shift = _shifted(b_total, s, key_ptr, pid, cols, padded_cols, tensor, True, ROUNDING)
        b_w = tl.load(p_w, mask=m_e, other=0).to(tl.int32)
        tl.store(p_w, clip(b_w - b_shift).to(tl.int8), mask=m_e)
    else:
        o_row = o_e // padded_cols
        o_col = o_e % padded_cols
        m_e = (o_e < elements) & (o_col < cols)
        p_w = w_ptr + row_offset(table_ptr, t, o_row, o_col, 6, INT64)
        b_shift = _shifted(b_total, s, key_ptr, pid, cols, padded_cols, tensor, False, ROUNDING)
        b_w = tl.load(p_w, mask=m_e, other=0).to(tl.int32)
        tl.store(p_w, clip(b_w - b_shift).to(tl.int8), mask=m_e)


def int8_update_(
    params: Sequence[Tensor],
    key: Tensor,
    g: Tensor,
    *,
    tensors: Sequence[int],
    p_zero: float = 0.0,
    r_max: int = 1,
    b_zo: int = 1,
    rounding: str = "nearest",
) -> None:
    """One launch for all weights; those that no kernel can walk in contiguous copies."""
    present = [i for i, w in enumerate(params) if w.numel()]
    if not present:
        return
    of = [params[i] for i in present]
    targets = [w if layout_of(w) is not None else w.contiguous() for w in of]
    zeros, ones = [0] * len(of), [1.0] * len(of)
    indices = [tensors[i] for i in present]
    table = tables.table_of(targets, indices, zeros, ones, "sparse_int8")
    _int8_update_kernel[(table.blocks.numel(),)](
        *(table.fields, table.blocks, key, g, g.numel()),
        *(*sparse_constants(p_zero, r_max), r_max, update_shift(g.numel(), r_max, b_zo)),
        ROUNDING=ROUNDINGS[rounding],
        PER=PER_CALL["sparse_int8"],
        INT64=table.int64,
        BLOCK=tables.BLOCK,
        num_warps=2 * UPDATE_WARPS if table.int64 else UPDATE_WARPS,  # 64-bit divisions would spill
        enable_fp_fusion=True,
    )
    for w, target in zip(of, targets, strict=True):
        if w is not target:
            w.copy_(target)
