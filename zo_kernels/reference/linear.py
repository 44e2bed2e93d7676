"""Reference of `zo_kernels.paired_linear`: `y_h = x_h (w +- eps scale z_w)^T + b_h`, staged."""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange, repeat
from torch import Tensor

from zo_kernels.reference.weights import perturbed_weights


def to_tf32(t: Tensor) -> Tensor:
    """fp32 with a mantissa of 10 bits: tensor cores ignore the low ones."""
    bits = t.contiguous().view(torch.int32) & -0x2000
    return torch.where(t.isfinite(), bits.view(torch.float32), t)


def product(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """`a @ b` of fp32 as tensor cores make it; tf32x3 drops the product of the low parts."""
    if precision == "ieee":
        return a @ b
    a_high, b_high = to_tf32(a), to_tf32(b)
    if precision == "tf32":
        return a_high @ b_high
    a_low, b_low = to_tf32(a - a_high), to_tf32(b - b_high)
    high, low = a_high @ b_high, a_low @ b_high + a_high @ b_low
    return high + torch.where(high.isfinite(), low, 0.0)  # the low part of an infinity is NaN


def paired_products(
    x: Tensor,
    halves: Tensor,
    bias: Tensor | None,
    *,
    shared: bool,
    precision: str,
    relu: bool,
) -> Tensor:
    """`x_h @ halves[h]^T + bias[h]` in fp32, rounded once to the dtype of `halves`."""
    count, dtype = halves.shape[0], halves.dtype
    x = x.to(dtype).float()
    if shared:
        x = repeat(x, "b k -> h b k", h=count)
    else:
        x = x.reshape(count, x.shape[0] // count, x.shape[1])
    y = product(x, rearrange(halves.float(), "h n k -> h k n"), precision)
    if bias is not None:
        y = y + rearrange(bias, "h n -> h 1 n")
    if relu:
        y = y.relu()
    return rearrange(y.to(dtype), "h b n -> (h b) n")


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
    perturbed = partial(perturbed_weights, key=key, eps=eps, start=start, stop=stop, noise=noise)
    halves = perturbed(w, tensor=tensor, scale=scale, dtype=compute_dtype or x.dtype)
    if bias is not None:
        assert bias_tensor is not None
        bias = perturbed(bias, tensor=bias_tensor, scale=bias_scale, dtype=torch.float32)
    return paired_products(x, halves, bias, shared=shared, precision=precision, relu=relu)
