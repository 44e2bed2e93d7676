"""`zo_kernels.update_` in Triton; the update of a block, which `stage` shares."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.layout import PER_CALL
from zo_kernels.rules import kept_of, walked, write_back
from zo_kernels.triton import table as tables
from zo_kernels.triton.philox import KIND, float_noise, interleave4, words
from zo_kernels.triton.rules import moved
from zo_kernels.triton.shim import jit, tl
from zo_kernels.triton.table import FIELDS, flat_walk, row_offset, source_row

WARPS = 4
ROUNDING = tl.constexpr(1 << 24)


@jit
def round_to_bf16(b_x, b_words):
    """Add 16 uniform bits to what bf16 drops and truncate; infinities and NaN stay."""
    b_bits = b_x.to(tl.uint32, bitcast=True)
    finite = (b_bits & 0x7F800000) != 0x7F800000
    b_up = (b_bits + (b_words >> 16)) & 0xFFFF0000
    return tl.where(finite, b_up, b_bits).to(tl.float32, bitcast=True).to(tl.bfloat16)


@jit
def rounding_words(key_ptr, pid, tensor, cols, padded_cols, first_row, N: tl.constexpr):
    """Words [N] for the elements of a block: 4 to a call, as for normals."""
    o_e = pid * N + tl.arange(0, N // 4) * 4
    o_row = first_row + o_e // padded_cols
    o_group = o_row * ((cols + 3) // 4) + (o_e % padded_cols) // 4
    w0, w1, w2, w3 = words(key_ptr, o_group, tensor, ROUNDING)
    return interleave4(w0, w1, w2, w3)


@jit
def updated(
    b_w,  # [BLOCK] WIDE
    key_ptr,
    coeff_ptr,
    queries,
    lr,
    decay,
    scale,
    pid,
    tensor,
    cols,
    padded_cols,
    first_row,
    p_kept,  # of the weight: where its settings begin, addresses of its state
    settings_ptr,
    o_at,  # [BLOCK] offsets in memory
    m_e,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    NOISE: tl.constexpr,
    PER: tl.constexpr,
    BLOCK: tl.constexpr,
    RULE: tl.constexpr,
    FLAT: tl.constexpr,
):
    """The new weight of a block by a rule of `scale * sum_q coeff_q z_q`, in its own dtype."""
    o_group = pid * (BLOCK // PER) + tl.arange(0, BLOCK // PER)
    o_group += first_row * (padded_cols // PER)
    b_total = tl.zeros([BLOCK], dtype=WIDE)
    for q in range(queries):
        coeff = tl.load(coeff_ptr + q).to(WIDE)
        b_total += coeff * float_noise(key_ptr, o_group, tensor, q, NOISE).to(WIDE)
    b_total *= scale.to(WIDE)
    # fmt: off
    b_new = moved(b_w, b_total, lr.to(WIDE), decay.to(WIDE), p_kept, settings_ptr, o_at, m_e,
                  DTYPE, WIDE, RULE, FLAT)
    # fmt: on
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        b_words = rounding_words(key_ptr, pid, tensor, cols, padded_cols, first_row, BLOCK)
        return round_to_bf16(b_new, b_words)
    else:
        return b_new.to(DTYPE)


@jit(do_not_specialize=["queries"])
def _update_kernel(
    table_ptr,  # [T, FIELDS] int64
    scale_ptr,  # [T] fp64
    block_ptr,  # [programs] int32: the tensor of each program
    key_ptr,
    coeff_ptr,
    lr_ptr,
    decay_ptr,
    skip_ptr,
    kept_ptr,  # [T, KEPT] int64, or None where the rule keeps nothing
    settings_ptr,  # [weights, numbers] fp64, or None
    queries,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    NOISE: tl.constexpr,
    PER: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
    RULE: tl.constexpr,
    KEPT: tl.constexpr,
):
    if tl.load(skip_ptr) == 0:
        t = tl.load(block_ptr + tl.program_id(0))
        p_row = table_ptr + t * FIELDS
        p_kept = kept_ptr + t * KEPT if KEPT else kept_ptr
        pid, elements, cols, padded_cols, first_row = source_row(table_ptr, t, INT64)
        tensor = tl.load(p_row + 9)
        group = tl.load(p_row + 10)
        flat = tl.load(p_row + 11)
        scale = tl.load(scale_ptr + t)
        lr = tl.load(lr_ptr + group)
        decay = tl.load(decay_ptr + group)
        o_e = pid * BLOCK + tl.arange(0, BLOCK)
        if flat != 0:
            p_w, m_e = flat_walk(p_row, o_e, DTYPE, INT64)
            b_w = tl.load(p_w, mask=m_e, other=0.0).to(WIDE)
            # fmt: off
            b_new = updated(b_w, key_ptr, coeff_ptr, queries, lr, decay, scale, pid, tensor,
                            cols, padded_cols, first_row, p_kept, settings_ptr, o_e, m_e,
                            DTYPE, WIDE, NOISE, PER, BLOCK, RULE, True)
            # fmt: on
            tl.store(p_w, b_new, mask=m_e)
        else:
            o_row = o_e // padded_cols
            o_col = o_e % padded_cols
            m_e = (o_e < elements) & (o_col < cols)
            w_ptr = tl.load(p_row).to(tl.pointer_type(DTYPE))
            o_at = row_offset(table_ptr, t, o_row, o_col, 6, INT64)
            p_w = w_ptr + o_at
            b_w = tl.load(p_w, mask=m_e, other=0.0).to(WIDE)
            # fmt: off
            b_new = updated(b_w, key_ptr, coeff_ptr, queries, lr, decay, scale, pid, tensor,
                            cols, padded_cols, first_row, p_kept, settings_ptr, o_at, m_e,
                            DTYPE, WIDE, NOISE, PER, BLOCK, RULE, False)
            # fmt: on
            tl.store(p_w, b_new, mask=m_e)


TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
}


def update_(
    params: Sequence[Tensor],
    key: Tensor,
    coeff: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    skip: Tensor,
    *,
    tensors: Sequence[int],
    groups: Sequence[int],
    scales: Sequence[float],
    noise: str = "normal",
    rule: str = "sgd",
    state: Sequence[Tensor] = (),
    settings: Tensor | None = None,
) -> None:
    """One launch for each dtype among the parameters (one, as a rule)."""
    # A weight no kernel can walk is updated in a contiguous copy and written back.
    walks = [walked(w, state[i :: len(params)]) for i, w in enumerate(params)]
    for dtype in {w.dtype for w in params}:
        of_dtype = [i for i, w in enumerate(params) if w.dtype == dtype and w.numel()]
        if not of_dtype:
            continue
        table = tables.table_of(
            [walks[i][0] for i in of_dtype],
            [tensors[i] for i in of_dtype],
            [groups[i] for i in of_dtype],
            [scales[i] for i in of_dtype],
            noise,
            kept=kept_of(rule, of_dtype, [walks[i][1:] for i in of_dtype]),
        )
        _update_kernel[(table.blocks.numel(),)](
            table.fields,
            table.scales,
            table.blocks,
            key,
            coeff,
            lr,
            weight_decay,
            skip,
            table.kept,
            settings,
            coeff.numel(),
            DTYPE=TRITON_DTYPES[dtype],
            WIDE=tl.float64 if dtype == torch.float64 else tl.float32,
            NOISE=KIND[noise],
            PER=PER_CALL[noise],
            INT64=table.int64,
            BLOCK=tables.BLOCK,
            RULE=rule,
            KEPT=0 if table.kept is None else table.kept.shape[1],
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    for i, (w, walk) in enumerate(zip(params, walks, strict=True)):
        write_back([w, *state[i :: len(params)]], walk)
