"""Cross-entropy of every half against shared targets: losses that stay on the device.

With `lse = log sum_c exp(x_c)` and smoothing s, the loss of a row with target t is
`(1 - s) (lse - x_t) + s (lse - mean_c x_c)`, and that of a half the mean over its rows. Backward:
`dx_c = grad / count * (exp(x_c - lse) - (1 - s) [c = t] - s / C)`.

Data flow: a kernel reads the logits once and writes `lse` and a part of the sum for each of its
blocks of rows; a small kernel adds the parts of a half. Short rows share a program; a row of more
than 4096 classes is taken in turns, with a running maximum and sum for every 4 or 8 lanes, so that
a logit costs little more than one exp. Backward reads the logits once and writes their gradient
once, after a kernel that counts targets. By row neither small kernel runs: nothing is added, and
nothing counted.

Floor: `H B C` logits read, backward read and written; an exp and about 8 operations a logit.

The equations of `torch.nn.functional.cross_entropy` (mean or none, class indices, no weights).
"""
# mypy: disable-error-code="return"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.ops.checks import check_no_grad
from zo_kernels.registry import PRODUCT_DTYPES, check_tensor, op

REDUCTIONS = ("mean", "none")


def _fake(logits: Tensor, reduction: str, **_: Any) -> tuple[Tensor, Tensor]:
    lse = logits.new_empty(logits.shape[:2], dtype=torch.float32)
    return lse.new_empty(lse.shape if reduction == "none" else lse.shape[:1]), lse


def _fake_backward(logits: Tensor, **_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _check(logits: Tensor, target: Tensor, label_smoothing: float, reduction: str) -> None:
    check_tensor("logits", logits, dtype=PRODUCT_DTYPES)
    if logits.ndim != 3:
        raise ValueError(f"logits must have three dimensions, got shape {list(logits.shape)}")
    if logits.shape[2] == 0:
        raise ValueError(f"logits must have at least one class, got shape {list(logits.shape)}")
    shape = [logits.shape[1]]
    check_tensor("target", target, shape=shape, dtype=[torch.int64], device=logits.device)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")


@op(fake=_fake)
def paired_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every half: `(1 - s) (lse - x_t) + s (lse - mean x)`, the mean over its
    rows, or of each row.

    Rows are computed in fp32, from differences of logits (a large common offset costs nothing);
    they are added in fp64 and the mean is rounded once: the sum adds no error to that of its rows,
    a few roundings of a row's loss (6e-8 of it each). Without a target to count the mean is NaN.

    A target outside the classes cannot raise on the device: the loss (of its row, and so the mean)
    is NaN, on every backend, and a step that skips on NaN is skipped. Infinite logits act as in
    torch: -inf is probability 0 (an infinite loss if it is the target's, or with smoothing), +inf
    gives NaN.

    Args:
        logits: `[H, B, C]` float32 or bfloat16; copied first unless classes have unit stride.
        target: `[B]` int64, classes shared by all halves.
        label_smoothing: s in [0, 1].
        ignore_index: rows with this target count in nothing; by row their loss is 0.
        reduction: "mean", over the rows of a half that count, or "none", by row.
        backend: "auto", "triton", "numba" or "reference".
    Returns: losses float32, `[H]`, with "none" `[H, B]`; `lse [H, B]` float32, log-sum-exp of all
        rows (NaN for rows with +inf, or of -inf only).
    Determinism: bit-equal in every run on one backend; the order of sums depends on the shape only.
    Source: `torch.nn.functional.cross_entropy`; Szegedy et al. 2016 (arXiv:1512.00567), section 7.
    """
    _check(logits, target, label_smoothing, reduction)
    check_no_grad("paired_cross_entropy", logits=logits)


@op(fake=_fake_backward)
def paired_cross_entropy_backward(
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    grad: Tensor,
    *,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """`grad_h / count * (exp(x - lse) - (1 - s) onehot - s / C)`, 0 in ignored rows; by row
    `grad_hb` in place of `grad_h / count`.

    Made in fp32, rounded once. `lse` is rounded to fp32: where logits of about m share a large
    offset, that moves a probability by up to `6e-8 |m|` of itself. A row whose target lies outside
    the classes is NaN.

    Args:
        logits, target, label_smoothing, ignore_index, reduction, backend: as of
            `paired_cross_entropy`.
        lse: `[H, B]` float32, its second result.
        grad: `[H]` float32, with "none" `[H, B]`, the gradient of the losses.
    Returns: `[H, B, C]`, contiguous, in the dtype of the logits.
    Determinism: bit-equal in every run on one backend.
    Source: as `paired_cross_entropy`.
    """
    _check(logits, target, label_smoothing, reduction)
    halves, rows, _ = logits.shape
    shape = [halves, rows] if reduction == "none" else [halves]
    fp32, device = [torch.float32], logits.device
    check_tensor("lse", lse, shape=[halves, rows], dtype=fp32, device=device)
    check_tensor("grad", grad, shape=shape, dtype=fp32, device=device)
    check_no_grad("paired_cross_entropy_backward", logits=logits, grad=grad)
