"""`zo_kernels.paired_batch_norm` in Triton: its kernels and their launches.

A half is `outer` slabs of `rows x channels`, in which either runs innermost: `[B, C, S]` has a slab
a sample and rows innermost; `[B, S, C]` is one slab of B S rows with channels innermost. A program
owns tiles `[ROWS, CHANNELS]`; no element costs a division.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.layout import dense
from zo_kernels.triton.norms import lane_moments, merge_moments, power_of_two
from zo_kernels.triton.plan import Plan, plan_of
from zo_kernels.triton.shim import jit, tl, triton

WARPS = 4
MERGED_CHANNELS = 16  # of a program that merges the splits


@jit
def _sizes(rows, channels, LAST: tl.constexpr, ALIGN: tl.constexpr):
    """The innermost extent comes in units of ALIGN."""
    if LAST:
        return rows, channels * ALIGN
    else:
        return rows * ALIGN, channels


@jit
def _offsets(
    rows,
    channels,
    LAST: tl.constexpr,
    INT64: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Within a tile, from its first element."""
    o_r, o_c = tl.arange(0, ROWS), tl.arange(0, CHANNELS)
    if INT64:
        o_r, o_c = o_r.to(tl.int64), o_c.to(tl.int64)
    if LAST:
        return o_r[:, None] * channels + o_c[None, :]
    else:
        return o_r[:, None] + o_c[None, :] * rows


@jit
def _start(half, slab, row, channel, outer, rows, channels, LAST: tl.constexpr):
    """Offset of a tile: 64 bits, a few scalar operations a tile."""
    size = rows.to(tl.int64) * channels
    start = (half.to(tl.int64) * outer + slab) * size
    if LAST:
        return start + tl.cast(row, tl.int64) * channels + channel
    else:
        return start + tl.cast(channel, tl.int64) * rows + row


@jit
def _first(x_ptr, half, o_c, m_c, outer, rows, channels, LAST: tl.constexpr):
    """The first value of each channel in a half. Moments are of what exceeds it: the mean of such
    small numbers loses nothing, whatever the mean of x."""
    p_half = x_ptr + half.to(tl.int64) * outer * rows * channels
    if LAST:
        o_first = o_c.to(tl.int64)
    else:
        o_first = o_c.to(tl.int64) * rows
    return tl.load(p_half + o_first, mask=m_c, other=0.0).to(tl.float32)


@jit
def _span(split, per_split, outer, rows, ROWS: tl.constexpr):
    """Tiles [begin, end) of a split; how many of them lie in the last, partial block of rows."""
    blocks = tl.cdiv(rows, ROWS)
    begin = split * per_split
    end = tl.minimum(begin + per_split, blocks * outer)
    return begin, end, tl.maximum(end - tl.maximum(begin, (blocks - 1) * outer), 0)


@jit
def _count(tiles, partial, rows, ROWS: tl.constexpr):
    """Rows in `tiles`, `partial` of them in the last block."""
    missing = tl.cdiv(rows, ROWS) * ROWS - rows
    return tiles.to(tl.float32) * ROWS - partial.to(tl.float32) * missing


