"""Reference of `zo_kernels.integer_softmax_error`: softmax minus the one-hot label, in integers."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from zo_kernels.int8 import ERROR_BITS, ERROR_EXPONENT, check_target
from zo_kernels.reference.int8_loss import powers
from zo_kernels.reference.integer import clip, round_shift, rounding_words


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


__all__ = ["integer_softmax_error"]
