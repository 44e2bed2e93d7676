"""Device side of `zo_kernels.paired_cross_entropy`: its kernels, their tiles, the launches.

A target outside the classes makes the loss of its row NaN; nothing can be raised on the device.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.triton.norms import alignment, power_of_two
from zo_kernels.triton.shim import jit, tl, triton

# Not yet measured on a GPU: 32 elements a thread.
TILE = 4096  # elements of a program that holds several rows
MAX_COLS = 4096  # of a row held at once; longer ones take turns of so many
SUM_BLOCK = 1024
COUNT_BLOCK = 4096
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that no lane subtracts -inf from -inf


@jit
def _rows(ptr, half, o_b, m_b, s_half, s_row, ALIGN: tl.constexpr):
    """Pointers to rows of a half; strides come in units of ALIGN."""
    offset = half.to(tl.int64) * s_half + tl.where(m_b, o_b, 0).to(tl.int64) * s_row
    return ptr + offset * ALIGN


@jit
def _turns(
    p_row,
    b_shift,
    m_b,
    C,
    SMOOTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    VEC: tl.constexpr,
):
    """Long rows, VEC logits a turn for each of COLS / VEC groups: their maxima, their sums of
    exp(x - maximum), their sums of what exceeds the shift."""
    GROUPS: tl.constexpr = COLS // VEC
    b_max = tl.full([ROWS, GROUPS], LOWEST, tl.float32)
    b_sum = tl.zeros([ROWS, GROUPS], tl.float32)
    b_over = b_sum
    o_c = (tl.arange(0, GROUPS) * VEC)[None, :, None] + tl.arange(0, VEC)[None, None, :]
    for c in range(0, C, COLS):
        m_x = m_b[:, None, None] & (o_c < C - c)
        b_x = tl.load(p_row[:, None, None] + c + o_c, mask=m_x, other=float("-inf"))
        b_x = b_x.to(tl.float32)
        b_top = tl.maximum(b_max, tl.max(b_x, 2))
        b_sum = b_sum * tl.exp(b_max - b_top) + tl.sum(tl.exp(b_x - b_top[:, :, None]), 2)
        b_max = b_top
        if SMOOTH:
            b_over += tl.sum(tl.where(m_x, b_x - b_shift[:, None, None], 0.0), 2)
    return b_max, b_sum, b_over


@jit(do_not_specialize=["part_count", "B", "C", "s_half", "s_row", "ignore_index"])
def _cross_entropy_kernel(
    x_ptr,  # [H, B, C]
    target_ptr,  # [B] int64
    lse_ptr,  # [H, B] fp32
    part_ptr,  # [2, H, blocks] fp64: sums of losses, counts; EACH: [H, B] fp32, losses
    part_count,  # H * blocks
    B,
    C,  # in units of ALIGN, as the strides
    s_half,
    s_row,
    smoothing,
    ignore_index,
    SMOOTH: tl.constexpr,
    LOOP: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    VEC: tl.constexpr,  # logits of a 16-byte access
    EACH: tl.constexpr,
):
    """Log-sum-exp of some rows of a half; their losses, or the sum of these and the number of
    targets."""
    C *= ALIGN
    blocks = tl.cdiv(B, ROWS)
    half, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    o_b = block * ROWS + tl.arange(0, ROWS)
    m_b = o_b < B
    b_target = tl.load(target_ptr + o_b, mask=m_b, other=0)
    m_valid = (b_target >= 0) & (b_target < C)
    p_row = _rows(x_ptr, half, o_b, m_b, s_half, s_row, ALIGN)
    o_target = tl.where(m_valid, b_target, 0)
    b_xt = tl.load(p_row + o_target, mask=m_b, other=0.0).to(tl.float32)
    # The mean of logits is that of what exceeds the target's: no digits lost to a large mean.
    b_shift = tl.where(tl.abs(b_xt) < float("inf"), b_xt, 0.0)
    if LOOP:
        b_max, b_sum, b_over = _turns(p_row, b_shift, m_b, C, SMOOTH, ROWS, COLS, VEC)
    else:
        o_c = tl.arange(0, COLS)
        m_x = m_b[:, None] & (o_c < C)[None, :]
        b_x = tl.load(p_row[:, None] + o_c[None, :], mask=m_x, other=float("-inf")).to(tl.float32)
        b_over = tl.where(m_x, b_x - b_shift[:, None], 0.0)
        b_sum = tl.where(b_x == float("-inf"), 0.0, 1.0)
        b_max = tl.where(b_x == float("-inf"), LOWEST, b_x)
    b_top = tl.max(b_max, 1)
    b_total = tl.sum(b_sum * tl.exp(b_max - b_top[:, None]), 1)
    # A row with +inf, or with -inf only, has no softmax.
    m_none = (b_total == 0) | (b_top == float("inf"))
    b_log = tl.where(m_none, float("nan"), tl.log(b_total))
    tl.store(lse_ptr + half.to(tl.int64) * B + o_b, b_top + b_log, mask=m_b)
    b_loss = (b_top - b_xt) + b_log
    if SMOOTH:
        s = tl.cast(smoothing, tl.float32)
        b_mean = tl.sum(b_over, 1) / C.to(tl.float32)
        b_loss = (1.0 - s) * b_loss + s * ((b_top - b_shift - b_mean) + b_log)
    m_taken = m_b & (b_target != ignore_index)
    b_loss = tl.where(m_valid, b_loss, float("nan"))
    b_loss = tl.where(m_taken, b_loss, 0.0)
    if EACH:
        tl.store(part_ptr + half.to(tl.int64) * B + o_b, b_loss, mask=m_b)
    else:
        p_part = part_ptr + tl.program_id(0)
        tl.store(p_part, tl.sum(b_loss.to(tl.float64), 0))
        tl.store(p_part + part_count, tl.sum(m_taken.to(tl.float64), 0))


@jit(do_not_specialize=["blocks", "part_count"])
def _mean_kernel(part_ptr, loss_ptr, blocks, part_count, BLOCK: tl.constexpr):
    """The loss of a half: the mean of its parts, added in fp64."""
    half = tl.program_id(0)
    o_p = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float64)
    b_count = b_sum
    p_part = part_ptr + half * blocks + o_p
    for start in range(0, blocks, BLOCK):
        m_p = o_p < blocks - start
        b_sum += tl.load(p_part + start, mask=m_p, other=0.0)
        b_count += tl.load(p_part + part_count + start, mask=m_p, other=0.0)
    count = tl.sum(b_count, 0)
    mean = tl.sum(b_sum, 0) / tl.maximum(count, 1.0)
    mean = tl.where(count > 0, mean.to(tl.float32), float("nan"))
    tl.store(loss_ptr + half, mean)


@jit(do_not_specialize=["B", "halves", "ignore_index"])
def _scale_kernel(
    target_ptr,
    grad_ptr,
    scale_ptr,
    B,
    halves,
    ignore_index,
    HALVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`grad / count`; without a count every row is ignored and the scale meets none."""
    o_b, o_h = tl.arange(0, BLOCK), tl.arange(0, HALVES)
    b_count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, B, BLOCK):
        m_b = o_b < B - start
        b_target = tl.load(target_ptr + start + o_b, mask=m_b, other=0)
        b_count += (m_b & (b_target != ignore_index)).to(tl.int32)
    count = tl.maximum(tl.sum(b_count, 0), 1).to(tl.float32)
    m_h = o_h < halves
    b_grad = tl.load(grad_ptr + o_h, mask=m_h, other=0.0)
    tl.store(scale_ptr + o_h, tl.div_rn(b_grad, count), mask=m_h)


