"""Device side of `zo_kernels.paired_conv2d`: its kernel, the tiles it works in, the launch."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.geometry import Geometry, Pair, empty_output, geometry
from zo_kernels.layout import Layout, layout_of
from zo_kernels.registry import interpreted
from zo_kernels.triton.linear import Tile, _operand, parts_of, refuse_on_hip
from zo_kernels.triton.philox import KIND
from zo_kernels.triton.shim import jit, tl, triton
from zo_kernels.triton.tile import shift_tile, shift_vector
from zo_kernels.triton.weights import INT32_MAX

# The smallest BN that holds the outputs of w is taken, else the largest; of its two BM the first
# that holds the rows of a half, else the last. Chosen by arithmetic (not yet measured on a GPU) and
# by what compiles without spills for sm_80, sm_90, sm_100 and gfx942, for x in lines or gathered,
# pooled or not. Known exceptions: "mixed" of 128 rows, gathered and pooled, moves 2-3 scalars to
# vector lanes on gfx942; two of 240 rarer specialisations (pooled, channels_last with few channels)
# touch 2-7 words of local memory on sm_80.
# 8 warps: addresses of a gathered x, two accumulators and a tile of z spill with 4; "ieee" in
# Triton 3.6 alone, where its 128 rows spill 6-30 instructions.
# Beyond 128 rows bf16 spills on sm_80, fp32 on sm_90; beyond 32 columns "mixed" on sm_100; "tf32x3"
# of 32 columns and "ieee" with two stages, "ieee" of 32 columns on sm_80.
# Depth: many layers have a multiple of 32 channels; signs need 32, 64 or 128.
DEPTH = 32
TILES: dict[str, tuple[Tile, ...]] = {
    "bf16": tuple(Tile(rows, cols, DEPTH, 8, 2) for cols in (16, 32, 64) for rows in (64, 128)),
    "mixed": tuple(Tile(rows, cols, DEPTH, 8, 2) for cols in (16, 32) for rows in (64, 128)),
    "tf32": tuple(Tile(rows, cols, DEPTH, 8, 2) for cols in (16, 32, 64) for rows in (64, 128)),
    "tf32x3": (
        *(Tile(rows, 16, DEPTH, 8, 2) for rows in (64, 128)),
        *(Tile(rows, 32, DEPTH, 8, 1) for rows in (64, 128)),
    ),
    "ieee": (Tile(64, 16, DEPTH, 8, 1), Tile(128, 16, DEPTH, 8, 1)),
}
# Where x is gathered element by element, 64 columns spill on sm_80.
GATHERED_COLS = {"tf32": 32}


def tile_for(
    rows: int,
    outputs: int,
    lines: bool,  # 32 channels of x lie in a row
    x: torch.dtype,
    w: torch.dtype,
    compute: torch.dtype,
    precision: str,
) -> Tile:
    """The tile for halves of `rows` outputs each of `outputs` channels."""
    kind = precision
    if compute == torch.bfloat16:
        kind = "bf16" if x == w == torch.bfloat16 else "mixed"
    tiles = TILES[kind]
    if not lines:
        tiles = tuple(tile for tile in tiles if tile.cols <= GATHERED_COLS.get(kind, tile.cols))
    cols = next((tile.cols for tile in tiles if tile.cols >= outputs), tiles[-1].cols)
    tiles = tuple(tile for tile in tiles if tile.cols == cols)
    return next((tile for tile in tiles if tile.rows >= rows), tiles[-1])


@jit
def _places(o_m, grid_h, grid_w, POOL: tl.constexpr):
    """Image, row and column of the outputs `o_m`; with POOL, windows of four follow each other."""
    if POOL:
        o_part = o_m % 4
        o_m = o_m // 4
    o_h, o_w = o_m // grid_w % grid_h, o_m % grid_w
    if POOL:
        o_h, o_w = 2 * o_h + o_part // 2, 2 * o_w + o_part % 2
    return o_m // (grid_h * grid_w), o_h, o_w


@jit
def _inside(o, size):
    """`0 <= o < size` in one comparison."""
    return o.to(tl.uint32) < tl.cast(size, tl.uint32)


@jit
def _columns(k, channels, ONE_TAP: tl.constexpr, BK: tl.constexpr):
    """Tap and channel of the columns `k ...` of w: with ONE_TAP the tap is a scalar."""
    if ONE_TAP:
        return k // channels, k % channels + tl.arange(0, BK)
    else:
        o_k = k + tl.arange(0, BK)
        tap = (o_k.to(tl.uint32) // tl.cast(channels, tl.uint32)).to(tl.int32)
        return tap, o_k - tap * channels


@jit
def _maxima(b):
    """Of each four neighbours in a column: [4 N, C] -> [N, C]; NaN stays."""
    b = tl.permute(tl.reshape(b, [b.shape[0] // 4, 2, 2, b.shape[1]]), [0, 3, 1, 2])
    b_left, b_right = tl.split(b)
    b = tl.maximum(b_left, b_right, propagate_nan=tl.PropagateNan.ALL)
    b_left, b_right = tl.split(b)
    return tl.maximum(b_left, b_right, propagate_nan=tl.PropagateNan.ALL)


@jit
def _store(p_y, m_y, acc, b_bias, RELU: tl.constexpr, POOL: tl.constexpr):
    b_y = acc + b_bias[None, :]
    if RELU:
        b_y = tl.where(b_y < 0, 0.0, b_y)  # NaN stays
    if POOL:
        b_y = _maxima(b_y)
    tl.store(p_y, b_y.to(p_y.dtype.element_ty).trans(), mask=m_y)


@jit(do_not_specialize=["tensor", "bias_tensor", "first_query", "pad_h", "pad_w"])
def _paired_conv2d_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    key_ptr,
    eps_ptr,
    tensor,
    bias_tensor,
    first_query,
    M,
    N,
    K,
    channels,
    size_h,
    size_w,
    grid_h,  # outputs, or windows of them
    grid_w,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    s_xb,
    s_xc,
    s_xh,
    s_xw,
    s_wn,
    s_outer,
    s_inner,
    s_b,
    s_yb,
    s_yp,
    s_yn,
    x_half,  # from a half of x to the next; 0 where they share it
    y_half,
    scale: tl.float64,  # (the interpreter makes them fp32)
    bias_scale: tl.float64,
    KERNEL_W: tl.constexpr,
    NOISE: tl.constexpr,
    PAIR: tl.constexpr,  # both halves, or one
    SHARED: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    PAD: tl.constexpr,  # some taps lie outside of x
    ONE_TAP: tl.constexpr,  # BK divides the channels: a tile of w lies in one tap
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    INT64: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    INDEX: tl.constexpr = tl.int64 if INT64 else tl.int32
    HALVES: tl.constexpr = 2 if PAIR else 1
    tiles_n = tl.cdiv(N, BN)
    tiles = tl.cdiv(M, BM) * tiles_n
    q = tl.program_id(0) // tiles
    pid_m = tl.cast(tl.program_id(0) % tiles // tiles_n, INDEX)
    pid_n = tl.program_id(0) % tiles_n  # (which divides the tiles of a query)
    o_m = pid_m * BM + tl.arange(0, BM)
    o_row = pid_n * BN + tl.arange(0, BN)
    o_n = o_row.to(INDEX)
    m_m, m_n = o_m < M, o_n < N
    third = first_query + q
    eps = tl.load(eps_ptr).to(tl.float32)
    amplitude = eps * tl.cast(scale, tl.float32)
    o_image, o_h, o_w = _places(o_m, grid_h, grid_w, POOL)
    o_top, o_left = o_h * stride_h - pad_h, o_w * stride_w - pad_w
    o_rows = o_image * s_xb + o_top * s_xh + o_left * s_xw
    p_rows = x_ptr + q.to(tl.int64) * HALVES * x_half + o_rows
    p_w = w_ptr + o_n * s_wn
    acc = tl.zeros([BM, BN], tl.float32)
    acc_minus = acc
    for k in range(0, K, BK):
        tap, o_c = _columns(k, channels, ONE_TAP, BK)
        tap_h, tap_w = tap // KERNEL_W * dilation_h, tap % KERNEL_W * dilation_w
        o_c = o_c.to(INDEX)
        o_x = tl.cast(tap_h, INDEX) * s_xh + tl.cast(tap_w, INDEX) * s_xw + o_c * s_xc
        o_tile = tl.cast(tap, INDEX) * s_outer + o_c * s_inner
        m_x, m_w = m_m[None, :], m_n[:, None]
        if not ONE_TAP:
            m_k = k + tl.arange(0, BK) < K
            m_x, m_w = m_x & m_k[:, None], m_w & m_k[None, :]
            tap_h, tap_w = tap_h[:, None], tap_w[:, None]
        if PAD:
            m_x &= _inside(o_top[None, :] + tap_h, size_h)
            m_x &= _inside(o_left[None, :] + tap_w, size_w)
        # x is read as [BK, BM]: where neither dimension is known to be contiguous, the compiler
        # gives neighbouring threads the last one, rows, which in NCHW lie side by side.
        p_x = p_rows[None, :] + o_x[:, None]
        p_tile = p_w[:, None] + o_tile[None, :]
        b_w = tl.load(p_tile, mask=m_w, other=0.0).to(tl.float32)
        b_x = _operand(tl.load(p_x, mask=m_x, other=0.0), DOT, UPCAST)
        b_z = shift_tile(key_ptr, o_row, k, K, tensor, third, amplitude, NOISE, BK)
        b_half = _operand(b_w + b_z, DOT, UPCAST)
        acc = tl.dot(b_x.trans(), b_half.trans(), acc, input_precision=PRECISION)
        if PAIR:
            if not SHARED:
                b_x = _operand(tl.load(p_x + x_half, mask=m_x, other=0.0), DOT, UPCAST)
            b_half = _operand(b_w - b_z, DOT, UPCAST)
            acc_minus = tl.dot(b_x.trans(), b_half.trans(), acc_minus, input_precision=PRECISION)
    b_bias = tl.zeros([BN], tl.float32)
    b_shift = b_bias
    if BIAS:  # here, not before the loop: the registers would spill
        b_bias = tl.load(b_ptr + o_row.to(tl.int64) * s_b, mask=m_n, other=0.0).to(tl.float32)
        bias_shift = eps * tl.cast(bias_scale, tl.float32)
        b_shift = shift_vector(key_ptr, o_row, pid_n * BN, bias_tensor, third, bias_shift, NOISE)
    o_y, rows = o_m, M
    if POOL:
        o_y, rows = pid_m * (BM // 4) + tl.arange(0, BM // 4), M // 4
    o_p = o_y // (grid_h * grid_w) * s_yb + o_y % (grid_h * grid_w) * s_yp
    p_y = y_ptr + q.to(tl.int64) * HALVES * y_half + o_p[None, :] + (o_n * s_yn)[:, None]
    m_y = (o_y < rows)[None, :] & m_n[:, None]
    _store(p_y, m_y, acc, b_bias + b_shift, RELU, POOL)
    if PAIR:
        _store(p_y + y_half, m_y, acc_minus, b_bias - b_shift, RELU, POOL)


def _extent(
    x: Tensor, w: Tensor, walk: Layout, y: Tensor, geo: Geometry, rows: int, tile: Tile
) -> int:
    """Beyond the largest offset that a program forms, masked ones included."""
    beyond = max(tile[:3])
    s_b, s_c, s_h, s_w = (abs(s) for s in x.stride())
    sizes = zip(y.shape[2:], w.shape[2:], *geo, strict=True)
    # Rows beyond the last image, taps beyond the last one; pooling halves the sizes of y.
    high, wide = (2 * (n + 1) * s + p + (k + beyond) * d for n, k, s, p, d in sizes)
    outer = walk.cols // walk.inner + beyond
    return max(
        rows + beyond,
        (x.shape[0] + beyond) * s_b + walk.inner * s_c + high * s_h + wide * s_w,
        (walk.rows + beyond) * abs(walk.s_row)
        + outer * abs(walk.s_outer)
        + walk.inner * abs(walk.s_inner),
        (y.shape[0] + beyond) * y.stride(0) + (walk.rows + beyond) * y.stride(1) + y.stride(0),
    )


def _launch(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    y: Tensor,
    key: Tensor,
    eps: Tensor,
    tensors: tuple[int, int],  # of w and of the bias, as the scales
    first: int,
    count: int,
    shared: bool,
    geo: Geometry,
    noise: str,
    scales: tuple[float, float],
    precision: str,
    relu: bool,
    pool: bool,
) -> None:
    """Launch over whole queries, or over one half alone."""
    walk = layout_of(w)
    if walk is None:  # no stride walks the taps
        w = w.contiguous()
        walk = layout_of(w)
        assert walk is not None
    images = y.shape[0] // count
    rows = images * y.shape[2] * y.shape[3] * (4 if pool else 1)
    lines = x.stride(1) == 1 and w.shape[1] % DEPTH == 0
    tile = tile_for(rows, walk.rows, lines, x.dtype, w.dtype, y.dtype, precision)
    sign = -1.0 if count == 1 and first % 2 else 1.0
    queries = (count + 1) // 2
    blocks = triton.cdiv(rows, tile.rows) * triton.cdiv(walk.rows, tile.cols)
    _paired_conv2d_kernel[(queries * blocks,)](
        *(x, w, w if bias is None else bias, y, key, eps),
        *tensors,
        first // 2,
        *(rows, walk.rows, walk.cols, walk.inner, *x.shape[2:], *y.shape[2:]),
        *(n for pair in geo for n in pair),
        *x.stride(),
        *(walk.s_row, walk.s_outer, walk.s_inner, 0 if bias is None else bias.stride(0)),
        *(y.stride(0), y.stride(3), y.stride(1)),
        0 if shared else images * x.stride(0),
        images * y.stride(0),
        *(sign * scale for scale in scales),
        KERNEL_W=w.shape[3],
        NOISE=KIND[noise],
        PAIR=count > 1,
        SHARED=shared,
        BIAS=bias is not None,
        RELU=relu,
        POOL=pool,
        PAD=geo.padding != (0, 0),
        ONE_TAP=walk.inner % tile.depth == 0,
        DOT=tl.bfloat16 if y.dtype == torch.bfloat16 else tl.float32,
        PRECISION=precision,
        UPCAST=interpreted(),
        INT64=_extent(x, w, walk, y, geo, rows, tile) > INT32_MAX,
        BM=tile.rows,
        BN=tile.cols,
        BK=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def paired_conv2d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    key: Tensor,
    eps: Tensor,
    *,
    tensor: int,
    bias_tensor: int | None = None,
    start: int = 0,
    stop: int = 2,
    shared: bool = False,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    noise: str = "normal",
    scale: float = 1.0,
    bias_scale: float = 1.0,
    precision: str = "ieee",
    compute_dtype: torch.dtype | None = None,
    relu: bool = False,
    pool: bool = False,
) -> Tensor:
    refuse_on_hip(precision)
    geo = geometry(stride, padding, dilation)
    y = empty_output(x, w, stop - start, shared, geo, pool, compute_dtype)
    if y.numel() == 0:
        return y
    rows = y.shape[0] // (stop - start)
    tensors, scales = (tensor, bias_tensor or 0), (scale, bias_scale)
    for first, count in parts_of(start, stop):
        here = slice((first - start) * rows, (first - start + count) * rows)
        x_here = x if shared else x[here]
        args = (x_here, w, bias, y[here], key, eps, tensors, first, count, shared, geo, noise)
        _launch(*args, scales, precision, relu, pool)
    return y
