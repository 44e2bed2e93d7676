"""int32 accumulators to `(q int8, exponent)`: `q = clip(acc / 2^s)`, `s = max(bits - 7, 0)`.

The rounding rules are the contract of `zo_kernels.reference.integer`. The shift of each half comes
from the device; no host value takes part. Traffic: 4 bytes read and one written an element; without
`bits` the accumulators are read once more, for their range.

Noise of a stochastic rounding is that of one half: all halves use the same words, as dropout uses
one mask, so that the halves differ by the perturbation alone; stacked equals sequential.

NITI: Wang et al., arXiv:2009.13108.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.int8 import (
    ROUNDINGS,
    check_exponent,
    check_halves,
    check_rounding,
    dense,
    half_shape,
)
from zo_kernels.layout import PER_CALL, groups_per_row, layout_of
from zo_kernels.registry import check_tensor, register, resolve_backend, twin
from zo_kernels.triton.int8_range import int8_range
from zo_kernels.triton.integer import STOCHASTIC, clip, round_shift, rounding_words
from zo_kernels.triton.shim import jit, tl, triton
from zo_kernels.triton.weights import element_offset

BLOCK = 2048  # 16 elements a thread: one store of 16 bytes
WARPS = 4
INT32_MAX = 2**31 - 1


@jit(do_not_specialize=["blocks", "tensor", "query"])
def _requantize_kernel(
    acc_ptr,
    out_ptr,
    bits_ptr,
    exponent_ptr,
    weight_ptr,  # exponent of the weight
    total_ptr,
    key_ptr,
    blocks,  # of a half
    tensor,
    query,
    s_bits,  # strides from half to half: 0 where one value serves all
    s_exponent,
    s_weight,
    elements,  # of a half, padded: groups * PER
    cols,
    padded_cols,
    inner,
    s_row,
    s_outer,
    s_inner,
    t_row,
    t_outer,
    t_inner,
    s_half,
    t_half,
    ROUNDING: tl.constexpr,
    RELU: tl.constexpr,
    WEIGHT: tl.constexpr,
    FLAT: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    half = tl.program_id(0) // blocks
    pid = tl.program_id(0) % blocks
    s = tl.minimum(tl.maximum(tl.load(bits_ptr + half * s_bits) - 7, 0), 31)
    if pid == 0:
        total = tl.load(exponent_ptr + half * s_exponent) + s
        if WEIGHT:
            total += tl.load(weight_ptr + half * s_weight)
        tl.store(total_ptr + half, total)
    if INT64:
        half, pid = half.to(tl.int64), pid.to(tl.int64)
    o_e = pid * BLOCK + tl.arange(0, BLOCK)
    if FLAT:
        o_acc = o_e
        o_out = o_e
        m_e = o_e < elements
    else:
        o_row = o_e // padded_cols
        o_col = o_e % padded_cols
        m_e = (o_e < elements) & (o_col < cols)
        o_acc = element_offset(o_row, o_col, inner, s_row, s_outer, s_inner)
        o_out = element_offset(o_row, o_col, inner, t_row, t_outer, t_inner)
    b_acc = tl.load(acc_ptr + half * s_half + o_acc, mask=m_e, other=0)
    b_words = 0
    if ROUNDING == STOCHASTIC:
        b_words = rounding_words(key_ptr, pid, cols, padded_cols, tensor, query, True, BLOCK)
    b_q = clip(round_shift(b_acc, s.to(tl.uint32), b_words, ROUNDING))
    if RELU:
        b_q = tl.maximum(b_q, 0)
    tl.store(out_ptr + half * t_half + o_out, b_q.to(tl.int8), mask=m_e)


def _stride(t: Tensor | None) -> int:
    """From one half's value to the next one's; 0 where one value serves all."""
    return 0 if t is None or t.numel() == 1 else t.stride(0)


def _launch(
    acc: Tensor,
    out: Tensor,
    bits: Tensor,
    exponents: tuple[Tensor, Tensor | None, Tensor],
    noise: tuple[Tensor | None, int, int],
    halves: int,
    rounding: str,
    relu: bool,
) -> None:
    """Launch over accumulators whose layout a kernel can walk."""
    exponent, weight_exponent, total = exponents
    key, tensor, query = noise
    per_half = acc.shape[0] // halves if acc.ndim else 1
    source, target = (layout_of(t[:per_half] if t.ndim else t) for t in (acc, out))
    assert source is not None and target is not None
    per = PER_CALL["bits"] if rounding == "stochastic" else 1
    padded_cols = groups_per_row(source.cols, "bits") * per if per > 1 else source.cols
    flat = source.flat and target.flat and (source.cols % per == 0 or source.rows == 1)
    if per == 1 and dense(acc) and acc.stride() == out.stride():
        flat = True  # any order will do
    size = acc.numel() // halves
    padded = source.rows * padded_cols
    s_half, t_half = (t.stride(0) * per_half if halves > 1 else 0 for t in (acc, out))
    last = max(
        padded, *(h * (halves - 1) + x.extent for h, x in ((s_half, source), (t_half, target)))
    )
    blocks = triton.cdiv(padded, BLOCK)
    _requantize_kernel[(halves * blocks,)](
        *(acc, out, bits, exponent, exponent if weight_exponent is None else weight_exponent),
        *(total, bits if key is None else key, blocks, tensor, query),
        *(_stride(bits), _stride(exponent), _stride(weight_exponent)),
        *(size if flat else padded, source.cols, padded_cols, source.inner),
        *(source.s_row, source.s_outer, source.s_inner),
        *(target.s_row, target.s_outer, target.s_inner, s_half, t_half),
        ROUNDING=ROUNDINGS[rounding],
        RELU=relu,
        WEIGHT=weight_exponent is not None,
        FLAT=flat,
        INT64=last + BLOCK > INT32_MAX,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


def _walkable(t: Tensor) -> bool:
    return layout_of(t) is not None


def _total(bits: Tensor, exponent: Tensor, weight_exponent: Tensor | None) -> Tensor:
    """The exponents, `[1]` or `[H]`, where there is no element to launch over."""
    total = exponent.reshape(-1) + (bits.reshape(-1) - 7).clamp(0, 31)
    return total if weight_exponent is None else total + weight_exponent.reshape(-1)


def _launch_int8_requantize(
    acc: Tensor,
    bits: Tensor,
    exponent: Tensor,
    weight_exponent: Tensor | None,
    halves: int | None,
    noise: tuple[Tensor | None, int, int],
    rounding: str,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    out, total = _empty(acc, halves)
    if acc.numel() == 0:
        value = _total(bits, exponent, weight_exponent)
        return out, total.copy_(value if halves else value.squeeze(0))
    exponents = (exponent, weight_exponent, total)
    rest = (bits, exponents, noise, halves or 1, rounding, relu)
    if _walkable(acc) and _walkable(out):
        _launch(acc, out, *rest)
        return out, total
    copy = torch.empty(acc.shape, dtype=torch.int8, device=acc.device)
    _launch(acc.contiguous(), copy, *rest)
    return out.copy_(copy), total


def _implementation(
    acc: Tensor,
    bits: Tensor | None,
    exponent: Tensor,
    weight_exponent: Tensor | None,
    halves: int | None,
    rounding: str,
    key: Tensor | None,
    tensor: int,
    query: int,
    relu: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    backend = resolve_backend(backend, acc.device)
    if bits is None:
        bits = int8_range(acc, halves=halves, backend=backend)
    if backend == "triton":
        where = (acc, bits, exponent, weight_exponent, halves)
        return _launch_int8_requantize(*where, (key, tensor, query), rounding, relu)
    out: tuple[Tensor, Tensor] = twin("int8_requantize", backend)(
        *(acc, bits, exponent),
        weight_exponent=weight_exponent,
        halves=halves,
        rounding=rounding,
        key=key,
        tensor=tensor,
        query=query,
        relu=relu,
    )
    return out


def _empty(acc: Tensor, halves: int | None) -> tuple[Tensor, Tensor]:
    total = torch.empty(() if halves is None else (halves,), dtype=torch.int32, device=acc.device)
    return torch.empty_like(acc, dtype=torch.int8), total


def _fake(acc: Tensor, bits: Any, exponent: Any, weight: Any, halves: Any, *_: Any) -> Any:
    return _empty(acc, halves)


_OP = register(
    "int8_requantize(Tensor acc, Tensor? bits, Tensor exponent, Tensor? weight_exponent, "
    "int? halves, str rounding, Tensor? key, int tensor, int query, bool relu, str backend) "
    "-> (Tensor, Tensor)",
    _implementation,
    _fake,
)


def int8_requantize(
    acc: Tensor,
    bits: Tensor | None,
    exponent: Tensor,
    *,
    weight_exponent: Tensor | None = None,
    halves: int | None = None,
    rounding: str = "nearest",
    key: Tensor | None = None,
    tensor: int = 0,
    query: int = 0,
    relu: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`q = clip(acc / 2^s)` to int8, `s = max(bits - 7, 0)`, and its exponent.

    Rounding acts on magnitudes. Its bias, the mean of (|result| - |acc| / 2^s) over all dropped
    bits, in units of the result: "nearest" (half away from zero) +2^-(s+1); "stochastic" 0;
    "pseudo" +2^-(s+1) for odd s (1/4 for s = 1) and -(n-1)/(2 n^2), n = 2^(s/2), for even s (-1/8
    for s = 2). Only "nearest" is monotone, so only with it may a maximum be taken before.

    Args:
        acc: int32, any shape and strides; with halves `[H B, ...]`, one half behind the other.
        bits: of `int8_range`: int32, `[H]`, or 1 element for all; None measures them.
        exponent: of `acc`, int32, 1 element or `[H]`.
        weight_exponent: is added to it; None adds nothing.
        halves: H, in how many equal parts dimension 0 falls; None is one tensor.
        rounding: "nearest", "pseudo" or "stochastic" (noise of purpose "rounding").
        key: `[2]` int64, (seed, step); needed by "stochastic".
        tensor, query: place in the noise; a weight's own index with query 0 is `int8_update_`'s.
        relu: negative results become 0, after the shift.
        backend: "auto", "triton", "numba" or "reference".
    Returns: q int8 like `acc`; `exponent + weight_exponent + s` int32, `[H]` or `[]`.
    Determinism: equal on all backends, for any launch and memory format; halves share their noise.
    Source: NITI (arXiv:2009.13108).
    """
    check_tensor("acc", acc, dtype=[torch.int32])
    check_halves("acc", acc, halves)
    if bits is not None:
        check_exponent("bits", bits, halves, acc.device)
    check_exponent("exponent", exponent, halves, acc.device)
    if weight_exponent is not None:
        check_exponent("weight_exponent", weight_exponent, halves, acc.device)
    shape = half_shape(acc.shape, halves)
    check_rounding(rounding, key, shape, tensor, query, acc.device)
    exponents = (exponent, weight_exponent)
    args = (acc, bits, *exponents, halves, rounding, key, tensor, query, relu, backend)
    out: tuple[Tensor, Tensor] = _OP(*args)
    return out


__all__ = ["int8_requantize"]
