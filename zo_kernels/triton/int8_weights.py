"""`W+- = clip(w +- z_q)` of an int8 weight: the staged halves, from one read of it.

`z` is the sparse noise in [-r_max, r_max]; halves are numbered as in `perturbed_weights`: half `2q`
is `+`, half `2q + 1` is `-`, of query `q`. The weight's exponent is that of its halves. Traffic:
one byte read, one written a half; 8 elements of noise a Philox call.

ElasticZO-INT8 (arXiv:2501.04287), abstract: perturbation and update in integers.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.int8 import check_sparse, sparse_constants
from zo_kernels.layout import PER_CALL, check_groups, groups_per_row, layout_of
from zo_kernels.registry import (
    check_indices,
    check_key,
    check_tensor,
    register,
    resolve_backend,
    twin,
)
from zo_kernels.triton.integer import clip, sparse_noise
from zo_kernels.triton.shim import jit, tl, triton
from zo_kernels.triton.weights import element_offset

BLOCK = 2048  # 16 elements a thread: accesses of 16 bytes, two Philox calls
WARPS = 4
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


def _empty_halves(w: Tensor, count: int) -> Tensor:
    """`[count, *w.shape]`, each half in the memory format of `w`."""
    like = torch.empty_like(w)
    return like.new_empty_strided((count, *w.shape), (w.numel(), *like.stride()))


def _launch_int8_perturbed_weights(
    w: Tensor, key: Tensor, tensor: int, start: int, stop: int, p_zero: float, r_max: int
) -> Tensor:
    out = _empty_halves(w, stop - start)
    if w.numel() == 0:
        return out
    if layout_of(w) is not None and layout_of(out[0]) is not None:
        _launch(w, out, key, tensor, start, stop, p_zero, r_max)
        return out
    # No kernel can walk these strides: work on contiguous copies.
    halves = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    _launch(w.contiguous(), halves, key, tensor, start, stop, p_zero, r_max)
    return out.copy_(halves)


def _implementation(
    w: Tensor,
    key: Tensor,
    tensor: int,
    start: int,
    stop: int,
    p_zero: float,
    r_max: int,
    backend: str,
) -> Tensor:
    backend = resolve_backend(backend, w.device)
    if backend == "triton":
        return _launch_int8_perturbed_weights(w, key, tensor, start, stop, p_zero, r_max)
    halves: Tensor = twin("int8_perturbed_weights", backend)(
        w, key, tensor=tensor, start=start, stop=stop, p_zero=p_zero, r_max=r_max
    )
    return halves


def _fake(
    w: Tensor,
    key: Tensor,
    tensor: int,
    start: int,
    stop: int,
    p_zero: float,
    r_max: int,
    backend: str,
) -> Tensor:
    return _empty_halves(w, stop - start)


_OP = register(
    "int8_perturbed_weights(Tensor w, Tensor key, int tensor, int start, int stop, "
    "float p_zero, int r_max, str backend) -> Tensor",
    _implementation,
    _fake,
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
    backend: str = "auto",
) -> Tensor:
    """Halves `start .. stop - 1` of `clip(w +- z_q)`; half `2q` is +, `2q + 1` is -.

    Args:
        w: `[...]` int8; any strides. Only read.
        key: `[2]` int64, (seed, step), on the device of `w`.
        tensor: index of the tensor in the model, the noise's second counter word.
        start, stop: halves wanted, `0 <= start < stop`.
        p_zero: probability in [0, 1) that an element is not perturbed. Fixed at launch.
        r_max: largest perturbation, in [1, 127]. Fixed at launch.
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[stop - start, *w.shape]` int8 in [-127, 127], each half in the memory format of `w`.
    Determinism: equal on all backends, for any launch and memory format.
    Source: arXiv:2501.04287, abstract (ElasticZO-INT8).
    """
    check_tensor("w", w, dtype=[torch.int8])
    check_key(key, w.device)
    if not 0 <= start < stop:
        raise ValueError(f"halves need 0 <= start < stop, got start={start}, stop={stop}")
    check_indices(tensor, (stop - 1) // 2)
    check_sparse(p_zero, r_max)
    check_groups(w.shape, "sparse_int8")
    halves: Tensor = _OP(w, key, tensor, start, stop, p_zero, r_max, backend)
    return halves


__all__ = ["int8_perturbed_weights"]
