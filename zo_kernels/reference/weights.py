"""Reference of `zo_kernels.perturbed_weights`: halves `w +- eps * scale * z_q`; and `perturb_`."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.layout import empty_halves
from zo_kernels.reference.noise import sample


def compute_dtype(w: Tensor) -> torch.dtype:
    """The dtype in which a weight is perturbed and updated: float64 stays, all else is fp32."""
    return torch.float64 if w.dtype == torch.float64 else torch.float32


def write_halves(
    out: Tensor, w: Tensor, amplitude: Tensor, start: int, query: int, z: Tensor
) -> None:
    """Write the halves of one query that `out` holds: `out[h - start] = w +- amplitude * z`."""
    shift = amplitude * z.to(amplitude.dtype)
    for half, sign in ((2 * query, 1), (2 * query + 1, -1)):
        if 0 <= half - start < out.shape[0]:
            out[half - start].copy_(w.to(amplitude.dtype) + sign * shift)


def perturbed_weights(
    w: Tensor,
    key: Tensor,
    eps: Tensor,
    *,
    tensor: int,
    start: int = 0,
    stop: int = 2,
    noise: str = "normal",
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    out = empty_halves(w, stop - start, dtype)
    wide = compute_dtype(w)
    amplitude = eps.to(wide) * torch.tensor(scale, dtype=wide, device=w.device)
    for query in range(start // 2, (stop + 1) // 2):
        z = sample(w.shape, key, tensor=tensor, query=query, noise=noise)
        write_halves(out, w, amplitude, start, query, z)
    return out


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
