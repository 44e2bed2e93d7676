"""`w = clip(w - shift(sum_q g_q z_q))` for all int8 head parameters, one launch.

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

from zo_kernels.int8 import ROUNDINGS, check_rounding, check_sparse, sparse_constants, update_shift
from zo_kernels.layout import PER_CALL, check_groups, layout_of
from zo_kernels.registry import (
    check_in_place,
    check_key,
    check_tensor,
    register,
    resolve_backend,
    twin,
)
from zo_kernels.triton import table as _table
from zo_kernels.triton.integer import STOCHASTIC, clip, round_shift, rounding_words, sparse_noise
from zo_kernels.triton.shim import jit, tl
from zo_kernels.triton.table import FIELDS, row_offset, source_row

WARPS = 2  # 16 elements a thread: accesses of 16 bytes, two Philox calls a query


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
    """One launch for all weights; those that no kernel can walk in contiguous copies."""
    present = [i for i, w in enumerate(params) if w.numel()]
    if not present:
        return
    of = [params[i] for i in present]
    targets = [w if layout_of(w) is not None else w.contiguous() for w in of]
    zeros, ones = [0] * len(of), [1.0] * len(of)
    indices = [tensors[i] for i in present]
    table = _table.table_of(targets, indices, zeros, ones, "sparse_int8")
    _int8_update_kernel[(table.blocks.numel(),)](
        *(table.fields, table.blocks, key, g, g.numel()),
        *(*sparse_constants(p_zero, r_max), r_max, update_shift(g.numel(), r_max, b_zo)),
        ROUNDING=ROUNDINGS[rounding],
        PER=PER_CALL["sparse_int8"],
        INT64=table.int64,
        BLOCK=_table.BLOCK,
        num_warps=2 * WARPS if table.int64 else WARPS,  # 64-bit divisions would spill
        enable_fp_fusion=True,
    )
    for w, target in zip(of, targets, strict=True):
        if w is not target:
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
