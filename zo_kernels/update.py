"""`w -= lr * (scale * sum_q coeff_q z_q + weight_decay * w)` for all head parameters, one launch;
by another of the rules (`zo_kernels.rules`) with the state that it keeps.

Traffic: one read and one write of every weight and of its state, whatever the number of queries Q;
`z` is made in registers. Coefficients, learning rates and the flag that skips a step live on the
device. A table of pointers tells each program its tensor; it is made again when any changes.

bfloat16 weights are rounded stochastically (purpose "rounding" of the noise): a ZO update is mostly
below half a bf16 step, and rounding to nearest would lose it.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels import _table
from zo_kernels._layout import PER_CALL, check_groups
from zo_kernels._lib import (
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
from zo_kernels._rules import moved
from zo_kernels._table import FIELDS, flat_walk, row_offset, source_row
from zo_kernels._triton import jit, tl
from zo_kernels.noise import KIND, float_noise, interleave4, words
from zo_kernels.rules import check_rule, kept_of, walked, write_back

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
    rule: str,
    state: Sequence[Tensor],
    settings: Tensor | None,
) -> None:
    """One launch for each dtype among the parameters (one, as a rule)."""
    # A weight no kernel can walk is updated in a contiguous copy and written back.
    walks = [walked(w, state[i :: len(params)]) for i, w in enumerate(params)]
    for dtype in {w.dtype for w in params}:
        of_dtype = [i for i, w in enumerate(params) if w.dtype == dtype and w.numel()]
        if not of_dtype:
            continue
        table = _table.table_of(
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
            BLOCK=_table.BLOCK,
            RULE=rule,
            KEPT=0 if table.kept is None else table.kept.shape[1],
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    for i, (w, walk) in enumerate(zip(params, walks, strict=True)):
        write_back([w, *state[i :: len(params)]], walk)


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
    rule: str,
    state: Sequence[Tensor],
    settings: Tensor | None,
    backend: str,
) -> None:
    backend = resolve_backend(backend, key.device)
    params = [w.detach() for w in params]
    args = (params, key, coeff, lr, weight_decay, skip)
    if backend == "triton":
        _launch_update_(*args, tensors, groups, scales, noise, rule, state, settings)
        return
    twin("update_", backend)(
        *args,
        tensors=tensors,
        groups=groups,
        scales=scales,
        noise=noise,
        rule=rule,
        state=state,
        settings=settings,
    )


def _fake(*args: object) -> None:
    return None


_OP = register(
    "update_(Tensor(a!)[] params, Tensor key, Tensor coeff, Tensor lr, Tensor weight_decay, "
    "Tensor skip, int[] tensors, int[] groups, float[] scales, str noise, "
    "str rule, Tensor(b!)[] state, Tensor? settings, str backend) -> ()",
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
    rule: str = "sgd",
    state: Sequence[Tensor] = (),
    settings: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Update weights in place: `w -= lr * (scale * sum_q coeff_q z_q + weight_decay * w)`, or by
    another rule of the same sum.

    Args:
        params: T weights, float32, float64 or bfloat16, any strides.
        key: `[2]` int64, (seed, step).
        coeff: `[Q]` float64, projected gradients, clipped and divided by Q.
        lr, weight_decay: `[G]` float64, a value a group.
        skip: `[]` float32; not 0 leaves every weight and its state bit-identical.
        tensors, groups, scales: T each: index in the model, group, relative scale of the noise.
        noise: "normal" or "rademacher".
        rule: "sgd", "momentum", "adam" or "sign" (`zo_kernels.RULES`), in fp32 (fp64 for float64).
        state: number s of weight i at `s * T + i`, zeros before the first step; of the shape and
            dtype of the weight, fastest where it lies as the weight does. Rounded to nearest.
        settings: `[T, numbers]` float64, a row a weight; None where the rule has none.
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
    check_rule(rule, state, settings, params, device)
    by = (rule, state, settings)
    _OP(params, key, coeff, lr, weight_decay, skip, tensors, groups, scales, noise, *by, backend)
    if not torch.compiler.is_compiling():
        for t in (*params, *state):
            torch.autograd.graph.increment_version(t)


__all__ = ["round_to_bf16", "update_", "updated"]
