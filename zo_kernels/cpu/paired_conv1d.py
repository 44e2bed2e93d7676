"""CPU twin of `zo_kernels.paired_conv1d`: the convolution of images of height 1."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.cpu.conv import paired_conv2d


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
) -> Tensor:
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
    )
    return y.squeeze(2)


__all__ = ["paired_conv1d"]