@jit(do_not_specialize=["B", "C", "s_half", "s_row", "ignore_index"])
def _cross_entropy_backward_kernel(
    x_ptr,
    target_ptr,
    lse_ptr,
    scale_ptr,  # [H]; EACH: [H, B]
    out_ptr,  # [H, B, C]
    B,
    C,  # in units of ALIGN, as the strides
    s_half,
    s_row,
    smoothing,
    uniform,  # smoothing / C
    ignore_index,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    EACH: tl.constexpr,
):
    """A tile of the gradient."""
    out_half = B.to(tl.int64) * C
    blocks_b, blocks_c = tl.cdiv(B, ROWS), tl.cdiv(C * ALIGN, COLS)
    pid = tl.program_id(0) // blocks_c
    half, block = pid // blocks_b, pid % blocks_b
    o_b = block * ROWS + tl.arange(0, ROWS)
    o_c = tl.program_id(0) % blocks_c * COLS + tl.arange(0, COLS)
    m_b = o_b < B
    m_x = m_b[:, None] & (o_c < C * ALIGN)[None, :]
    p_x = _rows(x_ptr, half, o_b, m_b, s_half, s_row, ALIGN)[:, None] + o_c[None, :]
    b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    b_target = tl.load(target_ptr + o_b, mask=m_b, other=0)
    b_lse = tl.load(lse_ptr + half.to(tl.int64) * B + o_b, mask=m_b, other=0.0)
    if EACH:
        b_scale = tl.load(scale_ptr + half.to(tl.int64) * B + o_b, mask=m_b, other=0.0)
    else:
        b_scale = tl.zeros([ROWS], tl.float32) + tl.load(scale_ptr + half)
    m_valid = (b_target >= 0) & (b_target < C * ALIGN)
    b_scale = tl.where(m_valid, b_scale, float("nan"))
    m_hit = b_target[:, None] == o_c[None, :]
    b_wanted = tl.where(m_hit, 1.0 - tl.cast(smoothing, tl.float32), 0.0)
    b_out = tl.exp(b_x - b_lse[:, None]) - b_wanted - tl.cast(uniform, tl.float32)
    m_taken = (b_target != ignore_index)[:, None]
    b_out = tl.where(m_taken, b_out * b_scale[:, None], 0.0)
    p_out = _rows(out_ptr, half, o_b, m_b, out_half, C, ALIGN)[:, None] + o_c[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_x)


