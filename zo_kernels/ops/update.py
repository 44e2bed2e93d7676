"""`w -= lr * (scale * sum_q coeff_q z_q + weight_decay * w)` for all head parameters, one launch;
by another of the rules (`zo_kernels.rules`) with the state that it keeps.

Traffic: one read and one write of every weight and of its state, whatever the number of queries Q;
`z` is made in registers. Coefficients, learning rates and the flag that skips a step live on the
device. A table of pointers tells each program its tensor; it is made again when any changes.

bfloat16 weights are rounded stochastically (purpose "rounding" of the noise): a ZO update is mostly
below half a bf16 step, and rounding to nearest would lose it.
"""
# mypy: disable-error-code="return"

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.layout import check_groups
from zo_kernels.ops.checks import check_scale
from zo_kernels.registry import (
    WEIGHT_DTYPES,
    check_in_place,
    check_indices,
    check_key,
    check_noise,
    check_tensor,
    op,
)
from zo_kernels.rules import check_rule


@op(like="key", mutates=("params", "state"))
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
    rule: str = "sgd",
    state: Sequence[Tensor] = (),
    settings: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Update weights in place: `w -= lr * (scale * sum_q coeff_q z_q + weight_decay * w)`, or by
    another rule of the same sum.

    Args:
        params: T weights, float32, float64 or bfloat16, any strides.
        key: `[2]` int64, (seed, step).
        coeff: `[Q]` float64, projected gradients, clipped and divided by Q.
        lr, weight_decay: `[G]` float64, a value a group.
        skip: `[]` float32; not 0 leaves every weight and its state bit-identical.
        tensors, groups, scales: T each: index in the model, group, relative scale of the noise.
        noise: "normal" or "rademacher".
        rule: "sgd", "momentum", "adam" or "sign" (`zo_kernels.RULES`), in fp32 (fp64 for float64).
        state: number s of weight i at `s * T + i`, zeros before the first step; of the shape and
            dtype of the weight, fastest where it lies as the weight does. Rounded to nearest.
        settings: `[T, numbers]` float64, a row a weight; None where the rule has none.
        backend: "auto", "triton", "numba" or "reference".
    Raises: RuntimeError where a weight requires grad and grad mode is on.
    Determinism: bit-equal for any launch on one backend. bfloat16 is rounded stochastically.
    Source: arXiv:2501.04287 (w -= lr g z).
    """
    check_key(key)
    device = key.device
    if not len(params) == len(tensors) == len(groups) == len(scales):
        raise ValueError(
            "params, tensors, groups and scales must have one length, got "
            f"{len(params)}, {len(tensors)}, {len(groups)}, {len(scales)}"
        )
    check_tensor("coeff", coeff, dtype=[torch.float64], device=device, vector=True)
    if coeff.numel() == 0:
        raise ValueError("coeff must have at least one query, got none")
    check_tensor("lr", lr, dtype=[torch.float64], device=device, vector=True)
    check_tensor(
        "weight_decay",
        weight_decay,
        shape=lr.shape,
        dtype=[torch.float64],
        device=device,
        vector=True,
    )
    check_tensor("skip", skip, shape=[], dtype=[torch.float32], device=device)
    check_noise(noise)
    for i, (w, tensor, group) in enumerate(zip(params, tensors, groups, strict=True)):
        check_tensor(f"params[{i}]", w, dtype=WEIGHT_DTYPES, device=device)
        check_in_place(f"params[{i}]", w)
        check_scale(f"scales[{i}]", scales[i])
        check_indices(tensor)
        check_groups(w.shape, noise)
        if not 0 <= group < lr.numel():
            raise ValueError(f"groups[{i}] must be in [0, {lr.numel()}), got {group}")
    check_rule(rule, state, settings, params, device)
