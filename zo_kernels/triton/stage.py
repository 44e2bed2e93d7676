"""`out[h] = w +- eps * scale * z_q` of many weights in one launch, into memory that is given; on
request each weight first takes the update that is still pending.

With a pending update a weight is read once and written once, `W+` and `W-` are written, and that is
all the traffic of the step outside the products: the sweep of `update_` is gone. Noise made: Q
elements a weight for the update, one a query for the halves.

ElasticZO (arXiv:2501.04287), abstract: two forward passes at `w +- eps z`, `w -= lr g z`.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.layout import PER_CALL, check_groups, layout_of, rows_cols
from zo_kernels.registry import (
    OUT_DTYPES,
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
        p_out = out_ptr + tl.multiple_of(offset, 16) + o_e
        half_stride = tl.multiple_of(half_stride, 16)
    else:
        o_row, o_col = o_e // padded_cols, o_e % padded_cols
        m_e = (o_e < elements) & (o_col < cols)
        w_ptr = tl.load(p_row).to(tl.pointer_type(DTYPE))
        p_w = w_ptr + row_offset(table_ptr, t, o_row, o_col, 6, INT64)
        p_out = out_ptr + offset + row_offset(table_ptr, t, o_row, o_col, 13, INT64)
    b_w = tl.load(p_w, mask=m_e, other=0.0)
    if PENDING:  # noqa: SIM102
        if tl.load(skip_ptr) == 0:
            group = tl.load(p_row + 10)
            lr, decay = tl.load(lr_ptr + group), tl.load(decay_ptr + group)
            # fmt: off
            b_w = updated(b_w.to(WIDE), before_ptr, coeff_ptr, queries, lr, decay, scale, pid,
                          tensor, cols, padded_cols, first_row, DTYPE, WIDE, NOISE, PER, BLOCK)
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
) -> None:
    """One launch: weights of one dtype that a kernel can walk, halves in one memory."""
    table = _table.table_of(params, tensors, groups, scales, noise, outs, first_row)
    before, coeff, lr, decay, skip = pending or (key, eps, eps, eps, eps)
    first_query = start // 2
    _stage_kernel[(table.blocks.numel(),)](
        *(table.fields, table.scales, table.blocks, outs[0], key, eps),
        *(before, coeff, lr, decay, skip, coeff.numel()),
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
        BLOCK=_table.BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


def _walkable(out: Tensor, w: Tensor) -> bool:
    return layout_of(w) is not None and layout_of(out[0]) is not None


def _launch_stage_(
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
) -> None:
    """One launch for each pair of dtypes and each memory of the halves (one, as a rule)."""
    groups = groups or [0] * len(params)
    together: dict[tuple[object, ...], list[int]] = {}
    for i, (out, w) in enumerate(zip(outs, params, strict=True)):
        if w.numel():
            alone = () if _walkable(out, w) else (i,)
            where = (w.dtype, out.dtype, out.untyped_storage().data_ptr(), *alone)
            together.setdefault(where, []).append(i)
    for members in together.values():
        first = members[0]
        to, of = [outs[i] for i in members], [params[i] for i in members]
        walkable = _walkable(to[0], of[0])
        if not walkable:  # no kernel can walk these strides: work on contiguous copies
            of = [of[0].contiguous()]
            to = [torch.empty(to[0].shape, dtype=to[0].dtype, device=to[0].device)]
        indices, factors = [tensors[i] for i in members], [scales[i] for i in members]
        span = (start, stop, first_row, noise)
        _launch(to, of, key, eps, indices, factors, *span, pending, [groups[i] for i in members])
        if not walkable:
            outs[first].copy_(to[0])
            if pending is not None:
                params[first].copy_(of[0])


def _implementation(
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
    before: Tensor | None,
    coeff: Tensor | None,
    lr: Tensor | None,
    weight_decay: Tensor | None,
    skip: Tensor | None,
    groups: Sequence[int],
    backend: str,
) -> None:
    backend = resolve_backend(backend, key.device)
    params = [w.detach() for w in params]
    if backend == "triton":
        given = [t for t in (before, coeff, lr, weight_decay, skip) if t is not None]
        pending = tuple(given) or None
        span = (start, stop, first_row, noise)
        _launch_stage_(outs, params, key, eps, tensors, scales, *span, pending, groups)
        return
    twin("stage_", backend)(
        *(outs, params, key, eps),
        tensors=tensors,
        scales=scales,
        start=start,
        stop=stop,
        first_row=first_row,
        noise=noise,
        before=before,
        coeff=coeff,
        lr=lr,
        weight_decay=weight_decay,
        skip=skip,
        groups=groups,
    )


def _fake(*args: object) -> None:
    return None


_OP = register(
    "stage_(Tensor(a!)[] outs, Tensor(b!)[] params, Tensor key, Tensor eps, int[] tensors, "
    "float[] scales, int start, int stop, int first_row, str noise, Tensor? before, "
    "Tensor? coeff, Tensor? lr, Tensor? weight_decay, Tensor? skip, int[] groups, str backend) "
    "-> ()",
    _implementation,
    _fake,
)


def _check_pending(
    key: Tensor,
    pending: tuple[Tensor | None, ...],
    groups: Sequence[int],
    params: Sequence[Tensor],
) -> bool:
    """Whether an update is pending; all of it is given, or nothing."""
    if all(t is None for t in pending) and not groups:
        return False
    before, coeff, lr, decay, skip = pending
    if any(t is None for t in pending) or len(groups) != len(params):
        raise ValueError(
            "a pending update needs before, coeff, lr, weight_decay, skip and a group for each "
            f"weight, got {[None if t is None else list(t.shape) for t in pending]} and "
            f"{len(groups)} groups for {len(params)} weights"
        )
    assert lr is not None
    check_tensor("before", before, shape=[2], dtype=[torch.int64], device=key.device, vector=True)
    check_tensor("coeff", coeff, dtype=[torch.float64], device=key.device, vector=True)
    for name, t in (("lr", lr), ("weight_decay", decay)):
        check_tensor(name, t, shape=lr.shape, dtype=[torch.float64], device=key.device, vector=True)
    check_tensor("skip", skip, shape=[], dtype=[torch.float32], device=key.device)
    for i, (w, group) in enumerate(zip(params, groups, strict=True)):
        check_in_place(f"params[{i}]", w)
        if not 0 <= group < lr.numel():
            raise ValueError(f"groups[{i}] must be in [0, {lr.numel()}), got {group}")
    return True


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
    backend: str = "auto",
) -> None:
    """Write halves `start .. stop - 1` of `w +- eps * scale * z_q` of T weights into `outs`.

    With a pending update (`before` to `groups`, all of it) each weight is first updated in place,
    bit for bit as `update_` does it, and the halves are those of the new weight.

    Args:
        outs: T tensors `[stop - start, *w.shape]`, float32, float64, bfloat16 or float16.
        params: T weights, float32, float64 or bfloat16, any strides; only read without an update.
        key: `[2]` int64, (seed, step). eps: `[]` float64, the perturbation scale.
        tensors, scales: T each: index in the model, relative scale of the perturbation.
        start, stop: halves wanted, `0 <= start < stop`; half `2q` is +, `2q + 1` is -.
        first_row: where each weight is a slice of rows, the number of its first one.
        noise: "normal" or "rademacher".
        before: `[2]` int64, the key of the pending update. coeff: `[Q]` float64.
        lr, weight_decay: `[G]` float64. skip: `[]` float32; not 0 leaves the weights as they are.
        groups: T indices into lr and weight_decay.
        backend: "auto", "triton", "numba" or "reference".
    Determinism: bit-equal to `update_` and `perturbed_weights` on the same backend.
    Source: arXiv:2501.04287, abstract.
    """
    check_key(key)
    check_tensor("eps", eps, shape=[], dtype=[torch.float64], device=key.device)
    check_noise(noise)
    if not len(outs) == len(params) == len(tensors) == len(scales):
        raise ValueError(
            "outs, params, tensors and scales must have one length, got "
            f"{len(outs)}, {len(params)}, {len(tensors)}, {len(scales)}"
        )
    if not 0 <= start < stop:
        raise ValueError(f"halves need 0 <= start < stop, got start={start}, stop={stop}")
    if first_row < 0:
        raise ValueError(f"first_row must be >= 0, got {first_row}")
    for i, (out, w, tensor) in enumerate(zip(outs, params, tensors, strict=True)):
        check_tensor(f"params[{i}]", w, dtype=WEIGHT_DTYPES, device=key.device)
        shape = [stop - start, *w.shape]
        check_tensor(f"outs[{i}]", out, shape=shape, dtype=OUT_DTYPES, device=key.device)
        check_in_place(f"outs[{i}]", out)
        check_indices(tensor, (stop - 1) // 2)
        rows, cols = rows_cols(w.shape)
        check_groups((first_row + rows, cols), noise)
    pending = (before, coeff, lr, weight_decay, skip)
    changes = _check_pending(key, pending, groups, params)
    span = (start, stop, first_row, noise)
    _OP(outs, params, key, eps, tensors, scales, *span, *pending, groups, backend)
    if changes and not torch.compiler.is_compiling():
        for w in params:
            torch.autograd.graph.increment_version(w)


__all__ = ["stage_"]
