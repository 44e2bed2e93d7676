"""The integer tail: products, gradients and updates of layers that are trained by backpropagation.

- `int8_matmul` is `int8_paired_linear` without noise, for one half and any strides: the error that
  a layer passes on is `int8_matmul(err, w)` of `[B, N]` and `[N, K]`, the gradient of its weight
  `int8_matmul(err.mT, x)` of `[N, B]` and `[B, K]`.
- `int8_conv2d_max_pool` leaves for the backward the place of each maximum in a byte instead of the
  sums themselves. On the CPU maxima and places are taken where the sums of an image lie in cache;
  on a device after the kernel of the convolution.
- `int8_conv2d_gradient`: on a device patches (im2col), then the kernel of the integer products; on
  the CPU no patches are made.
- `int8_unpool`: on a device four masked writes; the errors and places are read four times, the
  result is written once.
- `int8_gradient_update_`: the gradient's highest `b_bp` bits are subtracted; exponents play no
  part. On the CPU one call; on a device the kernels of range and requantisation, then torch's
  subtraction.

NITI: Wang et al., arXiv:2009.13108 (backward pass).
"""
# mypy: disable-error-code="return"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zo_kernels.geometry import Pair, conv_size, empty_output, geometry, kernel_size
from zo_kernels.int8 import check_rounding
from zo_kernels.ops.checks import check_depth, check_images, check_operands, check_pair, check_size
from zo_kernels.registry import check_in_place, check_tensor, op

MIN_BITS, MAX_BITS = -24, 7


