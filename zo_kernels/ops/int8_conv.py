"""`acc_h = x_h * clip(w +- z)` of int8, summed in int32: a convolution of both halves, and bits.

Half `2q` is `+`, half `2q + 1` is `-`, of query `q`; `z` is the sparse noise of
`int8_perturbed_weights`. An implicit product, as in `paired_conv2d`: rows are the outputs of a
half, `M = B OH OW`, columns the output channels, depth `K = KH KW Ci` in the order of the noise. A
program owns a tile `[BM, BN]` of both halves, makes `z` once for each tile `[BN, BK]` of `w`, and
multiplies on int8 tensor cores. ReLU and 2 x 2 pooling act on the accumulators, which is what they
would give after the shift too, a monotone map; the range is that of what is left, and costs one
atomic maximum a program and half.

Floor for a query: `2 B Ci IH IW` bytes of activations read (half of it where the halves share x),
`8 B Co OH OW` written (a quarter with pooling), `K Co` bytes of weights read, `4 M K Co`
operations, `ceil(M / BM) K Co` elements of noise. Sums are exact, so tiles, devices and backends do
not show in the result.

ElasticZO-INT8 (arXiv:2501.04287), abstract; NITI (arXiv:2009.13108): accumulators and their range.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zo_kernels.geometry import Geometry, Pair, empty_output, geometry
from zo_kernels.ops.checks import check_operands, check_pair
from zo_kernels.ops.conv import _check_size
from zo_kernels.ops.linear import _parts
from zo_kernels.registry import register, resolve_backend, twin
from zo_kernels.triton.int8_conv import launch


def _empty(
    x: Tensor, w: Tensor, halves: int, shared: bool, geo: Geometry, pool: bool
) -> tuple[Tensor, Tensor]:
    """Room for the accumulators, and bits of 0."""
    acc = empty_output(x, w, halves, shared, geo, pool, torch.int32)
    return acc, torch.zeros(halves, dtype=torch.int32, device=x.device)


def _launch_int8_paired_conv2d(
    x: Tensor,
    w: Tensor,
    key: Tensor | None,
    tensor: int,
    start: int,
    stop: int,
    shared: bool,
    geo: Geometry,
    p_zero: float,
    r_max: int,
    relu: bool,
    pool: bool,
) -> tuple[Tensor, Tensor]:
    acc, bits = _empty(x, w, stop - start, shared, geo, pool)
    if acc.numel() == 0:
        return acc, bits
    rows = acc.shape[0] // (stop - start)
    for first, count in _parts(start, stop):
        at = first - start
        here = slice(at * rows, (at + count) * rows)
        args = (x if shared else x[here], w, acc[here], bits[at : at + count], key, tensor)
        launch(*args, first, count, shared, geo, p_zero, r_max, relu, pool)
    return acc, bits


def _implementation(
    x: Tensor,
    w: Tensor,
    key: Tensor | None,
    tensor: int | None,
    start: int,
    stop: int,
    shared: bool,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    p_zero: float,
    r_max: int,
    relu: bool,
    pool: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    backend = resolve_backend(backend, w.device)
    if backend == "triton":
        span = (tensor or 0, start, stop, shared, geometry(stride, padding, dilation))
        return _launch_int8_paired_conv2d(x, w, key, *span, p_zero, r_max, relu, pool)
    result: tuple[Tensor, Tensor] = twin("int8_paired_conv2d", backend)(
        *(x, w, key),
        tensor=tensor,
        start=start,
        stop=stop,
        shared=shared,
        stride=stride,
        padding=padding,
        dilation=dilation,
        p_zero=p_zero,
        r_max=r_max,
        relu=relu,
        pool=pool,
    )
    return result


def _fake(x: Tensor, w: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    start, stop, shared, geo = *args[2:5], geometry(*args[5:8])
    return _empty(x, w, stop - start, shared, geo, args[11])


_OP = register(
    "int8_paired_conv2d(Tensor x, Tensor w, Tensor? key, int? tensor, int start, int stop, "
    "bool shared, int[] stride, int[] padding, int[] dilation, float p_zero, int r_max, bool relu, "
    "bool pool, str backend) -> (Tensor, Tensor)",
    _implementation,
    _fake,
)


def _check(x: Tensor, w: Tensor) -> None:
    check_operands(x, w, 4, "four")
    if 0 in w.shape or 0 in x.shape[1:]:
        raise ValueError(
            f"only the batch may be empty, got shapes {list(x.shape)} of x and {list(w.shape)} of w"
        )
    if w.shape[1] != x.shape[1]:
        raise ValueError(
            f"w must have the {x.shape[1]} input channels of x (groups are not supported), "
            f"got shape {list(w.shape)}"
        )


def int8_paired_conv2d(
    x: Tensor,
    w: Tensor,
    key: Tensor | None,
    *,
    tensor: int | None = None,
    start: int = 0,
    stop: int = 2,
    shared: bool = False,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    p_zero: float = 0.0,
    r_max: int = 1,
    relu: bool = False,
    pool: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`acc_h = x_h * clip(w +- z)`, halves `start .. stop - 1`, and the bits of each.

    Args:
        x: `[H B, Ci, IH, IW]` int8, half after half, H = stop - start; or `[B, Ci, IH, IW]`,
            `shared`. Values in [-127, 127]; Ci KH KW at most 133,144.
        w: `[Co, Ci, KH, KW]` int8; any strides, as for x. No groups. Only read.
        key: `[2]` int64, (seed, step); None for no noise: every half multiplies by `w`.
        tensor: index of w in the model, the second counter word of the noise.
        start, stop: halves wanted, `0 <= start < stop`; half `2q` is +, `2q + 1` is -.
        shared: every half reads the same x.
        stride, padding, dilation: an integer, or two (height, width); zeros are padded.
        p_zero: probability of a zero of `z`, in [0, 1), in steps of 2^-16.
        r_max: magnitude of `z` at the most, in [1, 127].
        relu: apply it to the accumulators.
        pool: take maxima of windows 2 x 2, stride 2 (an odd row or column falls).
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[H B, Co, OH, OW]` int32, channels_last where x is, else contiguous, and `[H]` int32:
        `int8_range` of what is returned, pooled and rectified.
    Determinism: equal on all backends, for any launch and memory format.
    Source: arXiv:2501.04287, abstract (ElasticZO-INT8); NITI (arXiv:2009.13108).
    """
    _check(x, w)
    check_pair(x, w, key, tensor, start, stop, shared, p_zero, r_max)
    geo = geometry(stride, padding, dilation)
    _check_size(x, w, geo, pool)
    args = (x, w, key, tensor, start, stop, shared, *geo, p_zero, r_max, relu, pool)
    acc, bits = _OP(*args, backend)
    return acc, bits


__all__ = ["int8_paired_conv2d"]
