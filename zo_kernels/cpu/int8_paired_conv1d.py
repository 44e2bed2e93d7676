"""CPU twin of `zo_kernels.int8_paired_conv1d`: the convolution of images of height 1."""

from __future__ import annotations

from torch import Tensor

from zo_kernels.cpu.int8_conv import int8_paired_conv2d


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
) -> tuple[Tensor, Tensor]:
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
    )
    return acc.squeeze(2), bits


__all__ = ["int8_paired_conv1d"]
