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

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.registry import check_tensor, register, resolve_backend, twin
from zo_kernels.triton.batch_norm import launch_moments, launch_normalize
from zo_kernels.triton.norms import DTYPES, check_affine, check_epsilon, check_halves, check_no_grad
from zo_kernels.triton.plan import channels_last, plan_of

Result = tuple[Tensor, Tensor, Tensor]


def _dense(x: Tensor) -> Tensor:
    """`x` in one of the two formats; others are copied."""
    return x if channels_last(x) else x.contiguous()


def _empty(x: Tensor, halves: int, given: bool) -> Result:
    """Given statistics are no result of the op: a result may not be one of its arguments."""
    shape = (0, 0) if given else (halves, x.shape[1])
    mean, var = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    return torch.empty_like(_dense(x)), mean, var


def _launch_paired_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    halves: int,
    epsilon: float,
    mean: Tensor | None,
    var: Tensor | None,
    relu: bool,
) -> Result:
    y, batch_mean, batch_var = _empty(x, halves, mean is not None)
    if y.numel() == 0:
        return y, batch_mean, batch_var
    plan = plan_of(x, halves)
    if mean is None or var is None:
        launch_moments(x, batch_mean, batch_var, halves, plan)
        mean, var = batch_mean, batch_var
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    launch_normalize(x, y, mean, var, weight, bias, epsilon, relu, halves, plan)
    return y, batch_mean, batch_var


def _implementation(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    halves: int,
    epsilon: float,
    mean: Tensor | None,
    var: Tensor | None,
    relu: bool,
    backend: str,
) -> Result:
    x = _dense(x.detach())
    weight, bias, mean, var = (None if t is None else t.detach() for t in (weight, bias, mean, var))
    backend = resolve_backend(backend, x.device)
    if backend == "triton":
        return _launch_paired_batch_norm(x, weight, bias, halves, epsilon, mean, var, relu)
    given = {"halves": halves, "epsilon": epsilon, "mean": mean, "var": var, "relu": relu}
    y, batch_mean, batch_var = twin("paired_batch_norm", backend)(x, weight, bias, **given)
    if mean is not None:
        _, batch_mean, batch_var = _empty(x[:0], halves, True)
    return y, batch_mean, batch_var


def _fake(x: Tensor, weight: Any, bias: Any, halves: int, epsilon: float, *args: Any) -> Result:
    return _empty(x, halves, args[0] is not None)


_OP = register(
    "paired_batch_norm(Tensor x, Tensor? weight, Tensor? bias, int halves, float epsilon, "
    "Tensor? mean, Tensor? var, bool relu, str backend) -> (Tensor, Tensor, Tensor)",
    _implementation,
    _fake,
)


def _check(x: Tensor, halves: int, mean: Tensor | None, var: Tensor | None) -> None:
    check_tensor("x", x, dtype=DTYPES)
    if x.ndim < 2:
        raise ValueError(f"x must have at least two dimensions, got shape {list(x.shape)}")
    check_halves("x", x, halves)
    if (mean is None) != (var is None):
        raise ValueError("mean and var must be given together")
    for name, t in (("mean", mean), ("var", var)):
        if t is not None:
            check_tensor(name, t, shape=[x.shape[1]], dtype=DTYPES, device=x.device, vector=True)
    if mean is None and x.numel() == 0 and x.shape[1]:
        raise ValueError(f"x must have at least one value a channel, got shape {list(x.shape)}")


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
) -> Result:
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
    _check(x, halves, mean, var)
    check_affine(x, weight, bias, [halves, x.shape[1]])
    check_epsilon(epsilon)
    check_no_grad("paired_batch_norm", x=x, weight=weight, bias=bias)
    y, batch_mean, batch_var = _OP(x, weight, bias, halves, epsilon, mean, var, relu, backend)
    if mean is not None and var is not None:
        batch_mean, batch_var = (t.detach().float().expand(halves, -1) for t in (mean, var))
    return y, batch_mean, batch_var


__all__ = ["paired_batch_norm"]
