"""CPU twin of `zo_kernels.paired_layer_norm`: torch's own kernel, half by half."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def paired_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    halves: int,
    epsilon: float,
    relu: bool = False,
) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    weights, biases = (None if t is None else t.float() for t in (weight, bias))
    for h, (x_h, y_h) in enumerate(zip(x.chunk(halves), y.chunk(halves), strict=True)):
        w_h, b_h = (None if t is None else t[h] for t in (weights, biases))
        y_h.copy_(F.layer_norm(x_h, x.shape[-1:], w_h, b_h, epsilon))
    return y.relu_() if relu else y
