"""`G = err^T x` of an int8 convolution, summed over images and pixels in int32.

`G[o, i, u, v] = sum_{b, h, w} err[b, o, h, w] x[b, i, h s + u d - p, w s + v d - p]`: the weight
gradient of the integer tail. On a device: patches (im2col), then the kernel of the integer
products; on the CPU no patches are made.

NITI: Wang et al., arXiv:2009.13108 (backward pass of a convolution).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.geometry import Geometry, Pair, conv_size, geometry, kernel_size, patches
from zo_kernels.ops.checks import check_depth
from zo_kernels.ops.int8_matmul import int8_matmul
from zo_kernels.registry import check_tensor, register, resolve_backend, twin


def _launch(error: Tensor, x: Tensor, kernel: tuple[int, int], geo: Geometry) -> Tensor:
    rows = error.permute(0, 2, 3, 1).flatten(0, 2)
    sums, _ = int8_matmul(patches(x, kernel, geo), rows, backend="triton")
    return sums.t().reshape(error.shape[1], x.shape[1], *kernel).contiguous()


def _implementation(
    error: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    backend: str,
) -> Tensor:
    backend = resolve_backend(backend, x.device)
    if x.numel() == 0:
        return _fake(error, x, kernel).zero_()
    if backend == "triton":
        return _launch(error, x, kernel_size(kernel), geometry(stride, padding, dilation))
    given = {"stride": stride, "padding": padding, "dilation": dilation}
    gradient: Tensor = twin("int8_conv2d_gradient", backend)(error, x, kernel, **given)
    return gradient


def _fake(error: Tensor, x: Tensor, kernel: list[int], *_: Any) -> Tensor:
    shape = (error.shape[1], x.shape[1], *kernel)
    return torch.empty(shape, dtype=torch.int32, device=x.device)


_OP = register(
    "int8_conv2d_gradient(Tensor error, Tensor x, int[] kernel, int[] stride, int[] padding, "
    "int[] dilation, str backend) -> Tensor",
    _implementation,
    _fake,
)


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
    gradient: Tensor = _OP(error, x, size, *geo, backend)
    return gradient


__all__ = ["int8_conv2d_gradient"]
