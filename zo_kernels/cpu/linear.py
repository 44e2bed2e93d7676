"""CPU twin of `zo_kernels.paired_linear`: halves staged by the fast sweep, torch's products."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from zo_kernels.cpu.weights import perturbed_weights
from zo_kernels.reference.linear import paired_products


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
