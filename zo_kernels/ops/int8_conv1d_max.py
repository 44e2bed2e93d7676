"""`int8_paired_conv1d`, and of each channel the largest sum over all positions.

PointNet's last convolution and its maximum over the points: on the CPU each sum meets its maximum
while it is in cache, and `[H B, Co, OL]` int32 (268 MB at a batch of 32) is never made. On a device
the maximum is one more pass. ElasticZO-INT8 (arXiv:2501.04287), abstract.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.geometry import geometry
from zo_kernels.ops.checks import check_pair
from zo_kernels.ops.conv import _check_size
from zo_kernels.ops.conv1d import _check_dimensions
from zo_kernels.ops.int8_conv import _check
from zo_kernels.ops.int8_conv1d import int8_paired_conv1d
from zo_kernels.registry import register, resolve_backend, twin
from zo_kernels.triton.int8_range import int8_range


def _empty(x: Tensor, w: Tensor, halves: int, shared: bool) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] * halves if shared else x.shape[0]
    acc = torch.empty((rows, w.shape[0]), dtype=torch.int32, device=x.device)
    return acc, torch.zeros(halves, dtype=torch.int32, device=x.device)


def _implementation(
    x: Tensor,
    w: Tensor,
    key: Tensor | None,
    tensor: int | None,
    start: int,
    stop: int,
    shared: bool,
    stride: int,
    padding: int,
    dilation: int,
    p_zero: float,
    r_max: int,
    relu: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    backend = resolve_backend(backend, x.device)
    if x.shape[0] == 0:
        return _empty(x, w, stop - start, shared)
    given: dict[str, Any] = {
        "tensor": tensor,
        "start": start,
        "stop": stop,
        "shared": shared,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "p_zero": p_zero,
        "r_max": r_max,
        "relu": relu,
    }
    if backend == "triton":
        acc = int8_paired_conv1d(x, w, key, backend="triton", **given)[0].amax(2)
        return acc, int8_range(acc, halves=stop - start, backend="triton")
    result: tuple[Tensor, Tensor] = twin("int8_paired_conv1d_max", backend)(x, w, key, **given)
    return result


def _fake(x: Tensor, w: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    start, stop, shared = args[2:5]
    return _empty(x, w, stop - start, shared)


_OP = register(
    "int8_paired_conv1d_max(Tensor x, Tensor w, Tensor? key, int? tensor, int start, int stop, "
    "bool shared, int stride, int padding, int dilation, float p_zero, int r_max, bool relu, "
    "str backend) -> (Tensor, Tensor)",
    _implementation,
    _fake,
)


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
    _check_dimensions(x, w)
    images, kernels = x.unsqueeze(2), w.unsqueeze(2)
    _check(images, kernels)
    check_pair(images, kernels, key, tensor, start, stop, shared, p_zero, r_max)
    geo = geometry((1, stride), (0, padding), (1, dilation))
    _check_size(images, kernels, geo, False)
    args = (x, w, key, tensor, start, stop, shared, stride, padding, dilation, p_zero, r_max, relu)
    acc, bits = _OP(*args, backend)
    return acc, bits


__all__ = ["int8_paired_conv1d_max"]
