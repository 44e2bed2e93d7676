"""`int8_paired_conv2d` of one dimension: the same kernel over images of height 1.

A column of the noise is `k Ci + ci` either way. ElasticZO-INT8 (arXiv:2501.04287), abstract.
"""

from __future__ import annotations

from torch import Tensor

from zo_kernels.ops.conv1d import _check_dimensions
from zo_kernels.ops.int8_conv import int8_paired_conv2d


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
    _check_dimensions(x, w)
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


__all__ = ["int8_paired_conv1d"]
