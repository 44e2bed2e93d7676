"""The loss of integer training, its projected gradient and its error, in fixed point.

`integer_cross_entropy`: `log2 sum_j 2^p_j - p_y`, summed over the batch; no float takes part.

`p_j = 47274 q_j 2^e / 2^15` is the logit `q_j 2^e` times log2(e) = 1.44269 to five digits, so this
is the cross-entropy in bits. With `d_j = p_max - p_j` a sample's loss is `d_y + log2 sum_j 2^-d_j`;
`d`, the logarithm and the loss have F fractional bits, rounded to nearest, powers have 30. An error
of at most 1.5 units of 2^-F a sample: half a unit from `d_y`, from the other `d_j` and from the
logarithm. Powers and logarithms are integer products (`zo_kernels.triton.integer`), the same
everywhere; no table in memory.

A program owns a block of rows of one half; halves are summed by atomic additions of integers, whose
order does not show. Traffic: the logits, read twice, once from cache. Operations: F high products a
logit, F + 1 a sample.

`integer_softmax_error`: `softmax(logits) - onehot(target)` as int8, the integer gradient of it.

Powers `y_j = 2^-d_j` are those of `integer_cross_entropy`; `error_j = y_j 2^23 / sum y`, truncated,
less 2^23 for the label, shifted right by 16 with rounding: a tensor of exponent -7, in [-127, 127].
NITI makes it from 2^p - 1 and a Taylor form for small exponents, with 11 bits before a stochastic
shift by 4; one form in fixed point serves all exponents, and the 23 bits let a stochastic rounding
keep small errors on average.

A program owns a block of rows. Traffic: the logits read three times from cache, the errors written.

ElasticZO-INT8 (arXiv:2501.04287), abstract: the ZO gradient from integer cross-entropy values.
NITI: Wang et al., arXiv:2009.13108 (error of the loss).
"""
# mypy: disable-error-code="return"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.int8 import check_logits, check_rounding
from zo_kernels.registry import check_tensor, op


def _fake_losses(logits: Tensor, **_: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


@op(fake=_fake_losses)
def integer_cross_entropy(
    logits: Tensor,
    exponent: Tensor,
    target: Tensor,
    *,
    fraction_bits: int = 12,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of int8 logits in bits, summed over the batch, in units of 2^-F.

    `sum_b log2 sum_j 2^p_bj - p_by`, `p = 47274 q 2^e / 2^15`; within 1.5 units a sample.

    Args:
        logits: `[H, B, C]` int8, each half with its own exponent; B <= 2^24.
        exponent: `[H]` int32; on the device it is clamped to [-24, 8], which saturates: above,
            all but the largest logits vanish; below, all classes are alike.
        target: `[B]` int64 in [0, C). On the CPU a label outside is an error; a GPU cannot raise
            without waiting, and adds 2^38 for it to the losses of all halves alike.
        fraction_bits: F in [0, 16]; 0 is integers alone.
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[H]` int64 >= 0, below 2^58 (B = 0 gives 0).
    Determinism: equal on all backends, for any launch.
    Source: arXiv:2501.04287, abstract (ElasticZO-INT8); 47274 / 2^15 from NITI (arXiv:2009.13108).
    """
    check_logits(logits, exponent, target, fraction_bits)


def _fake_sign(losses: Tensor, **_: Any) -> Tensor:
    return losses.new_empty(losses.shape[0] // 2, dtype=torch.int32)


@op(fake=_fake_sign)
def integer_projected_sign(losses: Tensor, *, backend: str = "auto") -> Tensor:
    """`g_q = sign(L+ - L-)`, by comparison: no difference that could overflow.

    Args:
        losses: `[2 Q]` int64, of `integer_cross_entropy`; the + of a query before its -.
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[Q]` int32 in {-1, 0, 1}.
    Determinism: equal on all backends.
    Source: arXiv:2501.04287, abstract (ElasticZO-INT8).
    """
    check_tensor("losses", losses, dtype=[torch.int64], vector=True)
    if losses.numel() % 2:
        raise ValueError(f"losses must come in pairs, got {losses.numel()}")


def _fake_error(logits: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), logits.new_empty(logits.shape[0], dtype=torch.int32)


@op(fake=_fake_error)
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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`softmax(logits) - onehot(target)`, int8 of exponent -7, for each half.

    Args:
        logits: `[H, B, C]` int8; B <= 2^24.
        exponent: `[H]` int32, clamped to [-24, 8] on the device.
        target: `[B]` int64 in [0, C). On the CPU a label outside is an error; on a GPU nothing is
            subtracted for it.
        fraction_bits: F in [0, 16], of the base-2 logits; as in `integer_cross_entropy`.
        rounding: "nearest", "pseudo" or "stochastic" (of noise of purpose "rounding").
        key: `[2]` int64, (seed, step); needed by "stochastic".
        tensor, query: place in the noise, whose rows are the batch: halves share it.
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[H, B, C]` int8 in [-127, 127], contiguous; `[H]` int32 exponents, all -7.
    Determinism: equal on all backends, for any launch.
    Source: NITI (arXiv:2009.13108), error of the loss, here without its Taylor form.
    """
    check_logits(logits, exponent, target, fraction_bits)
    check_rounding(rounding, key, logits.shape[1:], tensor, query, logits.device)
