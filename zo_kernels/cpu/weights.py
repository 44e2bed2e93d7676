"""CPU twin of `zo_kernels.perturbed_weights`: a fused sweep for fp32 weights; and of `perturb_`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from zo_kernels.cpu.kernels import perturb_sweep
from zo_kernels.cpu.noise import sample
from zo_kernels.cpu.sweeps import Walk, counter_words, memory_of, over_threads, walk_of
from zo_kernels.layout import empty_halves
from zo_kernels.reference.weights import compute_dtype, write_halves


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
    count = stop - start
    if w.dtype != torch.float32 or dtype not in (None, torch.float32):
        return _from_noise(w, key, eps, tensor, start, stop, noise, scale, dtype)
    walk = walk_of(w.shape, w.stride(), noise)
    if walk is None or not (walk.contiguous or walk.dense):
        # The same sweep over contiguous copies: the memory format does not show in the bits.
        halves = torch.empty((count, *w.shape), dtype=w.dtype, device="cpu")
        walk = walk_of(halves.shape[1:], halves.stride()[1:], noise)
        assert walk is not None
        sweep_halves(halves, w.contiguous(), walk, key, eps, tensor, start, stop, scale)
        return empty_halves(w, count, dtype).copy_(halves)
    out = (
        torch.empty((count, *w.shape), dtype=w.dtype, device="cpu")
        if walk.contiguous
        else empty_halves(w, count, dtype)
    )
    sweep_halves(out, w, walk, key, eps, tensor, start, stop, scale)
    return out


def sweep_halves(
    out: Tensor,
    w: Tensor,
    walk: Walk,
    key: Tensor,
    eps: Tensor,
    tensor: int,
    start: int,
    stop: int,
    scale: float,
    first_row: int = 0,
) -> None:
    """The fused sweep of an fp32 weight; each half of `out` lies as the weight does."""
    size = w.numel()
    if walk.contiguous:
        source, target = w.numpy().reshape(-1), out.numpy().reshape(-1)
    else:
        source, target = memory_of(w, size), memory_of(out, size * out.shape[0])
    amplitude = np.float32(np.float32(eps.item()) * np.float32(scale))
    for query in range(start // 2, (stop + 1) // 2):
        plus, minus = 2 * query >= start, 2 * query + 1 < stop
        first = (2 * query - start) * size if plus else 0
        args = (
            source,
            target[first:] if first else target,
            plus,
            minus,
            size if plus and minus else 0,
            amplitude,
            (*walk.layout, first_row),
            (walk.kind, walk.lanes, *counter_words(key, tensor, query)),
        )
        over_threads(perturb_sweep, args, walk, first_row)


def _from_noise(
    w: Tensor,
    key: Tensor,
    eps: Tensor,
    tensor: int,
    start: int,
    stop: int,
    noise: str,
    scale: float,
    dtype: torch.dtype | None,
) -> Tensor:
    """Other dtypes: fast noise, the reference's arithmetic."""
    out = empty_halves(w, stop - start, dtype)
    wide = compute_dtype(w)
    amplitude = eps.to(wide) * torch.tensor(scale, dtype=wide, device="cpu")
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
    w.add_(alpha.to(wide) * z.to(wide))  # in the wider of the two dtypes, then rounded once
