"""Reference of `zo_kernels.paired_conv2d`: halves staged, patches of x as columns of a product."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from zo_kernels.geometry import Geometry, Pair, conv_size, empty_output, geometry
from zo_kernels.reference.linear import product
from zo_kernels.reference.weights import perturbed_weights

Convolve = Callable[[Tensor, Tensor, Geometry, str], Tensor]


def unfolded(x: Tensor, w: Tensor, geo: Geometry, precision: str) -> Tensor:
    """A convolution of fp32 as one product a row of x."""
    height, _ = conv_size(x.shape[2:], w.shape[2:], geo)
    columns = F.unfold(x, w.shape[2:], geo.dilation, geo.padding, geo.stride)
    y = product(rearrange(w, "o i h w -> o (i h w)"), columns, precision)
    return rearrange(y, "b o (h w) -> b o h w", h=height)


def paired_convolutions(
    x: Tensor,
    halves: Tensor,
    bias: Tensor | None,
    geo: Geometry,
    convolve: Convolve,
    *,
    shared: bool,
    precision: str,
    relu: bool,
    pool: bool,
) -> Tensor:
    """`x_h * halves[h] + bias[h]` in fp32, rounded once to the dtype of `halves`."""
    count, dtype = halves.shape[0], halves.dtype
    out = empty_output(x, halves[0], count, shared, geo, pool, dtype)
    for half, (w, rows) in enumerate(zip(halves, out.tensor_split(count), strict=True)):
        x_half = x if shared else x.tensor_split(count)[half]
        y = convolve(x_half.to(dtype).float(), w.float(), geo, precision)
        if bias is not None:
            y = y + rearrange(bias[half], "o -> o 1 1")
        if relu:
            y = y.relu()
        rows.copy_(F.max_pool2d(y, 2) if pool else y)
    return out


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
    return paired_convolutions(x, halves, bias, geo, unfolded, precision=precision, **given)
