"""Reference of `zo_kernels.int8_paired_conv1d_max`: the convolution, then its maxima."""

from __future__ import annotations

from torch import Tensor

from zo_kernels.reference.int8_paired_conv1d import int8_paired_conv1d
from zo_kernels.reference.int8_range import int8_range


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
) -> tuple[Tensor, Tensor]:
    sums, _ = int8_paired_conv1d(
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
    )
    acc = sums.amax(2)
    return acc, int8_range(acc, halves=stop - start)


__all__ = ["int8_paired_conv1d_max"]
