"""Reference of `zo_kernels.paired_layer_norm`: moments and result in fp32.

A mean is taken twice, of x and of what exceeds it: the first loses digits where it is large.
"""

from __future__ import annotations

from einops import rearrange
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
    x_h = rearrange(x.float(), "(h b) ... d -> h (b ...) d", h=halves)
    centred = x_h - x_h.mean(-1, keepdim=True)
    centred = centred - centred.mean(-1, keepdim=True)
    y = centred * (centred.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    if weight is not None:
        y = y * rearrange(weight.float(), "h d -> h 1 d")
    if bias is not None:
        y = y + rearrange(bias.float(), "h d -> h 1 d")
    if relu:
        y = y.relu()
    return y.reshape(x.shape).to(x.dtype)
