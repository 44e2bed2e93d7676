"""Reference of `zo_kernels.int8_update_`: the integer update of all head parameters, in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.int8 import update_shift
from zo_kernels.reference.int8_weights import sparse_noise
from zo_kernels.reference.integer import clip, round_shift, rounding_words


@torch.no_grad()
def int8_update_(
    params: Sequence[Tensor],
    key: Tensor,
    g: Tensor,
    *,
    tensors: Sequence[int],
    p_zero: float = 0.0,
    r_max: int = 1,
    b_zo: int = 1,
    rounding: str = "nearest",
) -> None:
    s = update_shift(g.numel(), r_max, b_zo)
    for w, tensor in zip(params, tensors, strict=True):
        total = torch.zeros(w.shape, dtype=torch.int64, device=w.device)
        for q in range(g.numel()):
            z = sparse_noise(w, key, tensor, q, p_zero, r_max)
            total += g[q].long() * z
        words = rounding_words(w.shape, key, rounding, tensor)
        w.copy_(clip(w.long() - round_shift(total, s, rounding, words)))


__all__ = ["int8_update_"]
