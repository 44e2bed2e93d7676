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

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.ops.checks import check_operands, check_pair
from zo_kernels.ops.linear import _parts
from zo_kernels.registry import check_tensor, register, resolve_backend, twin
from zo_kernels.triton.int8_linear import launch


def _empty(x: Tensor, w: Tensor, halves: int, shared: bool) -> tuple[Tensor, Tensor]:
    """Room for the accumulators, and bits of 0."""
    rows = x.shape[0] * halves if shared else x.shape[0]
    acc = torch.empty((rows, w.shape[0]), dtype=torch.int32, device=x.device)
    return acc, torch.zeros(halves, dtype=torch.int32, device=x.device)


def _launch_int8_paired_linear(
    x: Tensor,
    w: Tensor,
    key: Tensor | None,
    tensor: int,
    start: int,
    stop: int,
    shared: bool,
    p_zero: float,
    r_max: int,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    acc, bits = _empty(x, w, stop - start, shared)
    if acc.numel() == 0:
        return acc, bits
    rows = acc.shape[0] // (stop - start)
    for first, count in _parts(start, stop):
        at = first - start
        here = slice(at * rows, (at + count) * rows)
        args = (x if shared else x[here], w, acc[here], bits[at : at + count], key, tensor)
        launch(*args, first, count, shared, p_zero, r_max, relu)
    return acc, bits


def _implementation(
    x: Tensor,
    w: Tensor,
    key: Tensor | None,
    tensor: int | None,
    start: int,
    stop: int,
    shared: bool,
    p_zero: float,
    r_max: int,
    relu: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    backend = resolve_backend(backend, w.device)
    if backend == "triton":
        span = (tensor or 0, start, stop, shared, p_zero, r_max, relu)
        return _launch_int8_paired_linear(x, w, key, *span)
    result: tuple[Tensor, Tensor] = twin("int8_paired_linear", backend)(
        *(x, w, key),
        tensor=tensor,
        start=start,
        stop=stop,
        shared=shared,
        p_zero=p_zero,
        r_max=r_max,
        relu=relu,
    )
    return result


def _fake(
    x: Tensor, w: Tensor, key: Any, tensor: Any, start: int, stop: int, shared: bool, *_: Any
) -> tuple[Tensor, Tensor]:
    return _empty(x, w, stop - start, shared)


_OP = register(
    "int8_paired_linear(Tensor x, Tensor w, Tensor? key, int? tensor, int start, int stop, "
    "bool shared, float p_zero, int r_max, bool relu, str backend) -> (Tensor, Tensor)",
    _implementation,
    _fake,
)


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
    acc, bits = _OP(x, w, key, tensor, start, stop, shared, p_zero, r_max, relu, backend)
    return acc, bits


__all__ = ["int8_paired_linear"]
