"""Reference of `zo_kernels.integer_cross_entropy`: base-2 cross-entropy in fixed point."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

from zo_kernels.int8 import BAD_LABEL, check_target
from zo_kernels.reference.integer import exp2, log2, scaled


def powers(logits: Tensor, exponent: Tensor, fraction_bits: int) -> tuple[Tensor, Tensor]:
    """`d_j = p_max - p_j` `[H, B, C]` with F fractional bits, and `2^-d_j` in units of 2^-30."""
    q = logits.long()
    below = q.amax(2, keepdim=True) - q
    d = scaled(below, rearrange(exponent, "h -> h 1 1"), fraction_bits)
    return d, exp2(d, fraction_bits)


def integer_cross_entropy(
    logits: Tensor, exponent: Tensor, target: Tensor, *, fraction_bits: int = 12
) -> Tensor:
    known = (target >= 0) & (target < logits.shape[2])
    if target.device.type == "cpu":
        check_target(target, logits.shape[2])
    if logits.numel() == 0:
        return torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    d, y = powers(logits, exponent, fraction_bits)
    at = repeat(torch.where(known, target, 0), "b -> h b 1", h=logits.shape[0])
    losses = d.gather(2, at).squeeze(2) + log2(y.sum(2), fraction_bits)
    return torch.where(known, losses, BAD_LABEL).sum(1)


__all__ = ["integer_cross_entropy", "powers"]
