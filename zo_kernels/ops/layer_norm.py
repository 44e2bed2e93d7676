"""`y = (x - mean) / sqrt(var + epsilon) * weight_h + bias_h` over the last dimension, half by half.

Up to 16384 columns (8192 if odd) a program holds a row, or several short ones, in registers: one
read of x and one write of y, `2 N` elements, which is the floor. Longer rows are read twice, `3 N`:
a first loop for the moments, a second for y. About 8 operations an element.

The moments are of x less the first value of its row, in two steps (mean, then squared deviations):
a large mean cancels no digits. The long kernel merges moments of its lanes by Chan's formula.

Ba, Kiros and Hinton 2016 (arXiv:1607.06450).
"""
# mypy: disable-error-code="return"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.ops.checks import check_affine, check_epsilon, check_halves, check_no_grad
from zo_kernels.registry import PRODUCT_DTYPES, check_tensor, op


def _fake(x: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(x.contiguous())


@op(fake=_fake)
def paired_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    halves: int,
    epsilon: float,
    relu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`y = (x - mean) / sqrt(var + epsilon) * weight_h + bias_h`; moments over the last dimension.

    Moments and y are made in fp32, y is rounded once. A row with NaN or an infinite value is NaN.

    Args:
        x: `[H B, ..., D]` float32 or bfloat16, halves one after another; copied first if it is not
            contiguous. Only read.
        weight, bias: `[H, D]` float32 or bfloat16, staged for every half; None is 1 or 0.
        halves: H, how many halves the batch holds.
        epsilon: added to the variance; not negative.
        relu: apply it to the result (NaN stays).
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[H B, ..., D]`, contiguous, in the dtype of x.
    Determinism: bit-equal in every run on one backend; the order of sums depends on the shape only.
    Source: arXiv:1607.06450, equations 3 and 4.
    """
    check_tensor("x", x, dtype=PRODUCT_DTYPES)
    if x.ndim < 2:
        raise ValueError(f"x must have at least two dimensions, got shape {list(x.shape)}")
    check_halves(x, halves)
    check_affine(x, weight, bias, [halves, x.shape[-1]])
    check_epsilon(epsilon)
    check_no_grad("paired_layer_norm", x=x, weight=weight, bias=bias)
