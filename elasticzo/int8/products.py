"""Private stand-in for the int8 products, until zo_kernels has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zo_kernels import int8_perturbed_weights, int8_range


def int8_matmul(a: Tensor, b: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    acc = torch._int_mm(a.contiguous(), b.contiguous())
    return acc, int8_range(acc, backend=backend)


def _weights(w, key, tensor, start, stop, p_zero, r_max, backend):
    if key is None:
        return w.expand(stop - start, *w.shape)
    return int8_perturbed_weights(
        w, key, tensor=tensor, start=start, stop=stop, p_zero=p_zero, r_max=r_max, backend=backend
    )


def int8_paired_linear(
    x,
    w,
    key,
    *,
    tensor=0,
    start=0,
    stop=2,
    shared=False,
    p_zero=0.0,
    r_max=1,
    relu=False,
    backend="auto",
):
    n = stop - start
    ws = _weights(w, key, tensor, start, stop, p_zero, r_max, backend)
    xs = [x] * n if shared else x.chunk(n)
    acc = torch.cat([torch._int_mm(a.contiguous(), b.t().contiguous()) for a, b in zip(xs, ws)])
    if relu:
        acc = acc.clamp_min(0)
    return acc, int8_range(acc, halves=n, backend=backend)


def int8_paired_conv2d(
    x,
    w,
    key,
    *,
    tensor=0,
    start=0,
    stop=2,
    shared=False,
    p_zero=0.0,
    r_max=1,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    relu=False,
    pool=False,
    backend="auto",
):
    n = stop - start
    ws = _weights(w, key, tensor, start, stop, p_zero, r_max, backend)
    xs = [x] * n if shared else x.chunk(n)
    acc = torch.cat(
        [
            F.conv2d(a.float(), b.float(), None, stride, padding, dilation).to(torch.int32)
            for a, b in zip(xs, ws)
        ]
    )
    if relu:
        acc = acc.clamp_min(0)
    if pool:
        acc = F.max_pool2d(acc.float(), 2).to(torch.int32)
    return acc, int8_range(acc, halves=n, backend=backend)
