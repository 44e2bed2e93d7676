"""Reference of `zo_kernels.paired_batch_norm`: moments and result in fp32, half by half.

A mean is taken twice, of x and of what exceeds it: the first loses digits where it is large.
"""

from __future__ import annotations

import torch
from einops import rearrange
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
    x_h = rearrange(x.float(), "(h b) c ... -> h b c (...)", h=halves)
    if mean is None or var is None:
        batch_mean = x_h.mean((1, 3))
        batch_mean += (x_h - rearrange(batch_mean, "h c -> h 1 c 1")).mean((1, 3))
        centred = x_h - rearrange(batch_mean, "h c -> h 1 c 1")
        batch_var = centred.square().mean((1, 3))
    else:
        batch_mean, batch_var = (t.detach().float().expand(halves, -1) for t in (mean, var))
        centred = x_h - rearrange(batch_mean, "h c -> h 1 c 1")
    y = centred * rearrange((batch_var + epsilon).rsqrt(), "h c -> h 1 c 1")
    if weight is not None:
        y = y * rearrange(weight.float(), "h c -> h 1 c 1")
    if bias is not None:
        y = y + rearrange(bias.float(), "h c -> h 1 c 1")
    if relu:
        y = y.relu()
    # In the memory format of x.
    return torch.empty_like(x).copy_(y.reshape(x.shape)), batch_mean, batch_var
