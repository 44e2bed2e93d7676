"""`W+- = w +- eps * scale * z_q`: the staged halves of a weight, from one read of it.

Halves are numbered `0 .. 2Q-1`: half `2q` is `+`, half `2q + 1` is `-`, of query `q`. A call writes
the halves `start .. stop - 1`. Traffic: one read of `w`, one write a half; `z` is made once a
query, in registers.

ElasticZO (arXiv:2501.04287), abstract: two forward passes at `w +- eps z`.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.layout import PER_CALL, check_groups, groups_per_row, layout_of
from zo_kernels.registry import (
    WEIGHT_DTYPES,
    check_indices,
    check_key,
    check_noise,
    check_tensor,
    register,
    resolve_backend,
    twin,
)
from zo_kernels.triton.philox import KIND, float_noise
from zo_kernels.triton.shim import jit, tl, triton

BLOCK = 1024  # elements a program: 8 a thread at 4 warps, two Philox calls each (normal)
WARPS = 4
INT32_MAX = 2**31 - 1
OUT_DTYPES = (*WEIGHT_DTYPES, torch.float16)


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


def _empty_halves(w: Tensor, count: int, dtype: torch.dtype | None) -> Tensor:
    """`[count, *w.shape]`, each half in the memory format of `w`."""
    like = torch.empty_like(w, dtype=dtype or w.dtype)
    return like.new_empty_strided((count, *w.shape), (w.numel(), *like.stride()))


def _launch_perturbed_weights(
    w: Tensor,
    key: Tensor,
    eps: Tensor,
    tensor: int,
    start: int,
    stop: int,
    noise: str,
    scale: float,
    dtype: torch.dtype | None,
) -> Tensor:
    out = _empty_halves(w, stop - start, dtype)
    if w.numel() == 0:
        return out
    if layout_of(w) is not None and layout_of(out[0]) is not None:
        _launch(w, out, key, eps, tensor, start, stop, noise, scale)
        return out
    # No kernel can walk these strides: work on contiguous copies.
    halves = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    _launch(w.contiguous(), halves, key, eps, tensor, start, stop, noise, scale)
    return out.copy_(halves)


def _implementation(
    w: Tensor,
    key: Tensor,
    eps: Tensor,
    tensor: int,
    start: int,
    stop: int,
    noise: str,
    scale: float,
    dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    w = w.detach()
    backend = resolve_backend(backend, w.device)
    if backend == "triton":
        return _launch_perturbed_weights(w, key, eps, tensor, start, stop, noise, scale, dtype)
    halves: Tensor = twin("perturbed_weights", backend)(
        w,
        key,
        eps,
        tensor=tensor,
        start=start,
        stop=stop,
        noise=noise,
        scale=scale,
        dtype=dtype,
    )
    return halves


def _fake(
    w: Tensor,
    key: Tensor,
    eps: Tensor,
    tensor: int,
    start: int,
    stop: int,
    noise: str,
    scale: float,
    dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    return _empty_halves(w, stop - start, dtype)


_OP = register(
    "perturbed_weights(Tensor w, Tensor key, Tensor eps, int tensor, int start, int stop, "
    "str noise, float scale, ScalarType? dtype, str backend) -> Tensor",
    _implementation,
    _fake,
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
    backend: str = "auto",
) -> Tensor:
    """Halves `start .. stop - 1` of `w +- eps * scale * z_q`; half `2q` is +, `2q + 1` is -.

    The sum is made in fp32 (float64 for a float64 weight) and rounded to `dtype`.

    Args:
        w: `[...]` float32, float64 or bfloat16; any strides. Only read.
        key: `[2]` int64, (seed, step), on the device of `w`.
        eps: `[]` float64, the perturbation scale.
        tensor: index of the tensor in the model, the noise's second counter word.
        start, stop: halves wanted, `0 <= start < stop`.
        noise: "normal" or "rademacher".
        scale: relative scale of this tensor's perturbation.
        dtype: of the result; None is that of `w`.
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[stop - start, *w.shape]`, each half in the memory format of `w`.
    Determinism: bit-equal for any launch on one backend; signs ("rademacher") on all of them.
    Source: arXiv:2501.04287, abstract; Spall 1992 (SPSA).
    """
    check_tensor("w", w, dtype=WEIGHT_DTYPES)
    check_key(key, w.device)
    check_tensor("eps", eps, shape=[], dtype=[torch.float64], device=w.device)
    check_noise(noise)
    if not 0 <= start < stop:
        raise ValueError(f"halves need 0 <= start < stop, got start={start}, stop={stop}")
    check_indices(tensor, (stop - 1) // 2)
    if dtype is not None and dtype not in OUT_DTYPES:
        raise TypeError(f"dtype must be one of {OUT_DTYPES}, got {dtype}")
    check_groups(w.shape, noise)
    halves: Tensor = _OP(w, key, eps, tensor, start, stop, noise, scale, dtype, backend)
    return halves


__all__ = ["element_offset", "perturbed_weights"]
