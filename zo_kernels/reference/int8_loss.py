"""Reference of `zo_kernels.integer_cross_entropy`, base-2 in fixed point, of its sign and error."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

from zo_kernels.int8 import BAD_LABEL, ERROR_BITS, ERROR_EXPONENT, check_target
from zo_kernels.reference.integer import clip, exp2, log2, round_shift, rounding_words, scaled


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


def integer_projected_sign(losses: Tensor) -> Tensor:
    pairs = rearrange(losses, "(q half) -> q half", half=2)
    plus, minus = pairs.unbind(1)
    return (plus > minus).to(torch.int32) - (plus < minus).to(torch.int32)


def integer_softmax_error(
    logits: Tensor,
    exponent: Tensor,
    target: Tensor,
    *,
    fraction_bits: int = 12,
    rounding: str = "stochastic",
    key: Tensor | None = None,
    tensor: int = 0,
    query: int = 0,
) -> tuple[Tensor, Tensor]:
    halves, batch, classes = logits.shape
    if target.device.type == "cpu":
        check_target(target, classes)
    total = torch.full((halves,), ERROR_EXPONENT, dtype=torch.int32, device=logits.device)
    if logits.numel() == 0:
        return torch.empty_like(logits, memory_format=torch.contiguous_format), total
    _, y = powers(logits, exponent, fraction_bits)
    error = (y << ERROR_BITS) // y.sum(2, keepdim=True)
    column = torch.arange(classes, device=logits.device)
    error -= (column == rearrange(target, "b -> b 1")).long() << ERROR_BITS
    words = rounding_words((batch, classes), key, rounding, tensor, query)
    error = round_shift(error, ERROR_BITS + ERROR_EXPONENT, rounding, words)
    return clip(error).to(torch.int8).contiguous(), total
