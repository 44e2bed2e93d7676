"""`zo_kernels.stage_` in Triton."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.layout import PER_CALL, layout_of
from zo_kernels.rules import kept_of, write_back
from zo_kernels.triton import table as tables
from zo_kernels.triton.philox import KIND, float_noise
from zo_kernels.triton.shim import jit, tl
from zo_kernels.triton.table import FIELDS, flat_walk, row_offset, source_row
from zo_kernels.triton.update import TRITON_DTYPES, WARPS, updated


@jit
def _write_halves(
    b_w,
    p_out,
    m_e,
    half_stride,
    key_ptr,
    eps_ptr,
    scale,
    o_group,
    tensor,
    first_query,
    start,
    stop,
    QUERIES: tl.constexpr,
    WIDE: tl.constexpr,
    NOISE: tl.constexpr,
):
    amplitude = tl.load(eps_ptr).to(WIDE) * scale.to(WIDE)
    for q in tl.static_range(QUERIES):
        b_shift = amplitude * float_noise(key_ptr, o_group, tensor, first_query + q, NOISE).to(WIDE)
        for minus in tl.static_range(2):
            half = 2 * q + minus
            if (half >= start) & (half < stop):
                b_half = b_w - b_shift if minus else b_w + b_shift
                if p_out.dtype.element_ty.primitive_bitwidth == 16:
                    b_half = b_half.to(tl.float32)  # from fp64 by way of fp32, as torch casts
                p_half = p_out + (half - start).to(tl.int64) * half_stride
                tl.store(p_half, b_half.to(p_out.dtype.element_ty), mask=m_e)


@jit(do_not_specialize=["queries", "first_query", "start", "stop"])
def _stage_kernel(
    table_ptr,  # [T, FIELDS] int64
    scale_ptr,  # [T] fp64
    block_ptr,  # [programs] int32
    out_ptr,
    key_ptr,
    eps_ptr,
    before_ptr,  # what follows, to `queries`, is the pending update
    coeff_ptr,
    lr_ptr,
    decay_ptr,
    skip_ptr,
    kept_ptr,  # [T, KEPT] int64 and [weights, numbers] fp64, or None where the rule keeps nothing
    settings_ptr,
    queries,
    first_query,
    start,  # halves to write, counted from those of first_query
    stop,
    PENDING: tl.constexpr,
    ONE: tl.constexpr,  # tensor alone
    FLAT: tl.constexpr,
    QUERIES: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    NOISE: tl.constexpr,
    PER: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
    RULE: tl.constexpr,
    KEPT: tl.constexpr,
):
    t = 0 if ONE else tl.load(block_ptr + tl.program_id(0))
    p_row = table_ptr + t * FIELDS
    pid, elements, cols, padded_cols, first_row = source_row(table_ptr, t, INT64)
    tensor = tl.load(p_row + 9)
    offset = tl.load(p_row + 12)
    half_stride = tl.load(p_row + 16)
    scale = tl.load(scale_ptr + t)
    o_e = pid * BLOCK + tl.arange(0, BLOCK)
    if FLAT:  # 16-byte accesses: every address and length is a multiple of 16
        p_w, m_e = flat_walk(p_row, o_e, DTYPE, INT64)
        o_at = o_e
        p_out = out_ptr + tl.multiple_of(offset, 16) + o_e
        half_stride = tl.multiple_of(half_stride, 16)
    else:
        o_row, o_col = o_e // padded_cols, o_e % padded_cols
        m_e = (o_e < elements) & (o_col < cols)
        w_ptr = tl.load(p_row).to(tl.pointer_type(DTYPE))
        o_at = row_offset(table_ptr, t, o_row, o_col, 6, INT64)
        p_w = w_ptr + o_at
        p_out = out_ptr + offset + row_offset(table_ptr, t, o_row, o_col, 13, INT64)
    b_w = tl.load(p_w, mask=m_e, other=0.0)
    if PENDING:  # noqa: SIM102
        if tl.load(skip_ptr) == 0:
            group = tl.load(p_row + 10)
            lr, decay = tl.load(lr_ptr + group), tl.load(decay_ptr + group)
            p_kept = kept_ptr + t * KEPT if KEPT else kept_ptr
            # fmt: off
            b_w = updated(b_w.to(WIDE), before_ptr, coeff_ptr, queries, lr, decay, scale, pid,
                          tensor, cols, padded_cols, first_row, p_kept, settings_ptr, o_at, m_e,
                          DTYPE, WIDE, NOISE, PER, BLOCK, RULE, FLAT)
            # fmt: on
            tl.store(p_w, b_w, mask=m_e)
    o_group = pid * (BLOCK // PER) + tl.arange(0, BLOCK // PER) + first_row * (padded_cols // PER)
    # fmt: off
    _write_halves(b_w.to(WIDE), p_out, m_e, half_stride, key_ptr, eps_ptr, scale, o_group, tensor,
                  first_query, start, stop, QUERIES, WIDE, NOISE)
    # fmt: on


def _launch(
    outs: Sequence[Tensor],
    params: Sequence[Tensor],
    key: Tensor,
    eps: Tensor,
    tensors: Sequence[int],
    scales: Sequence[float],
    start: int,
    stop: int,
    first_row: int,
    noise: str,
    pending: tuple[Tensor, ...] | None,
    groups: Sequence[int],
    rule: str,
    kept: Sequence[tuple[int, ...]],
    settings: Tensor | None,
) -> None:
    """One launch: weights of one dtype that a kernel can walk, halves in one memory."""
    table = tables.table_of(params, tensors, groups, scales, noise, outs, first_row, kept)
    before, coeff, lr, decay, skip = pending or (key, eps, eps, eps, eps)
    first_query = start // 2
    _stage_kernel[(table.blocks.numel(),)](
        *(table.fields, table.scales, table.blocks, outs[0], key, eps),
        *(before, coeff, lr, decay, skip, table.kept, settings, coeff.numel()),
        *(first_query, start - 2 * first_query, stop - 2 * first_query),
        PENDING=pending is not None,
        ONE=len(params) == 1,
        FLAT=table.flat and outs[0].data_ptr() % 16 == 0,
        QUERIES=(stop + 1) // 2 - first_query,
        DTYPE=TRITON_DTYPES[params[0].dtype],
        WIDE=tl.float64 if params[0].dtype == torch.float64 else tl.float32,
        NOISE=KIND[noise],
        PER=PER_CALL[noise],
        INT64=table.int64,
        BLOCK=tables.BLOCK,
        RULE=rule,
        KEPT=0 if table.kept is None else table.kept.shape[1],
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


def _walkable(out: Tensor, w: Tensor, state: Sequence[Tensor]) -> bool:
    layout = layout_of(w)
    alike = all(layout_of(s) == layout for s in state)
    return layout is not None and alike and layout_of(out[0]) is not None


def stage_(
    outs: Sequence[Tensor],
    params: Sequence[Tensor],
    key: Tensor,
    eps: Tensor,
    *,
    tensors: Sequence[int],
    scales: Sequence[float],
    start: int = 0,
    stop: int = 2,
    first_row: int = 0,
    noise: str = "normal",
    before: Tensor | None = None,
    coeff: Tensor | None = None,
    lr: Tensor | None = None,
    weight_decay: Tensor | None = None,
    skip: Tensor | None = None,
    groups: Sequence[int] = (),
    rule: str = "sgd",
    state: Sequence[Tensor] = (),
    settings: Tensor | None = None,
) -> None:
    """One launch for each pair of dtypes and each memory of the halves (one, as a rule)."""
    groups, count = groups or [0] * len(params), len(params)
    pending = tuple(t for t in (before, coeff, lr, weight_decay, skip) if t is not None) or None
    if pending is None:
        rule, state, settings = "sgd", (), None
    together: dict[tuple[object, ...], list[int]] = {}
    for i, (out, w) in enumerate(zip(outs, params, strict=True)):
        if w.numel():
            alone = () if _walkable(out, w, state[i::count]) else (i,)
            where = (w.dtype, out.dtype, out.untyped_storage().data_ptr(), *alone)
            together.setdefault(where, []).append(i)
    for members in together.values():
        first = members[0]
        to, of = [outs[i] for i in members], [params[i] for i in members]
        states = [state[i::count] for i in members]
        walkable = _walkable(to[0], of[0], states[0])
        if not walkable:  # no kernel can walk these strides: work on contiguous copies
            copies = [t.contiguous() for t in (of[0], *states[0])]
            of, states = copies[:1], [copies[1:]]
            to = [torch.empty(to[0].shape, dtype=to[0].dtype, device=to[0].device)]
        indices, factors = [tensors[i] for i in members], [scales[i] for i in members]
        update = (pending, [groups[i] for i in members], rule, kept_of(rule, members, states))
        rest = (start, stop, first_row, noise, *update, settings)
        _launch(to, of, key, eps, indices, factors, *rest)
        if not walkable:
            outs[first].copy_(to[0])
            if pending is not None:
                write_back([params[first], *state[first::count]], copies)
