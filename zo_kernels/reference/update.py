"""Reference of `zo_kernels.update_`: the in-place update of all head parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zo_kernels.reference.noise import sample
from zo_kernels.reference.weights import compute_dtype

Sample = Callable[..., Tensor]


def round_stochastically(x: Tensor, words: Tensor) -> Tensor:
    """fp32 -> bf16, up with probability equal to the fraction dropped.

    The lower 16 bits of the fp32 pattern are what bf16 drops: add a uniform 16-bit number (the
    upper half of a word of purpose "rounding") and truncate. Infinities and NaN are cast as they
    are.
    """
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    bits = (bits + (words >> 16)) & 0xFFFF0000
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32)
    return torch.where(torch.isfinite(x), signed.view(torch.float32), x).to(torch.bfloat16)


def updated(
    w: Tensor,
    key: Tensor,
    coeff: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    tensor: int,
    scale: float,
    noise: str,
    draw: Sample = sample,
) -> Tensor:
    """`w - lr * (scale * sum_q coeff_q z_q + weight_decay * w)`, in the dtype of `w`."""
    wide = compute_dtype(w)
    total = torch.zeros(w.shape, dtype=wide, device=w.device)
    for query in range(coeff.numel()):
        z = draw(w.shape, key, tensor=tensor, query=query, noise=noise)
        total += coeff[query].to(wide) * z.to(wide)
    total = total * torch.tensor(scale, dtype=wide, device=w.device)
    new = w.to(wide) - lr.to(wide) * (total + weight_decay.to(wide) * w.to(wide))
    if w.dtype == torch.bfloat16:
        words = draw(w.shape, key, tensor=tensor, noise="bits", purpose="rounding")
        return round_stochastically(new, words)
    return new


@torch.no_grad()
def update_(
    params: Sequence[Tensor],
    key: Tensor,
    coeff: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    skip: Tensor,
    *,
    tensors: Sequence[int],
    groups: Sequence[int],
    scales: Sequence[float],
    noise: str = "normal",
) -> None:
    for w, tensor, group, scale in zip(params, tensors, groups, scales, strict=True):
        new = updated(w, key, coeff, lr[group], weight_decay[group], tensor, scale, noise)
        w.copy_(torch.where(skip != 0, w, new))


__all__ = ["round_stochastically", "update_", "updated"]
