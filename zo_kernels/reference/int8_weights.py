"""Reference of `zo_kernels.int8_perturbed_weights`, `clip(w +- z_q)`, and of `int8_update_`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.int8 import update_shift
from zo_kernels.layout import empty_halves
from zo_kernels.reference.integer import clip, round_shift, rounding_words
from zo_kernels.reference.noise import sample


def sparse_noise(
    w: Tensor, key: Tensor, tensor: int, query: int, p_zero: float, r_max: int
) -> Tensor:
    """`z_q` of a weight, int64."""
    return sample(
        w.shape,
        key,
        tensor=tensor,
        query=query,
        noise="sparse_int8",
        p_zero=p_zero,
        r_max=r_max,
    ).long()


def int8_perturbed_weights(
    w: Tensor,
    key: Tensor,
    *,
    tensor: int,
    start: int = 0,
    stop: int = 2,
    p_zero: float = 0.0,
    r_max: int = 1,
) -> Tensor:
    out = empty_halves(w, stop - start, torch.int8)
    for half in range(start, stop):
        z = sparse_noise(w, key, tensor, half // 2, p_zero, r_max)
        out[half - start].copy_(clip(w.long() - z if half % 2 else w.long() + z))
    return out


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
