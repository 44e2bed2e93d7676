"""`zo_kernels.int8_range` and `int8_requantize` in Triton."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.int8 import ROUNDINGS, dense
from zo_kernels.layout import PER_CALL, groups_per_row, layout_of
from zo_kernels.triton.integer import (
    STOCHASTIC,
    bit_length,
    clip,
    magnitude_less_one,
    round_shift,
    rounding_words,
)
from zo_kernels.triton.shim import jit, tl, triton
from zo_kernels.triton.weights import element_offset

RANGE_BLOCK = 4096  # 16 elements a thread, four loads of 16 bytes
RANGE_WARPS = 8
BLOCK = 2048  # 16 elements a thread: one store of 16 bytes
WARPS = 4
INT32_MAX = 2**31 - 1


@jit(do_not_specialize=["blocks"])
def _range_kernel(acc_ptr, bits_ptr, blocks, elements, INT64: tl.constexpr, BLOCK: tl.constexpr):
    half = tl.program_id(0) // blocks
    pid = tl.program_id(0) % blocks
    if INT64:
        half, pid = half.to(tl.int64), pid.to(tl.int64)
    o_e = pid * BLOCK + tl.arange(0, BLOCK)
    b_acc = tl.load(acc_ptr + half * elements + o_e, mask=o_e < elements, other=0)
    bits = bit_length(tl.max(magnitude_less_one(b_acc)))
    tl.atomic_max(bits_ptr + half, bits)


def int8_range(acc: Tensor, *, halves: int | None = None) -> Tensor:
    count = halves or 1
    bits = torch.zeros(() if halves is None else (halves,), dtype=torch.int32, device=acc.device)
    if acc.numel():
        elements = acc.numel() // count
        blocks = triton.cdiv(elements, RANGE_BLOCK)
        _range_kernel[(count * blocks,)](
            acc if dense(acc) else acc.contiguous(),
            bits,
            blocks,
            elements,
            INT64=acc.numel() + RANGE_BLOCK > INT32_MAX,
            BLOCK=RANGE_BLOCK,
            num_warps=RANGE_WARPS,
            enable_fp_fusion=True,
        )
    return bits


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
) -> tuple[Tensor, Tensor]:
    if bits is None:
        bits = int8_range(acc, halves=halves)
    out = torch.empty_like(acc, dtype=torch.int8)
    total = acc.new_empty(() if halves is None else (halves,))
    if acc.numel() == 0:
        value = _total(bits, exponent, weight_exponent)
        return out, total.copy_(value if halves else value.squeeze(0))
    exponents = (exponent, weight_exponent, total)
    rest = (bits, exponents, (key, tensor, query), halves or 1, rounding, relu)
    if _walkable(acc) and _walkable(out):
        _launch(acc, out, *rest)
        return out, total
    copy = torch.empty(acc.shape, dtype=torch.int8, device=acc.device)
    _launch(acc.contiguous(), copy, *rest)
    return out.copy_(copy), total
