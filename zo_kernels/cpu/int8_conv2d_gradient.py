"""CPU twin of `zo_kernels.int8_conv2d_gradient`: no patches; one pass over images and errors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from zo_kernels.cpu.int8_conv import empty, int8_matmul, over_images, zeros
from zo_kernels.cpu.int8_correlate import collect, correlate
from zo_kernels.cpu.int8_dot import LANES, SLACK
from zo_kernels.cpu.memory import span
from zo_kernels.geometry import Geometry, Pair, geometry, kernel_size, patches


@lru_cache(maxsize=256)
def _places(
    size: tuple[int, ...], kernel: tuple[int, int], geo: Geometry, grid: tuple[int, ...]
) -> tuple[Any, Any, int, int]:
    """Where lines of outputs begin in a padded image, where the steps of pixels lie from there, how
    many outputs a line has and how far they are apart: columns of the kernel, or, where it has
    one, channels."""
    channels, height, width = (n + 2 * p for n, p in zip(size, (0, *geo.padding), strict=True))
    plane, single = height * width, kernel[1] == 1
    rows = [u * geo.dilation[0] * width for u in range(kernel[0])]
    lines = rows if single else [c * plane + row for c in range(channels) for row in rows]
    columns = range(0, grid[2], 4)
    steps = [h * geo.stride[0] * width + j for h in range(grid[1]) for j in columns]
    outputs, apart = (channels, plane) if single else (kernel[1], geo.dilation[1])
    return torch.tensor(lines).numpy(), torch.tensor(steps).numpy(), outputs, apart


def int8_conv2d_gradient(
    error: Tensor,
    x: Tensor,
    kernel: Pair,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    geo, (kh, kw) = geometry(stride, padding, dilation), kernel_size(kernel)
    size, grid = tuple(x.shape[1:]), tuple(error.shape[1:])
    if geo.stride[1] != 1:  # the four pixels of a step are no neighbours
        rows = error.permute(0, 2, 3, 1).flatten(0, 2)
        sums, _ = int8_matmul(patches(x, (kh, kw), geo), rows)
        return sums.t().reshape(grid[0], size[0], kh, kw).contiguous()
    lines, offsets, outputs, apart = _places(size, (kh, kw), geo, grid)
    channels = -(-grid[0] // LANES) * LANES
    given = ((span(x), span(error)), x.stride(), size, (geo.padding, apart), error.stride(), grid)
    padded = size[0] * (size[1] + 2 * geo.padding[0]) * (size[2] + 2 * geo.padding[1])

    def job(first: int, end: int) -> tuple[Any, Any]:
        sums, totals = zeros(len(lines) * outputs * channels), zeros(channels)
        room = (empty(4 * channels * len(offsets), torch.int8), empty(padded + SLACK, torch.uint8))
        found = (sums, totals, empty(outputs * LANES), *room)
        correlate(*given, lines, offsets, *found, (first, end))
        return sums, totals

    out = torch.zeros((grid[0], size[0], kh, kw), dtype=torch.int32)
    walk = (len(lines), outputs, *((1, kh) if kw == 1 else (outputs, 1)))
    for sums, totals in over_images(len(x), error.numel() * size[0] * kh * kw, job):
        collect(sums, totals, walk, out.view(grid[0], -1).numpy())
    return out


__all__ = ["int8_conv2d_gradient"]
