"""`paired_conv2d` of one dimension: the same kernel over images of height 1.

A column of the noise is `k Ci + ci` either way. ElasticZO (arXiv:2501.04287), abstract.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.ops.conv import paired_conv2d
from zo_kernels.registry import check_tensor


def _check_dimensions(x: Any, w: Any) -> None:
    for name, t in (("w", w), ("x", x)):
        check_tensor(name, t)
        if t.ndim != 3:
            raise ValueError(f"{name} must have three dimensions, got shape {list(t.shape)}")


def paired_conv1d(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    key: Tensor,
    eps: Tensor,
    *,
    tensor: int,
    bias_tensor: int | None = None,
    start: int = 0,
    stop: int = 2,
    shared: bool = False,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    noise: str = "normal",
    scale: float = 1.0,
    bias_scale: float = 1.0,
    precision: str = "ieee",
    compute_dtype: torch.dtype | None = None,
    relu: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`y_h = x_h * (w +- eps scale z_w) + (b +- eps bias_scale z_b)`, halves `start .. stop - 1`.

    The arithmetic is that of `paired_conv2d`, which also reports what is wrong with sizes.

    Args:
        x: `[H B, Ci, L]` float32 or bfloat16, half after half, H = stop - start; or `[B, Ci, L]`,
            `shared`.
        w: `[Co, Ci, K]`, bias: `[Co]` or None, float32 or bfloat16; any strides, as for x.
        key: `[2]` int64, (seed, step). eps: `[]` float64, the perturbation scale.
        tensor, bias_tensor, start, stop, shared, noise, scale, bias_scale, precision,
            compute_dtype, relu, backend: as in `paired_conv2d`.
        stride, padding, dilation: integers.
    Returns: `[H B, Co, OL]`, channels innermost where x has them so, else contiguous.
    Determinism: as `paired_conv2d`.
    Source: arXiv:2501.04287, abstract; Spall 1992 (SPSA).
    """
    _check_dimensions(x, w)
    y = paired_conv2d(
        *(x.unsqueeze(2), w.unsqueeze(2), bias, key, eps),
        tensor=tensor,
        bias_tensor=bias_tensor,
        start=start,
        stop=stop,
        shared=shared,
        stride=(1, stride),
        padding=(0, padding),
        dilation=(1, dilation),
        noise=noise,
        scale=scale,
        bias_scale=bias_scale,
        precision=precision,
        compute_dtype=compute_dtype,
        relu=relu,
        backend=backend,
    )
    return y.squeeze(2)


__all__ = ["paired_conv1d"]
