"""Reference of `zo_kernels.int8_perturbed_weights`: the halves `clip(w +- z_q)`."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.reference.integer import clip
from zo_kernels.reference.sample import sample
from zo_kernels.reference.weights import empty_halves


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


__all__ = ["int8_perturbed_weights", "sparse_noise"]
