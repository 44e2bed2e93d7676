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

One dimension is images of height 1. `int8_paired_conv1d_max` is PointNet's last convolution and its
maximum over the points: on the CPU each sum meets its maximum while it is in cache, and
`[H B, Co, OL]` int32 (268 MB at a batch of 32) is never made. On a device the maximum is one more
pass.

ElasticZO-INT8 (arXiv:2501.04287), abstract; NITI (arXiv:2009.13108): accumulators and their range.
"""
# mypy: disable-error-code="return"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.geometry import Pair, empty_output, empty_product, geometry
from zo_kernels.ops.checks import check_images, check_operands, check_pair, check_series, check_size
from zo_kernels.registry import op


def _fake(
    x: Tensor,
    w: Tensor,
    start: int,
    stop: int,
    shared: bool,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    pool: bool,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    geo = geometry(stride, padding, dilation)
    acc = empty_output(x, w, stop - start, shared, geo, pool, torch.int32)
    return acc, acc.new_empty(stop - start)


@op(fake=_fake)
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
    check_operands(x, w, 4, "four")
    check_images(x, w)
    check_pair(x, w, key, tensor, start, stop, shared, p_zero, r_max)
    check_size(x, w, geometry(stride, padding, dilation), pool)


def int8_paired_conv1d(
    x: Tensor,
    w: Tensor,
    key: Tensor | None,
    *,
    tensor: int | None = None,
    start: int = 0,
    stop: int = 2,
    shared: bool = False,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    p_zero: float = 0.0,
    r_max: int = 1,
    relu: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`acc_h = x_h * clip(w +- z)`, halves `start .. stop - 1`, and the bits of each.

    The arithmetic is that of `int8_paired_conv2d`, which also reports what is wrong with sizes.

    Args:
        x: `[H B, Ci, L]` int8, half after half, H = stop - start; or `[B, Ci, L]`, `shared`.
        w: `[Co, Ci, K]` int8; any strides, as for x.
        key, tensor, start, stop, shared, p_zero, r_max, relu, backend: as in `int8_paired_conv2d`.
        stride, padding, dilation: integers.
    Returns: `[H B, Co, OL]` int32, channels innermost where x has them so, else contiguous, and
        `[H]` int32, its `int8_range`.
    Determinism: equal on all backends, for any launch and memory format.
    Source: arXiv:2501.04287, abstract (ElasticZO-INT8); NITI (arXiv:2009.13108).
    """
    check_series(x, w)
    acc, bits = int8_paired_conv2d(
        *(x.unsqueeze(2), w.unsqueeze(2), key),
        tensor=tensor,
        start=start,
        stop=stop,
        shared=shared,
        stride=(1, stride),
        padding=(0, padding),
        dilation=(1, dilation),
        p_zero=p_zero,
        r_max=r_max,
        relu=relu,
        backend=backend,
    )
    return acc.squeeze(2), bits


def _fake_max(
    x: Tensor, w: Tensor, start: int, stop: int, shared: bool, **_: Any
) -> tuple[Tensor, Tensor]:
    acc = empty_product(x, w, stop - start, shared, torch.int32)
    return acc, acc.new_empty(stop - start)


@op(fake=_fake_max)
def int8_paired_conv1d_max(
    x: Tensor,
    w: Tensor,
    key: Tensor | None,
    *,
    tensor: int | None = None,
    start: int = 0,
    stop: int = 2,
    shared: bool = False,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    p_zero: float = 0.0,
    r_max: int = 1,
    relu: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`acc_h = max over l of (x_h * clip(w +- z))[l]`, halves `start .. stop - 1`, and the bits.

    Args:
        x: `[H B, Ci, L]` int8, half after half, H = stop - start; or `[B, Ci, L]`, `shared`.
        w: `[Co, Ci, K]` int8; any strides, as for x.
        key, tensor, start, stop, shared, p_zero, r_max, relu, backend: as in `int8_paired_conv2d`.
        stride, padding, dilation: integers.
    Returns: `[H B, Co]` int32 and `[H]` int32, its `int8_range`.
    Determinism: equal on all backends, for any launch and memory format.
    Source: arXiv:2501.04287, abstract (ElasticZO-INT8); NITI (arXiv:2009.13108).
    """
    check_series(x, w)
    images, kernels = x.unsqueeze(2), w.unsqueeze(2)
    check_operands(images, kernels, 4, "four")
    check_images(images, kernels)
    check_pair(images, kernels, key, tensor, start, stop, shared, p_zero, r_max)
    check_size(images, kernels, geometry((1, stride), (0, padding), (1, dilation)), False)
