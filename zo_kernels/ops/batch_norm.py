"""`y_h = (x_h - mean_h) / sqrt(var_h + epsilon) * weight_h + bias_h`: batch norm, half by half.

Each half has its own batch statistics, or all use running ones. Data flow: one read of x gives
partial moments for every (half, channel, split); a small kernel merges the splits; one read and
one write make y. With running statistics only the last of the three runs.

Moments: every lane of a tile keeps the mean and the sum of squared deviations of its values
(Welford), of x less the first value of its channel; lanes, then splits, are merged by Chan's
formula. So neither a large mean nor a wrong first guess cancels digits.

Floor: x read twice and y written once, `3 N` elements (`2 N` with running statistics); about 10
operations an element for the statistics and 4 for y. Staged parameters and statistics are small.

Ioffe and Szegedy 2015 (arXiv:1502.03167); Chan, Golub and LeVeque 1983.
"""
# mypy: disable-error-code="return"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.layout import dense
from zo_kernels.ops.checks import check_affine, check_epsilon, check_halves, check_no_grad
from zo_kernels.registry import PRODUCT_DTYPES, check_tensor, op


def _fake(x: Tensor, halves: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = (x.new_empty((halves, x.shape[1]), dtype=torch.float32) for _ in range(2))
    return torch.empty_like(dense(x)), mean, var


@op(fake=_fake)
def paired_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    halves: int,
    epsilon: float,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    relu: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`y_h = (x_h - mean_h) / sqrt(var_h + epsilon) * weight_h + bias_h`, for every half.

    Moments and y are made in fp32, y is rounded once. One value a channel has variance 0. A channel
    with NaN or an infinite value gives NaN. Moving running statistics is left to the caller.

    Args:
        x: `[H B, C, ...]` float32 or bfloat16, halves one after another; contiguous or channels
            last in memory (others are copied first). Only read.
        weight, bias: `[H, C]` float32 or bfloat16, staged for every half; None is 1 or 0.
        halves: H, how many halves the batch holds.
        epsilon: added to the variance; not negative.
        mean, var: `[C]` float32 or bfloat16, running statistics for all halves; None takes the
            statistics of each half.
        relu: apply it to the result (NaN stays).
        backend: "auto", "triton", "numba" or "reference".
    Returns: `y` like x in dtype and memory format; the mean and the biased variance that were used,
        `[H, C]` float32 (views of `mean` and `var` where these are float32).
    Determinism: bit-equal in every run on one backend; the order of sums depends on shape and
        memory format only.
    Source: arXiv:1502.03167, algorithm 1.
    """
    check_tensor("x", x, dtype=PRODUCT_DTYPES)
    if x.ndim < 2:
        raise ValueError(f"x must have at least two dimensions, got shape {list(x.shape)}")
    check_halves(x, halves)
    if (mean is None) != (var is None):
        raise ValueError("mean and var must be given together")
    for name, t in (("mean", mean), ("var", var)):
        if t is not None:
            check_tensor(
                name, t, shape=[x.shape[1]], dtype=PRODUCT_DTYPES, device=x.device, vector=True
            )
    if mean is None and x.numel() == 0 and x.shape[1]:
        raise ValueError(f"x must have at least one value a channel, got shape {list(x.shape)}")
    check_affine(x, weight, bias, [halves, x.shape[1]])
    check_epsilon(epsilon)
    check_no_grad("paired_batch_norm", x=x, weight=weight, bias=bias)
