"""`out[h] = w +- eps * scale * z_q` of many weights in one launch, into memory that is given; on
request each weight first takes the update that is still pending.

With a pending update a weight is read once and written once, `W+` and `W-` are written, and that is
all the traffic of the step outside the products: the sweep of `update_` is gone. Noise made: Q
elements a weight for the update, one a query for the halves.

ElasticZO (arXiv:2501.04287), abstract: two forward passes at `w +- eps z`, `w -= lr g z`.
"""
# mypy: disable-error-code="return"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zo_kernels.layout import check_groups, rows_cols
from zo_kernels.ops.checks import check_scale, check_span
from zo_kernels.registry import (
    OUT_DTYPES,
    WEIGHT_DTYPES,
    check_in_place,
    check_indices,
    check_key,
    check_noise,
    check_tensor,
    op,
)
from zo_kernels.rules import By, check_rule


def _check_pending(
    key: Tensor,
    pending: tuple[Tensor | None, ...],
    groups: Sequence[int],
    params: Sequence[Tensor],
    by: By,
) -> None:
    """All of a pending update is given, or nothing."""
    if all(t is None for t in (*pending, by[2])) and not groups and not by[1]:
        return
    before, coeff, lr, decay, skip = pending
    if any(t is None for t in pending) or len(groups) != len(params):
        raise ValueError(
            "a pending update needs before, coeff, lr, weight_decay, skip and a group for each "
            f"weight, got {[None if t is None else list(t.shape) for t in pending]} and "
            f"{len(groups)} groups for {len(params)} weights"
        )
    assert lr is not None
    check_tensor("before", before, shape=[2], dtype=[torch.int64], device=key.device, vector=True)
    check_tensor("coeff", coeff, dtype=[torch.float64], device=key.device, vector=True)
    for name, t in (("lr", lr), ("weight_decay", decay)):
        check_tensor(name, t, shape=lr.shape, dtype=[torch.float64], device=key.device, vector=True)
    check_tensor("skip", skip, shape=[], dtype=[torch.float32], device=key.device)
    for i, (w, group) in enumerate(zip(params, groups, strict=True)):
        check_in_place(f"params[{i}]", w)
        if not 0 <= group < lr.numel():
            raise ValueError(f"groups[{i}] must be in [0, {lr.numel()}), got {group}")
    check_rule(*by, params, key.device)


def _touched(
    params: Sequence[Tensor], before: Tensor | None, state: Sequence[Tensor], **_: Any
) -> Sequence[Tensor]:
    """Halves are scratch; weights and their state change where an update is pending."""
    return () if before is None else (*params, *state)


@op(like="key", mutates=("outs", "params", "state"), touched=_touched)
def stage_(
    outs: Sequence[Tensor],
    params: Sequence[Tensor],
    key: Tensor,
    eps: Tensor,
    *,
    tensors: Sequence[int],
    scales: Sequence[float],
    start: int = 0,
    stop: int = 2,
    first_row: int = 0,
    noise: str = "normal",
    before: Tensor | None = None,
    coeff: Tensor | None = None,
    lr: Tensor | None = None,
    weight_decay: Tensor | None = None,
    skip: Tensor | None = None,
    groups: Sequence[int] = (),
    rule: str = "sgd",
    state: Sequence[Tensor] = (),
    settings: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Write halves `start .. stop - 1` of `w +- eps * scale * z_q` of T weights into `outs`.

    With a pending update (`before` to `groups`, all of it, by `rule`) each weight is first updated
    in place, bit for bit as `update_` does it, and the halves are those of the new weight.

    Args:
        outs: T tensors `[stop - start, *w.shape]`, float32, float64, bfloat16 or float16.
        params: T weights, float32, float64 or bfloat16, any strides; only read without an update.
        key: `[2]` int64, (seed, step). eps: `[]` float64, the perturbation scale.
        tensors, scales: T each: index in the model, relative scale of the perturbation.
        start, stop: halves wanted, `0 <= start < stop`; half `2q` is +, `2q + 1` is -.
        first_row: where each weight is a slice of rows, the number of its first one.
        noise: "normal" or "rademacher".
        before: `[2]` int64, the key of the pending update. coeff: `[Q]` float64.
        lr, weight_decay: `[G]` float64. skip: `[]` float32; not 0 leaves the weights as they are.
        groups: T indices into lr and weight_decay.
        rule, state, settings: of the pending update, as in `update_`; state is sliced as weights.
        backend: "auto", "triton", "numba" or "reference".
    Determinism: bit-equal to `update_` and `perturbed_weights` on the same backend.
    Source: arXiv:2501.04287, abstract.
    """
    check_key(key)
    check_tensor("eps", eps, shape=[], dtype=[torch.float64], device=key.device)
    check_noise(noise)
    if not len(outs) == len(params) == len(tensors) == len(scales):
        raise ValueError(
            "outs, params, tensors and scales must have one length, got "
            f"{len(outs)}, {len(params)}, {len(tensors)}, {len(scales)}"
        )
    check_span(start, stop)
    if first_row < 0:
        raise ValueError(f"first_row must be >= 0, got {first_row}")
    for i, (out, w, tensor) in enumerate(zip(outs, params, tensors, strict=True)):
        check_tensor(f"params[{i}]", w, dtype=WEIGHT_DTYPES, device=key.device)
        shape = [stop - start, *w.shape]
        check_tensor(f"outs[{i}]", out, shape=shape, dtype=OUT_DTYPES, device=key.device)
        check_in_place(f"outs[{i}]", out)
        check_scale(f"scales[{i}]", scales[i])
        check_indices(tensor, (stop - 1) // 2)
        rows, cols = rows_cols(w.shape)
        check_groups((first_row + rows, cols), noise)
    _check_pending(
        key, (before, coeff, lr, weight_decay, skip), groups, params, (rule, state, settings)
    )
