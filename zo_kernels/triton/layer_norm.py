"""`zo_kernels.paired_layer_norm` in Triton: rows in registers, or long ones read twice."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.triton.norms import alignment, lane_moments, merge_moments, power_of_two
from zo_kernels.triton.shim import jit, tl, triton

# Not yet measured on a GPU: 32 elements a thread; 16 in long rows, where 32 spill on sm_80.
TILE = 4096  # elements of a program that holds several rows
MAX_COLS = 16384  # of a row held in registers
LONG_BLOCK = 4096


@jit
def _affine(b_y, w_ptr, b_ptr, o_w, m_d, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """Parameters are read by every program: they stay in cache, x and y pass through."""
    if WEIGHT:
        b_w = tl.load(w_ptr + o_w, mask=m_d, other=0.0, eviction_policy="evict_last")
        b_y *= b_w.to(tl.float32)[None, :]
    if BIAS:
        b_b = tl.load(b_ptr + o_w, mask=m_d, other=0.0, eviction_policy="evict_last")
        b_y += b_b.to(tl.float32)[None, :]
    return b_y


@jit
def _store(p_y, b_y, m_y, RELU: tl.constexpr):
    if RELU:
        b_y = tl.where(b_y < 0, 0.0, b_y)  # NaN stays
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), mask=m_y)


@jit(do_not_specialize=["rows", "cols"])
def _layer_norm_kernel(
    x_ptr,
    y_ptr,
    w_ptr,
    b_ptr,
    epsilon,
    rows,  # of a half
    cols,  # in units of ALIGN
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Whole rows, held in registers."""
    cols *= ALIGN
    blocks = tl.cdiv(rows, ROWS)
    half, row = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    o_r, o_d = row + tl.arange(0, ROWS), tl.arange(0, COLS)
    m_r, m_d = o_r < rows, o_d < cols
    m_x = m_r[:, None] & m_d[None, :]
    p_row = (half.to(tl.int64) * rows + o_r) * cols
    o_x = p_row[:, None] + o_d[None, :]
    b_x = tl.load(x_ptr + o_x, mask=m_x, other=0.0, eviction_policy="evict_first").to(tl.float32)
    b_first = tl.load(x_ptr + p_row, mask=m_r, other=0.0).to(tl.float32)
    n = cols.to(tl.float32)
    b_dev = tl.where(m_x, b_x - b_first[:, None], 0.0)
    b_mean = tl.sum(b_dev, 1) / n
    b_dev = tl.where(m_x, b_dev - b_mean[:, None], 0.0)
    b_var = tl.sum(b_dev * b_dev, 1) / n
    b_y = b_dev * tl.rsqrt(b_var + tl.cast(epsilon, tl.float32))[:, None]
    o_w = half.to(tl.int64) * cols + o_d
    b_y = _affine(b_y, w_ptr, b_ptr, o_w, m_d, WEIGHT, BIAS)
    _store(y_ptr + o_x, b_y, m_x, RELU)


@jit(do_not_specialize=["rows", "cols"])
def _long_layer_norm_kernel(
    x_ptr,
    y_ptr,
    w_ptr,
    b_ptr,
    epsilon,
    rows,
    cols,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, read twice."""
    cols *= ALIGN
    row = tl.program_id(0).to(tl.int64)
    half = row // rows
    o_d = tl.arange(0, BLOCK)
    p_x, p_y = x_ptr + row * cols, y_ptr + row * cols
    first = tl.load(p_x).to(tl.float32)
    b_mean = tl.zeros([1, BLOCK], tl.float32)
    b_m2 = b_mean
    for d in range(0, cols, BLOCK):
        m_d = (o_d < cols - d)[None, :]
        b_x = tl.load(p_x + d + o_d[None, :], mask=m_d, other=0.0).to(tl.float32)
        b_mean, b_m2 = lane_moments(b_x - first, b_mean, b_m2, m_d, d // BLOCK + 1)
    b_n = tl.maximum((cols - o_d + BLOCK - 1) // BLOCK, 0).to(tl.float32)[None, :]
    n = cols.to(tl.float32)
    b_mean, b_m2 = merge_moments(b_n, b_mean, b_m2, n, 1)
    b_scale = tl.rsqrt(b_m2 / n + tl.cast(epsilon, tl.float32))
    for d in range(0, cols, BLOCK):
        m_d = o_d < cols - d
        b_x = tl.load(p_x + d + o_d, mask=m_d, other=0.0, eviction_policy="evict_first")
        b_y = (b_x.to(tl.float32) - first)[None, :] - b_mean[:, None]
        o_w = half * cols + d + o_d
        b_y = _affine(b_y * b_scale[:, None], w_ptr, b_ptr, o_w, m_d, WEIGHT, BIAS)
        _store(p_y + d + o_d[None, :], b_y, m_d[None, :], RELU)


def is_long(cols: int) -> bool:
    """Whether rows are read twice. Odd ones need an address an element: half as many fit."""
    return cols > (MAX_COLS if cols % 2 == 0 else MAX_COLS // 2)


def tile_for(rows: int, cols: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program."""
    width = LONG_BLOCK if is_long(cols) else power_of_two(cols)
    height = min(max(TILE // width, 1), power_of_two(rows))
    return height, width, 8 if is_long(cols) else max(height * width // 1024, 4)


def paired_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    halves: int,
    epsilon: float,
    relu: bool = False,
) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if y.numel() == 0:
        return y
    cols = x.shape[-1]
    rows = x.numel() // cols // halves
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    align = alignment(cols)
    height, width, warps = tile_for(rows, cols)
    args = (x, y, x if weight is None else weight, x if bias is None else bias, float(epsilon))
    constants = dict(WEIGHT=weight is not None, BIAS=bias is not None, RELU=relu, ALIGN=align)
    if is_long(cols):
        _long_layer_norm_kernel[(halves * rows,)](
            *(*args, rows, cols // align),
            **constants,
            BLOCK=width,
            num_warps=warps,
            enable_fp_fusion=True,
        )
        return y
    _layer_norm_kernel[(halves * triton.cdiv(rows, height),)](
        *(*args, rows, cols // align),
        **constants,
        ROWS=height,
        COLS=width,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return y
