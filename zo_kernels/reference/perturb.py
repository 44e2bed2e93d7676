"""Reference of `zo_kernels.perturb_`: `w += alpha * z` in place (the MeZO-style walk)."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.reference.sample import sample
from zo_kernels.reference.weights import compute_dtype


@torch.no_grad()
def perturb_(
    w: Tensor,
    key: Tensor,
    alpha: Tensor,
    *,
    tensor: int,
    query: int = 0,
    noise: str = "normal",
) -> None:
    wide = compute_dtype(w)
    z = sample(w.shape, key, tensor=tensor, query=query, noise=noise)
    w.copy_(w.to(wide) + alpha.to(wide) * z.to(wide))


__all__ = ["perturb_"]
