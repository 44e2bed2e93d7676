"""`W+- = clip(w +- z_q)` of an int8 weight; `w = clip(w - shift(sum_q g_q z_q))` of all of them.

`z` is the sparse noise in [-r_max, r_max]; halves are numbered as in `perturbed_weights`: half `2q`
is `+`, half `2q + 1` is `-`, of query `q`. The weight's exponent is that of its halves and does not
move. Traffic of the halves: one byte read, one written a half; 8 elements of noise a Philox call.

In the update `g_q` in {-1, 0, 1} are the signs of the projected gradient; the shift
`max(0, bits(Q r_max) - b_zo)` is a constant of the launch. One launch for all head parameters, one
read and one write of every weight, a byte each, whatever Q is; `z` is made in registers.

ElasticZO-INT8 (arXiv:2501.04287), abstract: perturbation and update in integers.
"""
# mypy: disable-error-code="return"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zo_kernels.int8 import check_rounding, check_sparse
from zo_kernels.layout import check_groups, empty_halves
from zo_kernels.ops.checks import check_span
from zo_kernels.registry import check_in_place, check_indices, check_key, check_tensor, op


def _fake(w: Tensor, start: int, stop: int, **_: Any) -> Tensor:
    return empty_halves(w, stop - start, None)


@op(fake=_fake)
def int8_perturbed_weights(
    w: Tensor,
    key: Tensor,
    *,
    tensor: int,
    start: int = 0,
    stop: int = 2,
    p_zero: float = 0.0,
    r_max: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Halves `start .. stop - 1` of `clip(w +- z_q)`; half `2q` is +, `2q + 1` is -.

    Args:
        w: `[...]` int8; any strides. Only read.
        key: `[2]` int64, (seed, step), on the device of `w`.
        tensor: index of the tensor in the model, the noise's second counter word.
        start, stop: halves wanted, `0 <= start < stop`.
        p_zero: probability in [0, 1) that an element is not perturbed. Fixed at launch.
        r_max: largest perturbation, in [1, 127]. Fixed at launch.
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[stop - start, *w.shape]` int8 in [-127, 127], each half in the memory format of `w`.
    Determinism: equal on all backends, for any launch and memory format.
    Source: arXiv:2501.04287, abstract (ElasticZO-INT8).
    """
    check_tensor("w", w, dtype=[torch.int8])
    check_key(key, w.device)
    check_span(start, stop)
    check_indices(tensor, (stop - 1) // 2)
    check_sparse(p_zero, r_max)
    check_groups(w.shape, "sparse_int8")


@op(like="key", mutates=("params",))
def int8_update_(
    params: Sequence[Tensor],
    key: Tensor,
    g: Tensor,
    *,
    tensors: Sequence[int],
    p_zero: float = 0.0,
    r_max: int = 1,
    b_zo: int = 1,
    rounding: str = "nearest",
    backend: str = "auto",
) -> None:
    """Update int8 weights in place: `w = clip(w - shift(sum_q g_q z_q))`, in [-127, 127].

    The shift is `max(0, bits(Q r_max) - b_zo)` to the right: an update has `b_zo` bits, which play
    the part of the learning rate. With all g of 0 a weight stays.

    Args:
        params: T weights, int8, any strides.
        key: `[2]` int64, (seed, step).
        g: `[Q]` int32 in {-1, 0, 1}, of `integer_projected_sign`.
        tensors: T indices in the model, the noise's second counter word.
        p_zero, r_max: of the noise; those of the perturbation. Fixed at launch.
        b_zo: bits of an update, in [0, 31]. Fixed at launch.
        rounding: "nearest", "pseudo" or "stochastic" (noise of purpose "rounding", query 0); their
            biases stand in `int8_requantize`.
        backend: "auto", "triton", "numba" or "reference".
    Determinism: equal on all backends, for any launch and memory format.
    Source: arXiv:2501.04287, abstract (ElasticZO-INT8).
    """
    check_key(key)
    device = key.device
    if len(params) != len(tensors):
        raise ValueError(
            f"params and tensors must have one length, got {len(params)}, {len(tensors)}"
        )
    check_tensor("g", g, dtype=[torch.int32], device=device, vector=True)
    if g.numel() == 0:
        raise ValueError("g must have at least one query, got none")
    check_sparse(p_zero, r_max)
    if not 0 <= b_zo <= 31:
        raise ValueError(f"b_zo must be in [0, 31], got {b_zo}")
    for i, (w, tensor) in enumerate(zip(params, tensors, strict=True)):
        check_tensor(f"params[{i}]", w, dtype=[torch.int8], device=device)
        check_in_place(f"params[{i}]", w)
        check_groups(w.shape, "sparse_int8")
        check_rounding(rounding, key, w.shape, tensor, g.numel() - 1, device)
