"""CPU twin of `zo_kernels.paired_conv2d`: halves staged by the fast sweep, torch's convolution."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zo_kernels.cpu.weights import perturbed_weights
from zo_kernels.geometry import Geometry, Pair, geometry
from zo_kernels.reference.conv import paired_convolutions
from zo_kernels.reference.linear import to_tf32


def convolution(x: Tensor, w: Tensor, geo: Geometry, precision: str) -> Tensor:
    """A convolution of fp32; the other precisions as `reference.paired_linear.product` has them."""
    conv = partial(F.conv2d, stride=geo.stride, padding=geo.padding, dilation=geo.dilation)
    if precision == "ieee":
        return conv(x, w)
    x_high, w_high = to_tf32(x), to_tf32(w)
    if precision == "tf32":
        return conv(x_high, w_high)
    x_low, w_low = to_tf32(x - x_high), to_tf32(w - w_high)
    return conv(x_low, w_high) + conv(x_high, w_low) + conv(x_high, w_high)


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
    geo = geometry(stride, padding, dilation)
    perturbed = partial(perturbed_weights, key=key, eps=eps, start=start, stop=stop, noise=noise)
    halves = perturbed(w, tensor=tensor, scale=scale, dtype=compute_dtype or x.dtype)
    if bias is not None:
        assert bias_tensor is not None
        bias = perturbed(bias, tensor=bias_tensor, scale=bias_scale, dtype=torch.float32)
    given = {"shared": shared, "relu": relu, "pool": pool}
    return paired_convolutions(x, halves, bias, geo, convolution, precision=precision, **given)
