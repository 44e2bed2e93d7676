"""`zo_kernels.paired_linear` in Triton: its kernel, the tiles it works in, the launch."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from zo_kernels.geometry import empty_product
from zo_kernels.registry import interpreted
from zo_kernels.triton.philox import KIND
from zo_kernels.triton.shim import jit, tl, triton
from zo_kernels.triton.tile import shift_tile, shift_vector
from zo_kernels.triton.weights import INT32_MAX

GROUP = tl.constexpr(8)  # blocks of rows that walk `w` together, so that it stays in L2


class Tile(NamedTuple):
    rows: int  # BM
    cols: int  # BN
    depth: int  # BK
    warps: int
    stages: int


# Tiles with growing BM: the first that holds the rows of a half is taken, else the last. Chosen by
# arithmetic (not yet measured on a GPU) and by what compiles without spills for sm_80, sm_90,
# sm_100 and gfx942 (one, "mixed" of 16 rows, moves six scalars to vector lanes on gfx942).
# 16 rows: 32 columns, so that a layer of 4,096 features still makes 128 programs.
# More rows: 8 warps, as two accumulators and a tile of z spill with 4; 128 x 128, bf16's 128 x 64
# and 256 x 64 x 64 spill with 8 too. BN small and BM large: the noise of a tile costs BN BK, its
# products BM BN BK. "mixed" stops at 128: its wider operands spill on sm_80.
# "ieee" with one stage: 102 registers instead of 234, and none spilled on sm_100.
# Signs need BK = 32, 64 or 128.
TILES: dict[str, tuple[Tile, ...]] = {
    "bf16": (
        Tile(16, 32, 64, 4, 3),
        Tile(64, 64, 64, 8, 2),
        Tile(128, 32, 64, 8, 2),
        Tile(256, 64, 32, 8, 2),
    ),
    "mixed": (Tile(16, 32, 64, 4, 2), Tile(64, 64, 32, 8, 3), Tile(128, 64, 32, 8, 3)),
    "tf32": (Tile(16, 32, 64, 4, 2), Tile(64, 64, 32, 8, 2), Tile(128, 64, 32, 8, 2)),
    "tf32x3": (Tile(16, 32, 32, 4, 2), Tile(64, 32, 32, 8, 2)),
    "ieee": (Tile(16, 32, 32, 4, 2), Tile(64, 32, 32, 8, 1)),
}
# Where a row is read element by element: 256 rows spill 500 instructions on sm_90, 128 x 32 x 64
# up to 31, 128 x 64 x 32 none.
RAGGED = {"bf16": (*TILES["bf16"][:2], Tile(128, 64, 32, 8, 2))}
HIP_STAGES = 2  # three of "mixed" with 128 rows need 68 KiB of the 64 of gfx942


def tiles_of(kind: str, ragged: bool = False, hip: bool = False) -> tuple[Tile, ...]:
    """Tiles for a kind of operands, as TILES names it, with growing rows."""
    tiles = RAGGED.get(kind, TILES[kind]) if ragged else TILES[kind]
    if hip:
        tiles = tuple(tile._replace(stages=min(tile.stages, HIP_STAGES)) for tile in tiles)
    return tiles


def tile_for(
    rows: int,
    x: torch.dtype,
    w: torch.dtype,
    compute: torch.dtype,
    precision: str,
    ragged: bool = False,
) -> Tile:
    """The tile for halves of `rows`, from the dtypes of what is read and of the product.

    `ragged`: sizes or addresses are no multiples of 16.
    """
    kind = precision
    if compute == torch.bfloat16:
        kind = "bf16" if x == w == torch.bfloat16 else "mixed"
    tiles = tiles_of(kind, ragged, torch.version.hip is not None)
    return next((tile for tile in tiles if tile.rows >= rows), tiles[-1])


@jit
def _operand(b, DOT: tl.constexpr, UPCAST: tl.constexpr):
    """In the dtype of the product; the interpreter cannot multiply bf16 and takes its value."""
    b = b.to(DOT)
    if UPCAST:
        b = b.to(tl.float32)
    return b


@jit
def _split(b):
    """fp32 as two numbers of tf32: rounded to nearest (11 bits), and what that drops."""
    b_high = ((b.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return b_high, b - b_high


@jit
def _multiply(b_x, b_w, acc, low_x, low_w, PRECISION: tl.constexpr):
    """`acc += x w^T`. tf32x3: without the product of the low parts, in sums of their own.

    (Triton's own tf32x3 chains three products, takes the first two for links of an attention, and
    has both groups of warps make all 64 rows of them.)
    """
    if PRECISION == "tf32x3":
        b_x, x_low = _split(b_x)
        b_w, w_low = _split(b_w)
        # In this order: others Triton 3.6 fails to pipeline for sm_100.
        acc = tl.dot(b_x, b_w.trans(), acc, input_precision="tf32")
        low_w = tl.dot(b_x, w_low.trans(), low_w, input_precision="tf32")
        low_x = tl.dot(x_low, b_w.trans(), low_x, input_precision="tf32")
    else:
        acc = tl.dot(b_x, b_w.trans(), acc, input_precision=PRECISION)
    return acc, low_x, low_w


@jit
def _store(p_y, m_y, acc, low, b_bias, PRECISION: tl.constexpr, RELU: tl.constexpr):
    if PRECISION == "tf32x3":  # the low part of an infinity is NaN
        acc += tl.where(tl.abs(acc) < float("inf"), low, 0.0)
    b_y = acc + b_bias[None, :]
    if RELU:
        b_y = tl.where(b_y < 0, 0.0, b_y)  # NaN stays
    tl.store(p_y, b_y.to(p_y.dtype.element_ty), mask=m_y)


@jit(do_not_specialize=["tensor", "bias_tensor", "first_query"])
def _paired_linear_kernel(
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
    s_xm,
    s_xk,
    s_wn,
    s_wk,
    s_b,
    x_half,  # from a half of x to the next; 0 where they share it
    y_half,
    scale: tl.float64,  # (the interpreter makes them fp32)
    bias_scale: tl.float64,
    NOISE: tl.constexpr,
    PAIR: tl.constexpr,  # both halves, or one
    SHARED: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
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
    third = first_query + q
    eps = tl.load(eps_ptr).to(tl.float32)
    amplitude = eps * tl.cast(scale, tl.float32)
    b_bias = tl.zeros([BN], tl.float32)
    b_shift = b_bias
    if BIAS:
        p_b = b_ptr + o_n.to(tl.int64) * s_b
        b_bias = tl.load(p_b, mask=m_n, other=0.0).to(tl.float32)
        bias_amplitude = eps * tl.cast(bias_scale, tl.float32)
        b_shift = shift_vector(key_ptr, o_n, pid_n * BN, bias_tensor, third, bias_amplitude, NOISE)
    step_x, step_w = s_xk * BK, s_wk * BK
    o_row = o_n
    if INT64:
        o_m, o_n, o_k = o_m.to(tl.int64), o_n.to(tl.int64), o_k.to(tl.int64)
        step_x = tl.cast(s_xk, tl.int64) * BK
        step_w = tl.cast(s_wk, tl.int64) * BK
    HALVES: tl.constexpr = 2 if PAIR else 1
    p_x = x_ptr + q.to(tl.int64) * HALVES * x_half + o_m[:, None] * s_xm + o_k[None, :] * s_xk
    p_w = w_ptr + o_n[:, None] * s_wn + o_k[None, :] * s_wk
    acc = tl.zeros([BM, BN], tl.float32)
    low_x, low_w, acc_minus, minus_x, minus_w = acc, acc, acc, acc, acc
    for k in range(0, K, BK):
        m_k = (o_k < K - k)[None, :]
        b_w = tl.load(p_w, mask=m_n[:, None] & m_k, other=0.0).to(tl.float32)
        b_x = _operand(tl.load(p_x, mask=m_m & m_k, other=0.0), DOT, UPCAST)
        b_z = shift_tile(key_ptr, o_row, k, K, tensor, third, amplitude, NOISE, BK)
        b_half = _operand(b_w + b_z, DOT, UPCAST)
        acc, low_x, low_w = _multiply(b_x, b_half, acc, low_x, low_w, PRECISION)
        if PAIR:
            if not SHARED:
                b_x = _operand(tl.load(p_x + x_half, mask=m_m & m_k, other=0.0), DOT, UPCAST)
            b_half = _operand(b_w - b_z, DOT, UPCAST)
            acc_minus, minus_x, minus_w = _multiply(
                b_x, b_half, acc_minus, minus_x, minus_w, PRECISION
            )
        p_x += step_x
        p_w += step_w
    p_y = y_ptr + q.to(tl.int64) * HALVES * y_half + o_m[:, None] * N + o_n[None, :]
    m_y = m_m & m_n[None, :]
    _store(p_y, m_y, acc, low_x + low_w, b_bias + b_shift, PRECISION, RELU)
    if PAIR:
        p_y += y_half
        _store(p_y, m_y, acc_minus, minus_x + minus_w, b_bias - b_shift, PRECISION, RELU)


def _extent(size: tuple[int, int], stride: tuple[int, ...], tile: Tile) -> int:
    """Beyond the largest offset in a matrix that a program forms, masked ones included."""
    return sum((n + max(tile[:3])) * abs(s) for n, s in zip(size, stride, strict=True))


def _ragged(x: Tensor, w: Tensor, y: Tensor) -> bool:
    """Whether an address, a stride or the length of a row is no multiple of 16.

    Triton specialises by these: such a launch moves fewer than 16 bytes at a time.
    """
    extents = (*w.shape, *(s for t in (x, w) for s in t.stride() if s != 1))
    return any(n % 16 for n in (*extents, *(t.data_ptr() for t in (x, w, y))))


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
    noise: str,
    scales: tuple[float, float],
    precision: str,
    relu: bool,
) -> None:
    """Launch over whole queries, or over one half alone."""
    (N, K), M = w.shape, y.shape[0] // count
    tile = tile_for(M, x.dtype, w.dtype, y.dtype, precision, _ragged(x, w, y))
    sign = -1.0 if count == 1 and first % 2 else 1.0
    queries = (count + 1) // 2
    s_x, s_w = x.stride(), w.stride()
    extents = _extent((M, K), s_x, tile), _extent((N, K), s_w, tile), _extent((M, N), (N, 1), tile)
    blocks = triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.cols)
    _paired_linear_kernel[(queries * blocks,)](
        *(x, w, w if bias is None else bias, y, key, eps),
        *tensors,
        first // 2,
        *(M, N, K, *s_x, *s_w, 0 if bias is None else bias.stride(0)),
        0 if shared else M * s_x[0],
        M * N,
        *(sign * scale for scale in scales),
        NOISE=KIND[noise],
        PAIR=count > 1,
        SHARED=shared,
        BIAS=bias is not None,
        RELU=relu,
        DOT=tl.bfloat16 if y.dtype == torch.bfloat16 else tl.float32,
        PRECISION="ieee" if y.dtype == torch.bfloat16 else precision,
        UPCAST=interpreted(),
        INT64=max(extents) > INT32_MAX,
        BM=tile.rows,
        BN=tile.cols,
        BK=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def parts_of(start: int, stop: int) -> list[tuple[int, int]]:
    """Halves as (first, count): a single -, whole queries, a single +."""
    whole, end = start + start % 2, stop - stop % 2
    parts = [(start, whole - start), (whole, end - whole), (end, stop - end)]
    return [part for part in parts if part[1] > 0]


def paired_linear(
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
    noise: str = "normal",
    scale: float = 1.0,
    bias_scale: float = 1.0,
    precision: str = "ieee",
    compute_dtype: torch.dtype | None = None,
    relu: bool = False,
) -> Tensor:
    refuse_on_hip(precision)
    y = empty_product(x, w, stop - start, shared, compute_dtype)
    if y.numel() == 0:
        return y
    rows = y.shape[0] // (stop - start)
    tensors, scales = (tensor, bias_tensor or 0), (scale, bias_scale)
    for first, count in parts_of(start, stop):
        here = slice((first - start) * rows, (first - start + count) * rows)
        x_here = x if shared else x[here]
        args = (x_here, w, bias, y[here], key, eps, tensors, first, count, shared, noise, scales)
        _launch(*args, precision, relu)
    return y


def refuse_on_hip(precision: str) -> None:
    if precision == "tf32x3" and torch.version.hip:
        raise ValueError("precision 'tf32x3' needs an NVIDIA GPU; an AMD one has 'ieee' and 'tf32'")
