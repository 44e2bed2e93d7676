"""`acc_h = x_h clip(w +- z)^T` of int8, summed in int32, and the bits of each half's range.

Half `2q` is `+`, half `2q + 1` is `-`, of query `q`; `z` is the sparse noise of
`int8_perturbed_weights`. A program owns a tile `[BM, BN]` of both halves of one query; for each
tile `[BN, BK]` of `w` it makes `z` once, in registers (8 elements a Philox call), and the operands
of two products on int8 tensor cores. It rectifies its sums where asked, and raises its halves'
ranges by one atomic maximum each: no second pass over the accumulators.

Floor for a query: `N K` bytes of weights read, `2 M K` of activations (`M K` where the halves share
them), `8 M N` bytes of accumulators written, `4 M N K` operations, `ceil(M / BM) N K` elements of
noise. Sums are exact, so tiles, devices and backends do not show in the result.

ElasticZO-INT8 (arXiv:2501.04287), abstract; NITI (arXiv:2009.13108): accumulators and their range.
"""
# mypy: disable-error-code="return"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.geometry import empty_product
from zo_kernels.ops.checks import check_operands, check_pair
from zo_kernels.registry import check_tensor, op


def _fake(
    x: Tensor, w: Tensor, start: int, stop: int, shared: bool, **_: Any
) -> tuple[Tensor, Tensor]:
    acc = empty_product(x, w, stop - start, shared, torch.int32)
    return acc, acc.new_empty(stop - start)


@op(fake=_fake)
def int8_paired_linear(
    x: Tensor,
    w: Tensor,
    key: Tensor | None,
    *,
    tensor: int | None = None,
    start: int = 0,
    stop: int = 2,
    shared: bool = False,
    p_zero: float = 0.0,
    r_max: int = 1,
    relu: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`acc_h = x_h clip(w +- z)^T`, halves `start .. stop - 1`, and the bits of each.

    Args:
        x: `[H B, K]` int8, half after half, H = stop - start; or `[B, K]`, `shared`. Values in
            [-127, 127]; K at most 133,144.
        w: `[N, K]` int8; any strides, as for x. Only read.
        key: `[2]` int64, (seed, step); None for no noise: every half multiplies by `w`.
        tensor: index of w in the model, the second counter word of the noise.
        start, stop: halves wanted, `0 <= start < stop`; half `2q` is +, `2q + 1` is -.
        shared: every half reads the same x.
        p_zero: probability of a zero of `z`, in [0, 1), in steps of 2^-16.
        r_max: magnitude of `z` at the most, in [1, 127].
        relu: apply it to the accumulators.
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[H B, N]` int32, and `[H]` int32: `int8_range` of what is returned.
    Determinism: equal on all backends, for any launch.
    Source: arXiv:2501.04287, abstract (ElasticZO-INT8); NITI (arXiv:2009.13108).
    """
    check_operands(x, w, 2, "two")
    check_tensor("x", x, shape=[x.shape[0], w.shape[1]])
    check_pair(x, w, key, tensor, start, stop, shared, p_zero, r_max)
