"""Device side of `zo_kernels.int8_paired_linear`: noise of a tile, kernel, tiles, launch."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.geometry import empty_product
from zo_kernels.int8 import sparse_constants
from zo_kernels.triton.integer import bit_length, clip, magnitude_less_one
from zo_kernels.triton.linear import GROUP, Tile, _extent, parts_of
from zo_kernels.triton.philox import words
from zo_kernels.triton.shim import jit, tl, triton
from zo_kernels.triton.weights import INT32_MAX

# Tiles with growing BM: the first that holds the rows of a half is taken, else the last. Chosen by
# arithmetic (not yet measured on a GPU) and by what compiles without spills for sm_80, sm_90,
# sm_100 and gfx942. 128 columns, and 256 rows of 64 columns, spill on sm_80. 64 rows feed four
# warps: of eight, sm_80 and gfx942 have each product made twice.
TILES: tuple[Tile, ...] = (
    Tile(16, 32, 128, 4, 3),
    Tile(64, 64, 64, 4, 2),
    Tile(128, 64, 128, 8, 2),
)
# Where rows are read byte by byte, which takes an address each: those above spill on sm_80 and
# sm_90.
RAGGED: tuple[Tile, ...] = (
    Tile(16, 32, 64, 4, 2),
    Tile(64, 64, 32, 8, 2),
    Tile(128, 64, 32, 8, 2),
)


def tile_for(rows: int, ragged: bool, along: bool = True) -> Tile:
    """The tile for halves of `rows`; `ragged`: of operands that are read byte by byte; `along`: the
    lines of both run along K, as tensor cores read them."""
    tiles = RAGGED if ragged else TILES
    tile = next((tile for tile in tiles if tile.rows >= rows), tiles[-1])
    # Other lines are turned in registers, where a third stage would wait: half again as many
    # instructions, and on sm_100 spills.
    return tile if along else tile._replace(stages=2)


def _is_ragged(x: Tensor, w: Tensor) -> bool:
    """Whether a line of x or w, along which memory runs, has a length, a distance to the next one
    or an address that is no multiple of 16.

    Triton specialises by these: such a launch reads fewer than 16 bytes at a time. How many outputs
    a weight `[N, K]` has counts only where its lines run along them: else it shows in stores alone.
    """
    lengths = [t.shape[0] if t.stride(0) == 1 else t.shape[1] for t in (x, w)]
    strides = [s for t in (x, w) for s in t.stride() if s != 1]
    return any(n % 16 for n in (*lengths, *strides, x.data_ptr(), w.data_ptr()))


@jit
def sparse_tile(key_ptr, o_row, k, cols, tensor, third, p0, magic, shift, r_max, BK: tl.constexpr):
    """`z` [N, BK] int32 of rows [N] and columns `k ...`; constants of `_int8.sparse_constants`."""
    per_row = tl.cast((cols + 7) // 8, tl.uint32)
    o_group = (k // 8 + tl.arange(0, BK // 8)).to(tl.uint32)
    group = (o_row.to(tl.uint32) * per_row)[:, None] + o_group[None, :]
    w0, w1, w2, w3 = words(key_ptr, group, tensor, third)
    b_word = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.uint32)  # [N, BK / 8, 2, 2]
    b_h = tl.reshape(tl.join(b_word & 0xFFFF, b_word >> 16), [o_row.shape[0], BK]).to(tl.int32)
    n = (tl.maximum(b_h - p0, 0) * (2 * r_max + 1)).to(tl.uint32)
    value = (tl.umulhi(n, tl.cast(magic, tl.uint32)) >> tl.cast(shift, tl.uint32)).to(tl.int32)
    return tl.where(b_h < p0, 0, value - r_max)


@jit
def rectified(acc, m_n, RELU: tl.constexpr):
    """Sums [M, N], rectified; 0 in columns beyond the last, where noise has left something."""
    acc = tl.where(m_n[None, :], acc, 0)
    return tl.maximum(acc, 0) if RELU else acc


@jit
def raise_range(bits_ptr, half, acc):
    """Maxima do not depend on their order: the result is that of one reduction."""
    bits = bit_length(tl.max(magnitude_less_one(acc)))
    tl.atomic_max(bits_ptr + half, bits)


@jit(do_not_specialize=["tensor", "first_query", "p0", "magic", "shift", "r_max"])
def _int8_paired_linear_kernel(
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
    s_xm,
    s_xk,
    s_wn,
    s_wk,
    x_half,  # from a half of x to the next; 0 where they share it
    acc_half,
    NOISE: tl.constexpr,
    PAIR: tl.constexpr,  # both halves, or one
    MINUS: tl.constexpr,  # the one is -
    SHARED: tl.constexpr,
    RELU: tl.constexpr,
    INT64: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    q = tl.program_id(0) // (tiles_m * tiles_n)
    pid = tl.program_id(0) % (tiles_m * tiles_n)
    first_m = pid // (GROUP * tiles_n) * GROUP
    group_m = tl.minimum(tiles_m - first_m, GROUP)
    pid_m = first_m + pid % (GROUP * tiles_n) % group_m
    pid_n = pid % (GROUP * tiles_n) // group_m
    o_m = pid_m * BM + tl.arange(0, BM)
    o_n = pid_n * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_m, m_n = (o_m < M)[:, None], o_n < N
    step_x, step_w = s_xk * BK, s_wk * BK
    o_row = o_n
    if INT64:
        o_m, o_n, o_k = o_m.to(tl.int64), o_n.to(tl.int64), o_k.to(tl.int64)
        step_x = tl.cast(s_xk, tl.int64) * BK
        step_w = tl.cast(s_wk, tl.int64) * BK
    HALVES: tl.constexpr = 2 if PAIR else 1
    p_x = x_ptr + q.to(tl.int64) * HALVES * x_half + o_m[:, None] * s_xm + o_k[None, :] * s_xk
    p_w = w_ptr + o_n[:, None] * s_wn + o_k[None, :] * s_wk
    acc = tl.zeros([BM, BN], tl.int32)
    acc_minus = acc
    for k in range(0, K, BK):
        m_k = (o_k < K - k)[None, :]
        b_w = tl.load(p_w, mask=m_n[:, None] & m_k, other=0)
        b_x = tl.load(p_x, mask=m_m & m_k, other=0)
        b_half, b_minus = b_w, b_w
        if NOISE:
            third = first_query + q
            b_z = sparse_tile(key_ptr, o_row, k, K, tensor, third, p0, magic, shift, r_max, BK)
            b_w = b_w.to(tl.int32)
            b_minus = clip(b_w - b_z).to(tl.int8)
            b_half = b_minus if MINUS else clip(b_w + b_z).to(tl.int8)
        acc = tl.dot(b_x, b_half.trans(), acc, out_dtype=tl.int32)
        if PAIR:
            if not SHARED:
                b_x = tl.load(p_x + x_half, mask=m_m & m_k, other=0)
            acc_minus = tl.dot(b_x, b_minus.trans(), acc_minus, out_dtype=tl.int32)
        p_x += step_x
        p_w += step_w
    p_acc = acc_ptr + q.to(tl.int64) * HALVES * acc_half + o_m[:, None] * N + o_n[None, :]
    m_acc = m_m & m_n[None, :]
    acc = rectified(acc, m_n, RELU)
    tl.store(p_acc, acc, mask=m_acc)
    raise_range(bits_ptr, q * HALVES, acc)
    if PAIR:
        acc_minus = rectified(acc_minus, m_n, RELU)
        tl.store(p_acc + acc_half, acc_minus, mask=m_acc)
        raise_range(bits_ptr, q * HALVES + 1, acc_minus)


def launch_product(
    x: Tensor,
    w: Tensor,
    acc: Tensor,
    bits: Tensor,  # zeros
    key: Tensor | None,
    tensor: int,
    first: int,
    count: int,
    shared: bool,
    p_zero: float,
    r_max: int,
    relu: bool,
) -> None:
    """Launch over whole queries, or over one half alone."""
    (N, K), M = w.shape, acc.shape[0] // count
    s_x, s_w = x.stride(), w.stride()
    tile = tile_for(M, _is_ragged(x, w), s_x[1] == 1 and s_w[1] == 1)
    extents = _extent((M, K), s_x, tile), _extent((N, K), s_w, tile), _extent((M, N), (N, 1), tile)
    blocks = triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.cols)
    _int8_paired_linear_kernel[((count + 1) // 2 * blocks,)](
        *(x, w, acc, bits, x if key is None else key),
        *(tensor, first // 2, *sparse_constants(p_zero, r_max), r_max),
        *(M, N, K, *s_x, *s_w),
        0 if shared else M * s_x[0],
        M * N,
        NOISE=key is not None,
        PAIR=count > 1,
        MINUS=count == 1 and first % 2 == 1,
        SHARED=shared,
        RELU=relu,
        INT64=max(extents) > INT32_MAX,
        BM=tile.rows,
        BN=tile.cols,
        BK=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def int8_paired_linear(
    x: Tensor,
    w: Tensor,
    key: Tensor | None,
    *,
    tensor: int | None = None,
    start: int = 0,
    stop: int = 2,
    shared: bool = False,
    p_zero: float = 0.0,
    r_max: int = 1,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    halves = stop - start
    acc = empty_product(x, w, halves, shared, torch.int32)
    bits = torch.zeros(halves, dtype=torch.int32, device=x.device)
    rows = acc.shape[0] // halves
    for first, count in parts_of(start, stop) if acc.numel() else []:
        at = first - start
        here = slice(at * rows, (at + count) * rows)
        args = (x if shared else x[here], w, acc[here], bits[at : at + count], key, tensor or 0)
        launch_product(*args, first, count, shared, p_zero, r_max, relu)
    return acc, bits
