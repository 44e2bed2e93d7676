"""`w -= lr * (scale * sum_q coeff_q z_q + weight_decay * w)` for all head parameters, one launch.

Traffic: one read and one write of every weight, whatever the number of queries Q; `z` is made in
registers. Coefficients, learning rates and the flag that skips a step live on the device. A table
of pointers tells each program its tensor; it is made again when any parameter changes.

bfloat16 weights are rounded stochastically (purpose "rounding" of the noise): a ZO update is mostly
below half a bf16 step, and rounding to nearest would lose it.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.layout import PER_CALL, check_groups, layout_of
from zo_kernels.registry import (
    WEIGHT_DTYPES,
    check_in_place,
    check_indices,
    check_key,
    check_noise,
    check_tensor,
    register,
    resolve_backend,
    twin,
)
from zo_kernels.triton import table as _table
from zo_kernels.triton.philox import KIND, float_noise, interleave4, words
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
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    NOISE: tl.constexpr,
    PER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`w - lr * (scale * sum_q coeff_q z_q + decay * w)` of a block, in the dtype of the weight."""
    o_group = pid * (BLOCK // PER) + tl.arange(0, BLOCK // PER)
    o_group += first_row * (padded_cols // PER)
    b_total = tl.zeros([BLOCK], dtype=WIDE)
    for q in range(queries):
        coeff = tl.load(coeff_ptr + q).to(WIDE)
        b_total += coeff * float_noise(key_ptr, o_group, tensor, q, NOISE).to(WIDE)
    b_total *= scale.to(WIDE)
    b_new = b_w - lr.to(WIDE) * (b_total + decay.to(WIDE) * b_w)
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
    queries,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    NOISE: tl.constexpr,
    PER: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(skip_ptr) == 0:
        t = tl.load(block_ptr + tl.program_id(0))
        p_row = table_ptr + t * FIELDS
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
                            cols, padded_cols, first_row, DTYPE, WIDE, NOISE, PER, BLOCK)
            # fmt: on
            tl.store(p_w, b_new, mask=m_e)
        else:
            o_row = o_e // padded_cols
            o_col = o_e % padded_cols
            m_e = (o_e < elements) & (o_col < cols)
            w_ptr = tl.load(p_row).to(tl.pointer_type(DTYPE))
            p_w = w_ptr + row_offset(table_ptr, t, o_row, o_col, 6, INT64)
            b_w = tl.load(p_w, mask=m_e, other=0.0).to(WIDE)
            # fmt: off
            b_new = updated(b_w, key_ptr, coeff_ptr, queries, lr, decay, scale, pid, tensor,
                            cols, padded_cols, first_row, DTYPE, WIDE, NOISE, PER, BLOCK)
            # fmt: on
            tl.store(p_w, b_new, mask=m_e)


TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
}


def _launch_update_(
    params: Sequence[Tensor],
    key: Tensor,
    coeff: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    skip: Tensor,
    tensors: Sequence[int],
    groups: Sequence[int],
    scales: Sequence[float],
    noise: str,
) -> None:
    """One launch for each dtype among the parameters (one, as a rule)."""
    # A weight no kernel can walk is updated in a contiguous copy and written back.
    targets = [w if layout_of(w) is not None else w.contiguous() for w in params]
    for dtype in {w.dtype for w in params}:
        of_dtype = [i for i, w in enumerate(params) if w.dtype == dtype and w.numel()]
        if not of_dtype:
            continue
        table = _table.table_of(
            [targets[i] for i in of_dtype],
            [tensors[i] for i in of_dtype],
            [groups[i] for i in of_dtype],
            [scales[i] for i in of_dtype],
            noise,
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
            coeff.numel(),
            DTYPE=TRITON_DTYPES[dtype],
            WIDE=tl.float64 if dtype == torch.float64 else tl.float32,
            NOISE=KIND[noise],
            PER=PER_CALL[noise],
            INT64=table.int64,
            BLOCK=_table.BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    for w, target in zip(params, targets, strict=True):
        if target is not w:
            w.copy_(target)


def _implementation(
    params: Sequence[Tensor],
    key: Tensor,
    coeff: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    skip: Tensor,
    tensors: Sequence[int],
    groups: Sequence[int],
    scales: Sequence[float],
    noise: str,
    backend: str,
) -> None:
    backend = resolve_backend(backend, key.device)
    params = [w.detach() for w in params]
    args = (params, key, coeff, lr, weight_decay, skip)
    if backend == "triton":
        _launch_update_(*args, tensors, groups, scales, noise)
    else:
        twin("update_", backend)(*args, tensors=tensors, groups=groups, scales=scales, noise=noise)


def _fake(*args: object) -> None:
    return None


_OP = register(
    "update_(Tensor(a!)[] params, Tensor key, Tensor coeff, Tensor lr, Tensor weight_decay, "
    "Tensor skip, int[] tensors, int[] groups, float[] scales, str noise, str backend) -> ()",
    _implementation,
    _fake,
)


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
    backend: str = "auto",
) -> None:
    """Update weights in place: `w -= lr * (scale * sum_q coeff_q z_q + weight_decay * w)`.

    Args:
        params: T weights, float32, float64 or bfloat16, any strides.
        key: `[2]` int64, (seed, step).
        coeff: `[Q]` float64, projected gradients, clipped and divided by Q.
        lr, weight_decay: `[G]` float64, a value a group.
        skip: `[]` float32; not 0 leaves every weight bit-identical.
        tensors, groups, scales: T each: index in the model, group, relative scale of the noise.
        noise: "normal" or "rademacher".
        backend: "auto", "triton", "numba" or "reference".
    Raises: RuntimeError where a weight requires grad and grad mode is on.
    Determinism: bit-equal for any launch on one backend. bfloat16 is rounded stochastically.
    Source: arXiv:2501.04287 (w -= lr g z).
    """
    check_key(key)
    device = key.device
    if not len(params) == len(tensors) == len(groups) == len(scales):
        raise ValueError(
            "params, tensors, groups and scales must have one length, got "
            f"{len(params)}, {len(tensors)}, {len(groups)}, {len(scales)}"
        )
    check_tensor("coeff", coeff, dtype=[torch.float64], device=device, vector=True)
    if coeff.numel() == 0:
        raise ValueError("coeff must have at least one query, got none")
    check_tensor("lr", lr, dtype=[torch.float64], device=device, vector=True)
    check_tensor(
        "weight_decay",
        weight_decay,
        shape=lr.shape,
        dtype=[torch.float64],
        device=device,
        vector=True,
    )
    check_tensor("skip", skip, shape=[], dtype=[torch.float32], device=device)
    check_noise(noise)
    for i, (w, tensor, group) in enumerate(zip(params, tensors, groups, strict=True)):
        check_tensor(f"params[{i}]", w, dtype=WEIGHT_DTYPES, device=device)
        check_in_place(f"params[{i}]", w)
        check_indices(tensor)
        check_groups(w.shape, noise)
        if not 0 <= group < lr.numel():
            raise ValueError(f"groups[{i}] must be in [0, {lr.numel()}), got {group}")
    _OP(params, key, coeff, lr, weight_decay, skip, tensors, groups, scales, noise, backend)
    if not torch.compiler.is_compiling():
        for w in params:
            torch.autograd.graph.increment_version(w)


__all__ = ["round_to_bf16", "update_", "updated"]
