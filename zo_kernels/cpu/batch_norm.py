"""CPU twin of `zo_kernels.paired_batch_norm`: torch's own kernels, half by half."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zo_kernels.layout import dense


def paired_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    halves: int,
    epsilon: float,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense(x)
    y = torch.empty_like(x)
    if mean is None or var is None:
        shape = halves, x.shape[1]
        batch_mean, batch_var = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    else:
        batch_mean, batch_var = (t.detach().float().expand(halves, -1) for t in (mean, var))
    if x.numel() == 0:
        return y, batch_mean, batch_var
    axes = [0, *range(2, x.ndim)]
    weights, biases = (None if t is None else t.float() for t in (weight, bias))
    for h, (x_h, y_h) in enumerate(zip(x.chunk(halves), y.chunk(halves), strict=True)):
        if mean is None:
            batch_var[h], batch_mean[h] = torch.var_mean(x_h.float(), axes, correction=0)
        w_h, b_h = (None if t is None else t[h] for t in (weights, biases))
        moments = batch_mean[h], batch_var[h]
        y_h.copy_(F.batch_norm(x_h, *moments, w_h, b_h, training=False, eps=epsilon))
    return y.relu_() if relu else y, batch_mean, batch_var
