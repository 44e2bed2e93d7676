"""`w = clip(w - shift(sum_q g_q z_q))` for all int8 head parameters, in place.

`g_q` in {-1, 0, 1} are the signs of the projected gradient; the shift `max(0, bits(Q r_max) -
b_zo)` is a constant of the launch. Exponents of weights do not move. Traffic: one read and one
write of every weight, a byte each, whatever Q is; `z` is made in registers, 8 elements a call.

ElasticZO-INT8 (arXiv:2501.04287), abstract: the ZO update in integers.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels._int8 import ROUNDINGS, check_rounding, check_sparse, sparse_constants, update_shift
from zo_kernels._integer import STOCHASTIC, clip, round_shift, rounding_words, sparse_noise
from zo_kernels._layout import PER_CALL, check_groups, groups_per_row, layout_of
from zo_kernels._lib import (
    check_in_place,
    check_key,
    check_tensor,
    register,
    resolve_backend,
    twin,
)
from zo_kernels._triton import jit, tl, triton
from zo_kernels.perturbed_weights import element_offset

BLOCK = 2048  # 16 elements a thread: accesses of 16 bytes, two Philox calls a query
WARPS = 4
INT32_MAX = 2**31 - 1
PER = PER_CALL["sparse_int8"]


@jit(do_not_specialize=["queries", "tensor", "p0", "magic", "shift", "r_max", "s"])
def _int8_update_kernel(
    w_ptr,
    key_ptr,
    g_ptr,
    queries,
    tensor,
    p0,
    magic,
    shift,
    r_max,
    s,
    elements,  # padded: groups * 8
    cols,
    padded_cols,
    inner,
    s_row,
    s_outer,
    s_inner,
    ROUNDING: tl.constexpr,
    PER: tl.constexpr,
    FLAT: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    o_group = pid * (BLOCK // PER) + tl.arange(0, BLOCK // PER)
    b_total = tl.zeros([BLOCK], dtype=tl.int32)
    for q in range(queries):
        b_z = sparse_noise(key_ptr, o_group, tensor, q, p0, magic, shift, r_max)
        b_total += tl.load(g_ptr + q) * b_z
    b_words = 0
    if ROUNDING == STOCHASTIC:
        b_words = rounding_words(key_ptr, pid, cols, padded_cols, tensor, 0, FLAT, BLOCK)
    b_total = round_shift(b_total, tl.cast(s, tl.uint32), b_words, ROUNDING)
    o_e = pid * BLOCK + tl.arange(0, BLOCK)
    if FLAT:
        o_w = o_e
        m_e = o_e < elements
    else:
        o_row = o_e // padded_cols
        o_col = o_e % padded_cols
        m_e = (o_e < elements) & (o_col < cols)
        o_w = element_offset(o_row, o_col, inner, s_row, s_outer, s_inner)
    b_w = tl.load(w_ptr + o_w, mask=m_e, other=0).to(tl.int32)
    tl.store(w_ptr + o_w, clip(b_w - b_total).to(tl.int8), mask=m_e)


def _launch(
    w: Tensor,
    key: Tensor,
    g: Tensor,
    tensor: int,
    p_zero: float,
    r_max: int,
    b_zo: int,
    rounding: str,
) -> None:
    """Launch over a weight whose layout a kernel can walk."""
    layout = layout_of(w)
    assert layout is not None
    per_row = groups_per_row(layout.cols, "sparse_int8")
    padded = layout.rows * per_row * PER
    flat = layout.flat and (layout.cols % PER == 0 or layout.rows == 1)
    _int8_update_kernel[(triton.cdiv(padded, BLOCK),)](
        *(w, key, g, g.numel(), tensor, *sparse_constants(p_zero, r_max), r_max),
        update_shift(g.numel(), r_max, b_zo),
        *(w.numel() if flat else padded, layout.cols, per_row * PER, layout.inner),
        *(layout.s_row, layout.s_outer, layout.s_inner),
        ROUNDING=ROUNDINGS[rounding],
        PER=PER,
        FLAT=flat,
        INT64=max(padded, layout.extent) + BLOCK > INT32_MAX,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


def _launch_int8_update_(
    params: Sequence[Tensor],
    key: Tensor,
    g: Tensor,
    tensors: Sequence[int],
    p_zero: float,
    r_max: int,
    b_zo: int,
    rounding: str,
) -> None:
    """One launch a tensor; a weight no kernel can walk in a contiguous copy."""
    for w, tensor in zip(params, tensors, strict=True):
        if w.numel() == 0:
            continue
        target = w if layout_of(w) is not None else w.contiguous()
        _launch(target, key, g, tensor, p_zero, r_max, b_zo, rounding)
        if target is not w:
            w.copy_(target)


def _implementation(
    params: Sequence[Tensor],
    key: Tensor,
    g: Tensor,
    tensors: Sequence[int],
    p_zero: float,
    r_max: int,
    b_zo: int,
    rounding: str,
    backend: str,
) -> None:
    backend = resolve_backend(backend, key.device)
    if backend == "triton":
        _launch_int8_update_(params, key, g, tensors, p_zero, r_max, b_zo, rounding)
        return
    settings = {"p_zero": p_zero, "r_max": r_max, "b_zo": b_zo, "rounding": rounding}
    twin("int8_update_", backend)(params, key, g, tensors=tensors, **settings)


def _fake(*args: object) -> None:
    return None


_OP = register(
    "int8_update_(Tensor(a!)[] params, Tensor key, Tensor g, int[] tensors, float p_zero, "
    "int r_max, int b_zo, str rounding, str backend) -> ()",
    _implementation,
    _fake,
)


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
    backend: str = "auto",
) -> None:
    """Update int8 weights in place: `w = clip(w - shift(sum_q g_q z_q))`, in [-127, 127].

    The shift is `max(0, bits(Q r_max) - b_zo)` to the right: an update has `b_zo` bits, which play
    the part of the learning rate. With all g of 0 a weight stays.

    Args:
        params: T weights, int8, any strides.
        key: `[2]` int64, (seed, step).
        g: `[Q]` int32 in {-1, 0, 1}, of `integer_projected_sign`.
        tensors: T indices in the model, the noise's second counter word.
        p_zero, r_max: of the noise; those of the perturbation. Fixed at launch.
        b_zo: bits of an update, in [0, 31]. Fixed at launch.
        rounding: "nearest", "pseudo" or "stochastic" (noise of purpose "rounding", query 0); their
            biases stand in `int8_requantize`.
        backend: "auto", "triton", "numba" or "reference".
    Determinism: equal on all backends, for any launch and memory format.
    Source: arXiv:2501.04287, abstract (ElasticZO-INT8).
    """
    check_key(key)
    device = key.device
    if len(params) != len(tensors):
        raise ValueError(
            f"params and tensors must have one length, got {len(params)}, {len(tensors)}"
        )
    check_tensor("g", g, dtype=[torch.int32], device=device, vector=True)
    if g.numel() == 0:
        raise ValueError("g must have at least one query, got none")
    check_sparse(p_zero, r_max)
    if not 0 <= b_zo <= 31:
        raise ValueError(f"b_zo must be in [0, 31], got {b_zo}")
    for i, (w, tensor) in enumerate(zip(params, tensors, strict=True)):
        check_tensor(f"params[{i}]", w, dtype=[torch.int8], device=device)
        check_in_place(f"params[{i}]", w)
        check_groups(w.shape, "sparse_int8")
        check_rounding(rounding, key, w.shape, tensor, g.numel() - 1, device)
    _OP(params, key, g, tensors, p_zero, r_max, b_zo, rounding, backend)
    if not torch.compiler.is_compiling():
        for w in params:
            torch.autograd.graph.increment_version(w)


__all__ = ["int8_update_"]