def tile_for(rows: int, cols: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program."""
    width = min(power_of_two(cols), MAX_COLS)
    height = min(max(TILE // width, 1), power_of_two(rows))
    return height, width, max(height * width // 1024, 4)


def _strides(x: Tensor) -> tuple[int, tuple[int, int, int]]:
    """ALIGN; classes and strides of x in its units."""
    sizes = x.shape[2], x.stride(0), x.stride(1)
    align = alignment(*sizes)
    classes, s_half, s_row = (n // align for n in sizes)
    return align, (classes, s_half, s_row)


def _with_unit_stride(logits: Tensor) -> Tensor:
    """With unit stride in the classes."""
    return logits if logits.stride(2) == 1 else logits.contiguous()


def _mean(parts: Tensor) -> Tensor:
    """Losses of the halves from the parts of each."""
    _, halves, blocks = parts.shape
    losses = torch.empty(halves, dtype=torch.float32, device=parts.device)
    _mean_kernel[(halves,)](
        *(parts, losses, blocks, halves * blocks),
        BLOCK=SUM_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return losses


def paired_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    x, target, smoothing = _with_unit_stride(logits), target.contiguous(), label_smoothing
    (halves, rows, classes), device = x.shape, x.device
    each = reduction == "none"
    lse = torch.empty((halves, rows), dtype=torch.float32, device=device)
    height, width, warps = tile_for(rows, classes)
    blocks = triton.cdiv(rows, height)
    if each:
        parts = torch.empty_like(lse)
    else:
        parts = torch.empty((2, halves, blocks), dtype=torch.float64, device=device)
    align, sizes = _strides(x)
    if rows:
        _cross_entropy_kernel[(halves * blocks,)](
            *(x, target, lse, parts, halves * blocks, rows, *sizes),
            float(smoothing),
            ignore_index,
            SMOOTH=smoothing > 0,
            LOOP=classes > width,
            ALIGN=align,
            ROWS=height,
            COLS=width,
            VEC=min(16 // x.element_size(), width),
            EACH=each,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return parts if each else _mean(parts), lse


def _scale(target: Tensor, grad: Tensor, ignore_index: int) -> Tensor:
    """`grad / count` of every half."""
    scale = torch.empty_like(grad)
    _scale_kernel[(1,)](
        *(target, grad, scale, len(target), len(grad), ignore_index),
        HALVES=power_of_two(len(grad)),
        BLOCK=COUNT_BLOCK,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return scale


def paired_cross_entropy_backward(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    grad: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    x, smoothing = _with_unit_stride(logits), label_smoothing
    target, lse, grad = target.contiguous(), lse.contiguous(), grad.contiguous()
    halves, rows, classes = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    each = reduction == "none"
    height, width, warps = tile_for(rows, classes)
    align, sizes = _strides(x)
    blocks = triton.cdiv(rows, height) * triton.cdiv(classes, width)
    _cross_entropy_backward_kernel[(halves * blocks,)](
        *(x, target, lse, grad if each else _scale(target, grad, ignore_index), out, rows, *sizes),
        *(float(smoothing), smoothing / classes),
        ignore_index,
        ALIGN=align,
        ROWS=height,
        COLS=width,
        EACH=each,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    return out
