"""`zo_kernels.perturbed_weights` and `perturb_` in Triton."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.layout import PER_CALL, empty_halves, groups_per_row, layout_of
from zo_kernels.triton.philox import KIND, float_noise
from zo_kernels.triton.shim import jit, tl, triton

BLOCK = 1024  # elements a program: 8 a thread at 4 warps, two Philox calls each (normal)
WARPS = 4
INT32_MAX = 2**31 - 1


@jit
def element_offset(o_row, o_col, inner, s_row, s_outer, s_inner):
    """Memory offset of elements in noise coordinates (`zo_kernels.layout.Layout`)."""
    return o_row * s_row + (o_col // inner) * s_outer + (o_col % inner) * s_inner


@jit(do_not_specialize=["tensor", "first_query", "start", "stop"])
def _perturbed_weights_kernel(
    w_ptr,
    out_ptr,
    key_ptr,
    eps_ptr,
    tensor,
    first_query,
    start,  # halves to write, counted from those of first_query
    stop,
    elements,  # padded: groups * PER
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
    scale: tl.float64,  # (the interpreter makes it fp32)
    QUERIES: tl.constexpr,
    NOISE: tl.constexpr,
    PER: tl.constexpr,
    FLAT: tl.constexpr,
    INT64: tl.constexpr,
    WIDE: tl.constexpr,
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
    b_w = tl.load(w_ptr + o_w, mask=m_e, other=0.0).to(WIDE)
    amplitude = tl.load(eps_ptr).to(WIDE) * tl.cast(scale, WIDE)
    for q in tl.static_range(QUERIES):
        b_z = float_noise(key_ptr, o_group, tensor, first_query + q, NOISE)
        b_shift = amplitude * b_z.to(WIDE)
        for minus in tl.static_range(2):
            half = 2 * q + minus
            if (half >= start) & (half < stop):
                b_half = b_w - b_shift if minus else b_w + b_shift
                if out_ptr.dtype.element_ty.primitive_bitwidth == 16:
                    b_half = b_half.to(tl.float32)  # from fp64 by way of fp32, as torch casts
                # int64 also where INT64 is not set: the last half may begin beyond 2^31.
                p_out = out_ptr + (half - start).to(tl.int64) * half_stride + o_out
                tl.store(p_out, b_half.to(out_ptr.dtype.element_ty), mask=m_e)


def _launch(
    w: Tensor,
    out: Tensor,
    key: Tensor,
    eps: Tensor,
    tensor: int,
    start: int,
    stop: int,
    noise: str,
    scale: float,
) -> None:
    """Launch over a weight whose layout, and whose halves' layout, a kernel can walk."""
    source, target = layout_of(w), layout_of(out[0])
    assert source is not None and target is not None
    per = PER_CALL[noise]
    per_row = groups_per_row(source.cols, noise)
    padded = source.rows * per_row * per
    flat = source.flat and target.flat and (source.cols % per == 0 or source.rows == 1)
    first_query = start // 2
    half_stride = out.stride(0)
    last = max(padded, source.extent, half_stride * out.shape[0])
    _perturbed_weights_kernel[(triton.cdiv(padded, BLOCK),)](
        w,
        out,
        key,
        eps,
        tensor,
        first_query,
        start - 2 * first_query,
        stop - 2 * first_query,
        w.numel() if flat else padded,
        source.cols,
        per_row * per,
        source.inner,
        source.s_row,
        source.s_outer,
        source.s_inner,
        target.s_row,
        target.s_outer,
        target.s_inner,
        half_stride,
        scale,
        QUERIES=(stop + 1) // 2 - first_query,
        NOISE=KIND[noise],
        PER=per,
        FLAT=flat,
        INT64=last + BLOCK > INT32_MAX,
        WIDE=tl.float64 if w.dtype == torch.float64 else tl.float32,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


def perturbed_weights(
    w: Tensor,
    key: Tensor,
    eps: Tensor,
    *,
    tensor: int,
    start: int = 0,
    stop: int = 2,
    noise: str = "normal",
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    out = empty_halves(w, stop - start, dtype)
    if w.numel() == 0:
        return out
    if layout_of(w) is not None and layout_of(out[0]) is not None:
        _launch(w, out, key, eps, tensor, start, stop, noise, scale)
        return out
    # No kernel can walk these strides: work on contiguous copies.
    halves = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    _launch(w.contiguous(), halves, key, eps, tensor, start, stop, noise, scale)
    return out.copy_(halves)


def perturb_(
    w: Tensor,
    key: Tensor,
    alpha: Tensor,
    *,
    tensor: int,
    query: int = 0,
    noise: str = "normal",
) -> None:
    """The kernel of `perturbed_weights` with its + half written over `w`."""
    target = w if layout_of(w) is not None else w.contiguous()
    if w.numel():
        half = (tensor, 2 * query, 2 * query + 1, noise, 1.0)
        _launch(target, target.unsqueeze(0), key, alpha, *half)
    if target is not w:
        w.copy_(target)
