"""Device side of `zo_kernels.int8_paired_conv2d`: its kernel, the tiles it works in, the launch."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.geometry import Geometry, Pair, empty_output, geometry
from zo_kernels.int8 import sparse_constants
from zo_kernels.layout import layout_of
from zo_kernels.triton.conv import _columns, _extent, _inside, _places
from zo_kernels.triton.int8_linear import raise_range, rectified, sparse_tile
from zo_kernels.triton.int8_range import int8_range
from zo_kernels.triton.integer import clip
from zo_kernels.triton.linear import Tile, parts_of
from zo_kernels.triton.shim import jit, tl, triton
from zo_kernels.triton.weights import INT32_MAX

# As in the fp32 twin: the smallest BN that holds the outputs of w is taken, else the largest; of
# its two BM the first that holds the rows of a half, else the last. Depth 32, the least of an int8
# product: many layers have a multiple of 32 channels. Nothing spills on sm_80, sm_90, sm_100 and
# gfx942. Four warps read x 16 bytes at a time; of eight, sm_80 and gfx942 have products of 64 rows
# made twice.
DEPTH = 32
TILES: tuple[Tile, ...] = tuple(
    Tile(rows, cols, DEPTH, 8 if rows * cols > 4096 else 4, 2)
    for cols in (16, 32, 64)
    for rows in (64, 128)
)
# Where x is gathered byte by byte, which takes an address each: 128 rows spill with four warps, 64
# columns on sm_100.
GATHERED: tuple[Tile, ...] = tuple(
    Tile(rows, cols, DEPTH, rows // 16, 2) for cols in (16, 32) for rows in (64, 128)
)


def tile_for(rows: int, outputs: int, lines: bool) -> Tile:
    """The tile for halves of `rows` outputs each of `outputs` channels; `lines`: 32 channels of x
    lie in a row."""
    tiles = TILES if lines else GATHERED
    cols = next((tile.cols for tile in tiles if tile.cols >= outputs), tiles[-1].cols)
    tiles = tuple(tile for tile in tiles if tile.cols == cols)
    return next((tile for tile in tiles if tile.rows >= rows), tiles[-1])


@jit
def _maxima(b):
    """Of each four neighbours in a column: [4 N, C] -> [N, C]."""
    b = tl.permute(tl.reshape(b, [b.shape[0] // 4, 2, 2, b.shape[1]]), [0, 3, 1, 2])
    b_left, b_right = tl.split(b)
    b_left, b_right = tl.split(tl.maximum(b_left, b_right))
    return tl.maximum(b_left, b_right)


@jit
def _store(p_acc, m_acc, acc, m_n, bits_ptr, half, RELU: tl.constexpr, POOL: tl.constexpr):
    if POOL:
        acc = _maxima(acc)
    acc = rectified(acc, m_n, RELU)
    tl.store(p_acc, acc.trans(), mask=m_acc)
    raise_range(bits_ptr, half, acc)


@jit(do_not_specialize=["tensor", "first_query", "p0", "magic", "shift", "r_max", "pad_h", "pad_w"])
def _int8_paired_conv2d_kernel(
    x_ptr,
    w_ptr,
    acc_ptr,
    bits_ptr,
    key_ptr,
    tensor,
    first_query,
    p0,
    magic,
    shift,
    r_max,
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
    s_ab,
    s_ap,
    s_an,
    x_half,  # from a half of x to the next; 0 where they share it
    acc_half,
    KERNEL_W: tl.constexpr,
    NOISE: tl.constexpr,
    PAIR: tl.constexpr,  # both halves, or one
    MINUS: tl.constexpr,  # the one is -
    SHARED: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    PAD: tl.constexpr,  # some taps lie outside of x
    ONE_TAP: tl.constexpr,  # BK divides the channels: a tile of w lies in one tap
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
    o_image, o_h, o_w = _places(o_m, grid_h, grid_w, POOL)
    o_top, o_left = o_h * stride_h - pad_h, o_w * stride_w - pad_w
    o_rows = o_image * s_xb + o_top * s_xh + o_left * s_xw
    p_rows = x_ptr + q.to(tl.int64) * HALVES * x_half + o_rows
    p_w = w_ptr + o_n * s_wn
    acc = tl.zeros([BM, BN], tl.int32)
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
        # x is read as [BK, BM], as in the fp32 twin.
        p_x = p_rows[None, :] + o_x[:, None]
        b_w = tl.load(p_w[:, None] + o_tile[None, :], mask=m_w, other=0)
        b_x = tl.load(p_x, mask=m_x, other=0)
        b_half, b_minus = b_w, b_w
        if NOISE:
            third = first_query + q
            b_z = sparse_tile(key_ptr, o_row, k, K, tensor, third, p0, magic, shift, r_max, BK)
            b_w = b_w.to(tl.int32)
            b_minus = clip(b_w - b_z).to(tl.int8)
            b_half = b_minus if MINUS else clip(b_w + b_z).to(tl.int8)
        acc = tl.dot(b_x.trans(), b_half.trans(), acc, out_dtype=tl.int32)
        if PAIR:
            if not SHARED:
                b_x = tl.load(p_x + x_half, mask=m_x, other=0)
            acc_minus = tl.dot(b_x.trans(), b_minus.trans(), acc_minus, out_dtype=tl.int32)
    o_a, rows = o_m, M
    if POOL:
        o_a, rows = pid_m * (BM // 4) + tl.arange(0, BM // 4), M // 4
    o_p = o_a // (grid_h * grid_w) * s_ab + o_a % (grid_h * grid_w) * s_ap
    p_acc = acc_ptr + q.to(tl.int64) * HALVES * acc_half + o_p[None, :] + (o_n * s_an)[:, None]
    m_acc = (o_a < rows)[None, :] & m_n[:, None]
    _store(p_acc, m_acc, acc, m_n, bits_ptr, q * HALVES, RELU, POOL)
    if PAIR:
        p_acc += acc_half
        _store(p_acc, m_acc, acc_minus, m_n, bits_ptr, q * HALVES + 1, RELU, POOL)


def _launch(
    x: Tensor,
    w: Tensor,
    acc: Tensor,
    bits: Tensor,  # zeros
    key: Tensor | None,
    tensor: int,
    first: int,
    count: int,
    shared: bool,
    geo: Geometry,
    p_zero: float,
    r_max: int,
    relu: bool,
    pool: bool,
) -> None:
    """Launch over whole queries, or over one half alone."""
    walk = layout_of(w)
    if walk is None:  # no stride walks the taps
        w = w.contiguous()
        walk = layout_of(w)
        assert walk is not None
    images = acc.shape[0] // count
    rows = images * acc.shape[2] * acc.shape[3] * (4 if pool else 1)
    lines = x.stride(1) == 1 and w.shape[1] % DEPTH == 0
    tile = tile_for(rows, walk.rows, lines)
    blocks = triton.cdiv(rows, tile.rows) * triton.cdiv(walk.rows, tile.cols)
    _int8_paired_conv2d_kernel[((count + 1) // 2 * blocks,)](
        *(x, w, acc, bits, x if key is None else key),
        *(tensor, first // 2, *sparse_constants(p_zero, r_max), r_max),
        *(rows, walk.rows, walk.cols, walk.inner, *x.shape[2:], *acc.shape[2:]),
        *(n for pair in geo for n in pair),
        *x.stride(),
        *(walk.s_row, walk.s_outer, walk.s_inner),
        *(acc.stride(0), acc.stride(3), acc.stride(1)),
        0 if shared else images * x.stride(0),
        images * acc.stride(0),
        KERNEL_W=w.shape[3],
        NOISE=key is not None,
        PAIR=count > 1,
        MINUS=count == 1 and first % 2 == 1,
        SHARED=shared,
        RELU=relu,
        POOL=pool,
        PAD=geo.padding != (0, 0),
        ONE_TAP=walk.inner % tile.depth == 0,
        INT64=_extent(x, w, walk, acc, geo, rows, tile) > INT32_MAX,
        BM=tile.rows,
        BN=tile.cols,
        BK=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def int8_paired_conv2d(
    x: Tensor,
    w: Tensor,
    key: Tensor | None,
    *,
    tensor: int | None = None,
    start: int = 0,
    stop: int = 2,
    shared: bool = False,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    p_zero: float = 0.0,
    r_max: int = 1,
    relu: bool = False,
    pool: bool = False,
) -> tuple[Tensor, Tensor]:
    halves, geo = stop - start, geometry(stride, padding, dilation)
    acc = empty_output(x, w, halves, shared, geo, pool, torch.int32)
    bits = torch.zeros(halves, dtype=torch.int32, device=x.device)
    rows = acc.shape[0] // halves
    for first, count in parts_of(start, stop) if acc.numel() else []:
        at = first - start
        here = slice(at * rows, (at + count) * rows)
        args = (x if shared else x[here], w, acc[here], bits[at : at + count], key, tensor or 0)
        _launch(*args, first, count, shared, geo, p_zero, r_max, relu, pool)
    return acc, bits


def int8_paired_conv1d_max(
    x: Tensor,
    w: Tensor,
    key: Tensor | None,
    *,
    tensor: int | None = None,
    start: int = 0,
    stop: int = 2,
    shared: bool = False,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    p_zero: float = 0.0,
    r_max: int = 1,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    sums, _ = int8_paired_conv2d(
        *(x.unsqueeze(2), w.unsqueeze(2), key),
        tensor=tensor,
        start=start,
        stop=stop,
        shared=shared,
        stride=(1, stride),
        padding=(0, padding),
        dilation=(1, dilation),
        p_zero=p_zero,
        r_max=r_max,
        relu=relu,
    )
    acc = sums.squeeze(2).amax(2)
    return acc, int8_range(acc, halves=stop - start)
