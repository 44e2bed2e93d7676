"""Reference of `zo_kernels.integer_projected_sign`: the sign of L+ - L- of each query."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def integer_projected_sign(losses: Tensor) -> Tensor:
    pairs = rearrange(losses, "(q half) -> q half", half=2)
    plus, minus = pairs.unbind(1)
    return (plus > minus).to(torch.int32) - (plus < minus).to(torch.int32)


__all__ = ["integer_projected_sign"]