@jit(do_not_specialize=["outer", "rows", "channels", "splits", "per_split"])
def _moments_kernel(
    x_ptr,
    mean_ptr,  # [H, splits, C] fp32; of x less its first value where there are splits
    m2_ptr,  # the same; sums of squared deviations, or the variance without splits
    outer,
    rows,
    channels,
    splits,
    per_split,
    LAST: tl.constexpr,
    FINAL: tl.constexpr,  # there is one split: the results are mean and variance
    ALIGN: tl.constexpr,
    INT64: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Moments of a split of the rows of a half, for a block of channels."""
    rows, channels = _sizes(rows, channels, LAST, ALIGN)
    blocks_c = tl.cdiv(channels, CHANNELS)
    pid_c = tl.program_id(0) % blocks_c
    split = tl.program_id(0) // blocks_c % splits
    half = tl.program_id(0) // blocks_c // splits
    o_r, o_c = tl.arange(0, ROWS), pid_c * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < channels
    o_x = _offsets(rows, channels, LAST, INT64, ROWS, CHANNELS)
    b_first = _first(x_ptr, half, o_c, m_c, outer, rows, channels, LAST)
    begin, end, partial = _span(split, per_split, outer, rows, ROWS)
    b_mean = tl.zeros([ROWS, CHANNELS], tl.float32)
    b_m2 = b_mean
    for tile in range(begin, end):  # block of rows by block of rows: the partial one comes last
        if LAST:  # one slab
            row, slab = tile * ROWS, 0
        else:
            row, slab = tile // outer * ROWS, tile % outer
        start = _start(half, slab, row, pid_c * CHANNELS, outer, rows, channels, LAST)
        m_x = (o_r < rows - row)[:, None] & m_c[None, :]
        b_x = tl.load(x_ptr + start + o_x, mask=m_x, other=0.0).to(tl.float32)
        turn = tile - begin + 1
        b_mean, b_m2 = lane_moments(b_x - b_first[None, :], b_mean, b_m2, m_x, turn)
    tiles = end - begin
    m_last = o_r < rows - (tl.cdiv(rows, ROWS) - 1) * ROWS
    b_n = tl.where(m_last, tiles, tiles - partial).to(tl.float32)
    n = _count(tiles, partial, rows, ROWS)
    b_mean, b_m2 = merge_moments(b_n[:, None], b_mean, b_m2, n, 0)
    if FINAL:
        b_mean, b_m2 = b_mean + b_first, b_m2 / n
    o_part = (half * splits + split).to(tl.int64) * channels + o_c
    tl.store(mean_ptr + o_part, b_mean, mask=m_c)
    tl.store(m2_ptr + o_part, b_m2, mask=m_c)


@jit(do_not_specialize=["outer", "rows", "channels", "splits", "per_split"])
def _merge_kernel(
    x_ptr,
    part_mean_ptr,
    part_m2_ptr,
    mean_ptr,  # [H, C] fp32
    var_ptr,
    outer,
    rows,
    channels,
    splits,
    per_split,
    LAST: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Mean and variance of a half from its splits, for a block of channels."""
    rows, channels = _sizes(rows, channels, LAST, ALIGN)
    blocks_c = tl.cdiv(channels, CHANNELS)
    half = tl.program_id(0) // blocks_c
    o_c = tl.program_id(0) % blocks_c * CHANNELS + tl.arange(0, CHANNELS)
    o_s = tl.arange(0, SPLITS)
    m_c, m_s = o_c < channels, o_s < splits
    b_first = _first(x_ptr, half, o_c, m_c, outer, rows, channels, LAST)
    begin, end, partial = _span(o_s, per_split, outer, rows, ROWS)
    b_n = tl.where(m_s, _count(end - begin, partial, rows, ROWS), 0.0)
    o_part = (half.to(tl.int64) * splits + o_s)[:, None] * channels + o_c[None, :]
    m_part = m_s[:, None] & m_c[None, :]
    b_mean = tl.load(part_mean_ptr + o_part, mask=m_part, other=0.0)
    b_m2 = tl.load(part_m2_ptr + o_part, mask=m_part, other=0.0)
    n = tl.sum(b_n, 0)
    b_mean, b_m2 = merge_moments(b_n[:, None], b_mean, b_m2, n, 0)
    o_out = half.to(tl.int64) * channels + o_c
    tl.store(mean_ptr + o_out, b_first + b_mean, mask=m_c)
    tl.store(var_ptr + o_out, b_m2 / n, mask=m_c)


@jit(do_not_specialize=["outer", "rows", "channels"])
def _normalize_kernel(
    x_ptr,
    y_ptr,
    mean_ptr,
    var_ptr,
    w_ptr,
    b_ptr,
    epsilon,
    outer,
    rows,
    channels,
    LAST: tl.constexpr,
    RUNNING: tl.constexpr,  # mean and var are [C], one for all halves
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    ALIGN: tl.constexpr,
    INT64: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A tile of y."""
    rows, channels = _sizes(rows, channels, LAST, ALIGN)
    blocks_r, blocks_c = tl.cdiv(rows, ROWS), tl.cdiv(channels, CHANNELS)
    pid = tl.program_id(0)
    slab, tile = pid // (blocks_r * blocks_c), pid % (blocks_r * blocks_c)
    half, slab = slab // outer, slab % outer
    if LAST:  # in the order of memory
        row, channel = tile // blocks_c * ROWS, tile % blocks_c * CHANNELS
    else:
        row, channel = tile % blocks_r * ROWS, tile // blocks_r * CHANNELS
    o_r, o_c = row + tl.arange(0, ROWS), channel + tl.arange(0, CHANNELS)
    m_c = o_c < channels
    m_x = (o_r < rows)[:, None] & m_c[None, :]
    o_x = _start(half, slab, row, channel, outer, rows, channels, LAST)
    o_x += _offsets(rows, channels, LAST, INT64, ROWS, CHANNELS)
    b_x = tl.load(x_ptr + o_x, mask=m_x, other=0.0).to(tl.float32)
    o_param = half.to(tl.int64) * channels + o_c
    o_stat = o_param
    if RUNNING:
        o_stat = o_c.to(tl.int64)
    b_mean = tl.load(mean_ptr + o_stat, mask=m_c, other=0.0).to(tl.float32)
    b_var = tl.load(var_ptr + o_stat, mask=m_c, other=1.0).to(tl.float32)
    b_scale = tl.rsqrt(b_var + tl.cast(epsilon, tl.float32))
    if WEIGHT:
        b_scale *= tl.load(w_ptr + o_param, mask=m_c, other=0.0).to(tl.float32)
    b_y = (b_x - b_mean[None, :]) * b_scale[None, :]
    if BIAS:
        b_y += tl.load(b_ptr + o_param, mask=m_c, other=0.0).to(tl.float32)[None, :]
    if RELU:
        b_y = tl.where(b_y < 0, 0.0, b_y)  # NaN stays
    tl.store(y_ptr + o_x, b_y.to(y_ptr.dtype.element_ty), mask=m_x)


def _moments(x: Tensor, mean: Tensor, var: Tensor, halves: int, plan: Plan) -> None:
    """Batch statistics of each half and channel: `[H, C]` fp32, biased variance."""
    splits, per_split = plan.splits, plan.per_split
    final = splits == 1
    parts: tuple[Tensor, ...] = mean, var
    if not final:
        shape = (halves, splits, plan.channels)
        parts = tuple(torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    _moments_kernel[(plan.blocks[1] * splits * halves,)](
        *(x, *parts, *plan.extents, splits, per_split),
        **plan.constants,
        FINAL=final,
        INT64=plan.wide,
        CHANNELS=plan.tile_channels,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    if not final:
        _merge_kernel[(triton.cdiv(plan.channels, MERGED_CHANNELS) * halves,)](
            *(x, *parts, mean, var, *plan.extents, splits, per_split),
            **plan.constants,
            SPLITS=power_of_two(splits),
            CHANNELS=MERGED_CHANNELS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


def _normalize(
    x: Tensor,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    epsilon: float,
    relu: bool,
    halves: int,
    plan: Plan,
) -> None:
    """y of all halves, from `[H, C]` or `[C]` moments and contiguous parameters."""
    plan = plan.wider()
    blocks_r, blocks_c = plan.blocks
    _normalize_kernel[(blocks_r * blocks_c * plan.outer * halves,)](
        *(x, y, mean, var, mean if weight is None else weight, mean if bias is None else bias),
        float(epsilon),
        *plan.extents,
        **plan.constants,
        RUNNING=mean.ndim == 1,
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        RELU=relu,
        INT64=plan.wide,
        CHANNELS=plan.tile_channels,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )


def paired_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    halves: int,
    epsilon: float,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(x)
    y, plan = torch.empty_like(x), plan_of(x, halves) if x.numel() else None
    if mean is None or var is None:
        mean, var = (x.new_empty((halves, x.shape[1]), dtype=torch.float32) for _ in range(2))
        if plan is not None:
            _moments(x, mean, var, halves, plan)
    if plan is not None:
        weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
        _normalize(x, y, mean, var, weight, bias, epsilon, relu, halves, plan)
    batch_mean, batch_var = (t.detach().float().expand(halves, -1) for t in (mean, var))
    return y, batch_mean, batch_var
