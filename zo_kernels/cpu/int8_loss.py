"""CPU twins of the integer loss and its error, compiled; its sign is the reference's."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.cpu.int8_kernels import cross_entropy, softmax_error
from zo_kernels.cpu.noise import sample
from zo_kernels.int8 import ERROR_EXPONENT, ROUNDINGS, check_target
from zo_kernels.reference.int8_loss import integer_projected_sign as integer_projected_sign
from zo_kernels.reference.integer import rounding_words


def integer_cross_entropy(
    logits: Tensor, exponent: Tensor, target: Tensor, *, fraction_bits: int = 12
) -> Tensor:
    check_target(target, logits.shape[2])
    losses = torch.empty(logits.shape[0], dtype=torch.int64, device="cpu")
    logits, exponent, target = logits.contiguous(), exponent.contiguous(), target.contiguous()
    where = (logits.numpy(), exponent.numpy(), target.numpy())
    cross_entropy(*where, fraction_bits, losses.numpy())
    return losses


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
    check_target(target, classes)
    noise = rounding_words((batch, classes), key, rounding, tensor, query, sample)
    words = (
        torch.empty((0, 0), dtype=torch.int64, device="cpu") if noise is None else noise
    ).numpy()
    out = torch.empty(logits.shape, dtype=torch.int8, device="cpu")
    logits, exponent, target = logits.contiguous(), exponent.contiguous(), target.contiguous()
    where = (logits.numpy(), exponent.numpy(), target.numpy())
    softmax_error(*where, fraction_bits, ROUNDINGS[rounding], words, out.numpy())
    return out, torch.full((halves,), ERROR_EXPONENT, dtype=torch.int32, device="cpu")
