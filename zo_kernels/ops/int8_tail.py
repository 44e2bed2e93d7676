"""An int8 convolution, the maxima of its sums over windows 2 x 2, and their places.

What the forward of a layer in the integer tail leaves for its backward: no noise, and the place of
each maximum in a byte instead of the sums themselves. On the CPU maxima and places are taken where
the sums of an image lie in cache; on a device after the kernel of the convolution.

NITI: Wang et al., arXiv:2009.13108.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.geometry import Geometry, Pair, empty_output, geometry
from zo_kernels.ops.checks import check_pair
from zo_kernels.ops.conv import _check_size
from zo_kernels.ops.int8_conv import _check, int8_paired_conv2d
from zo_kernels.registry import register, resolve_backend, twin
from zo_kernels.triton.int8_range import int8_range


def _empty(x: Tensor, w: Tensor, halves: int, geo: Geometry) -> tuple[Tensor, Tensor, Tensor]:
    acc = empty_output(x, w, halves, False, geo, True, torch.int32)
    bits = torch.zeros(halves, dtype=torch.int32, device=x.device)
    return acc, bits, torch.empty_like(acc, dtype=torch.uint8)


def _launch(
    x: Tensor, w: Tensor, halves: int, geo: Geometry, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    acc, _, places = _empty(x, w, halves, geo)
    sums, _ = int8_paired_conv2d(
        *(x, w, None), stop=halves, stride=geo.stride, padding=geo.padding,
        dilation=geo.dilation, backend="triton",
    )  # fmt: skip
    height, width = (2 * n for n in acc.shape[2:])
    corners = [sums[:, :, i:height:2, j:width:2] for i in range(2) for j in range(2)]
    acc.copy_(corners[0])
    places.zero_()
    for place, corner in enumerate(corners[1:], 1):
        places.masked_fill_(corner > acc, place)  # strictly: the first of equal ones stays
        torch.maximum(acc, corner, out=acc)
    acc = acc.clamp_min_(0) if relu else acc
    return acc, int8_range(acc, halves=halves, backend="triton"), places


def _implementation(
    x: Tensor,
    w: Tensor,
    halves: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    relu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    backend = resolve_backend(backend, x.device)
    geo = geometry(stride, padding, dilation)
    if x.shape[0] == 0:
        return _empty(x, w, halves, geo)
    if backend == "triton":
        return _launch(x, w, halves, geo, relu)
    given = {"stride": stride, "padding": padding, "dilation": dilation, "relu": relu}
    result: tuple[Tensor, Tensor, Tensor] = twin("int8_conv2d_max_pool", backend)(
        x, w, halves, **given
    )
    return result


def _fake(x: Tensor, w: Tensor, halves: int, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x, w, halves, geometry(*args[:3]))


_OP = register(
    "int8_conv2d_max_pool(Tensor x, Tensor w, int halves, int[] stride, int[] padding, "
    "int[] dilation, bool relu, str backend) -> (Tensor, Tensor, Tensor)",
    _implementation,
    _fake,
)


def int8_conv2d_max_pool(
    x: Tensor,
    w: Tensor,
    halves: int = 1,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    relu: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`acc = max over windows 2 x 2 of (x * w)`, the bits of each half, and where the maxima were.

    Args:
        x: `[H B, Ci, IH, IW]` int8 in [-127, 127], half after half; any strides, as for w.
        w: `[Co, Ci, KH, KW]` int8, the same for all halves; Ci KH KW at most 133,144. Only read.
        halves: H.
        stride, padding, dilation: an integer, or two (height, width); zeros are padded.
        relu: apply it to the maxima.
        backend: "auto", "triton", "numba" or "reference".
    Returns: as `int8_paired_conv2d` with `pool`: `[H B, Co, OH // 2, OW // 2]` int32 and `[H]`
        int32; and uint8 like the first, `2 i + j` of the first maximum in its window (before the
        ReLU, which moves no maximum that it lets through).
    Determinism: equal on all backends, for any launch and memory format.
    Source: NITI (arXiv:2009.13108).
    """
    _check(x, w)
    check_pair(x, w, None, None, 0, halves, False, 0.0, 1)
    geo = geometry(stride, padding, dilation)
    _check_size(x, w, geo, True)
    acc, bits, places = _OP(x, w, halves, *geo, relu, backend)
    return acc, bits, places


__all__ = ["int8_conv2d_max_pool"]