def _fake_matmul(a: Tensor, b: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    acc = a.new_empty((a.shape[0], b.shape[1]), dtype=torch.int32)
    return acc, acc.new_empty(())


@op(fake=_fake_matmul)
def int8_matmul(a: Tensor, b: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`a b`, and its bits.

    Args:
        a: `[M, K]` int8 in [-127, 127], K at most 133,144; any strides, as for b.
        b: `[K, N]` int8.
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[M, N]` int32, and `[]` int32: its `int8_range`.
    Determinism: equal on all backends, for any launch.
    Source: NITI (arXiv:2009.13108).
    """
    check_tensor("a", a, dtype=[torch.int8])
    check_tensor("b", b, dtype=[torch.int8], device=a.device)
    for name, t in (("a", a), ("b", b)):
        if t.ndim != 2:
            raise ValueError(f"{name} must have two dimensions, got shape {list(t.shape)}")
    check_tensor("b", b, shape=[a.shape[1], b.shape[1]])
    check_depth(a.shape[1])


def _fake_max_pool(
    x: Tensor, w: Tensor, halves: int, stride: Pair, padding: Pair, dilation: Pair, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    geo = geometry(stride, padding, dilation)
    acc = empty_output(x, w, halves, False, geo, True, torch.int32)
    return acc, acc.new_empty(halves), torch.empty_like(acc, dtype=torch.uint8)


@op(fake=_fake_max_pool)
def int8_conv2d_max_pool(
    x: Tensor,
    w: Tensor,
    halves: int = 1,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    relu: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`acc = max over windows 2 x 2 of (x * w)`, the bits of each half, and where the maxima were.

    Args:
        x: `[H B, Ci, IH, IW]` int8 in [-127, 127], half after half; any strides, as for w.
        w: `[Co, Ci, KH, KW]` int8, the same for all halves; Ci KH KW at most 133,144. Only read.
        halves: H.
        stride, padding, dilation: an integer, or two (height, width); zeros are padded.
        relu: apply it to the maxima.
        backend: "auto", "triton", "numba" or "reference".
    Returns: as `int8_paired_conv2d` with `pool`: `[H B, Co, OH // 2, OW // 2]` int32 and `[H]`
        int32; and uint8 like the first, `2 i + j` of the first maximum in its window (before the
        ReLU, which moves no maximum that it lets through).
    Determinism: equal on all backends, for any launch and memory format.
    Source: NITI (arXiv:2009.13108).
    """
    check_operands(x, w, 4, "four")
    check_images(x, w)
    check_pair(x, w, None, None, 0, halves, False, 0.0, 1)
    check_size(x, w, geometry(stride, padding, dilation), True)


def _fake_gradient(error: Tensor, x: Tensor, kernel: Pair, **_: Any) -> Tensor:
    shape = (error.shape[1], x.shape[1], *kernel_size(kernel))
    return x.new_empty(shape, dtype=torch.int32)


@op(fake=_fake_gradient)
def int8_conv2d_gradient(
    error: Tensor,
    x: Tensor,
    kernel: Pair,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    backend: str = "auto",
) -> Tensor:
    """`G = err^T x`, the weight gradient of a convolution.

    Args:
        error: `[B, Co, OH, OW]` int8 in [-127, 127], of the sums; any strides, as for x.
            B OH OW at most 133,144.
        x: `[B, Ci, IH, IW]` int8 in [-127, 127], the input.
        kernel: of the weight, an integer or two (height, width).
        stride, padding, dilation: those of the forward; zeros were padded.
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[Co, Ci, KH, KW]` int32, contiguous.
    Determinism: equal on all backends, for any launch and memory format.
    Source: NITI (arXiv:2009.13108).
    """
    check_tensor("x", x, dtype=[torch.int8])
    check_tensor("error", error, dtype=[torch.int8], device=x.device)
    for name, t in (("x", x), ("error", error)):
        if t.ndim != 4:
            raise ValueError(f"{name} must have four dimensions, got shape {list(t.shape)}")
    size, geo = kernel_size(kernel), geometry(stride, padding, dilation)
    if 0 in x.shape[1:] or error.shape[1] == 0:
        raise ValueError(
            f"only the batch may be empty, got shapes {list(error.shape)} of error and "
            f"{list(x.shape)} of x"
        )
    height, width = conv_size(x.shape[2:], size, geo)
    check_tensor("error", error, shape=[x.shape[0], error.shape[1], height, width])
    check_depth(error.shape[0] * height * width)


def _fake_unpool(error: Tensor, size: Sequence[int], **_: Any) -> Tensor:
    return error.new_empty((*error.shape[:2], *size))


@op(fake=_fake_unpool)
def int8_unpool(
    error: Tensor, places: Tensor, size: Sequence[int], *, backend: str = "auto"
) -> Tensor:
    """`out[b, c, 2 h + p // 2, 2 w + p % 2] = error[b, c, h, w]`, p the place; 0 elsewhere.

    Args:
        error: `[B, C, H, W]` int8, of the maxima; any strides, as for places.
        places: `[B, C, H, W]` uint8 in [0, 3], of `int8_conv2d_max_pool`.
        size: (height, width) of the result: 2 H and 2 W, or one more.
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[B, C, *size]` int8, contiguous.
    Determinism: a copy.
    """
    check_tensor("error", error, dtype=[torch.int8])
    if error.ndim != 4:
        raise ValueError(f"error must have four dimensions, got shape {list(error.shape)}")
    check_tensor("places", places, shape=error.shape, dtype=[torch.uint8], device=error.device)
    wanted = [[2 * n, 2 * n + 1] for n in error.shape[2:]]
    if len(size) != 2 or any(n not in known for n, known in zip(size, wanted, strict=True)):
        raise ValueError(
            f"size must be (height, width) in {wanted[0]} and {wanted[1]}, got {list(size)}"
        )


@op(mutates=("w",))
def int8_gradient_update_(
    w: Tensor,
    gradient: Tensor,
    *,
    b_bp: int,
    rounding: str = "pseudo",
    key: Tensor | None = None,
    tensor: int = 0,
    backend: str = "auto",
) -> None:
    """Update a weight in place: `w = clip(w - clip(R(G, s)))`, `s = max(0, bits(G) - b_bp)`.

    Args:
        w: int8 in [-127, 127], any shape and strides.
        gradient: int32 like w.
        b_bp: bits of an update, in [-24, 7]: where it is not positive, only entries that round up
            from below one unit move a weight.
        rounding: R: "nearest", "pseudo" or "stochastic" (noise of purpose "rounding").
        key: `[2]` int64, (seed, step); needed by "stochastic".
        tensor: index of w in the model, the second counter word of the noise.
        backend: "auto", "triton", "numba" or "reference".
    Determinism: equal on all backends, for any launch and memory format.
    Source: NITI (arXiv:2009.13108).
    """
    check_tensor("w", w, dtype=[torch.int8])
    check_in_place("w", w)
    check_tensor("gradient", gradient, shape=w.shape, dtype=[torch.int32], device=w.device)
    if not MIN_BITS <= b_bp <= MAX_BITS:
        raise ValueError(f"b_bp must be in [{MIN_BITS}, {MAX_BITS}], got {b_bp}")
    check_rounding(rounding, key, w.shape, tensor, 0, w.device)
