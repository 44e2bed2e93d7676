"""CPU twins of the integer tail. A gradient is one pass over images and errors, without patches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zo_kernels.cpu.int8_correlate import collect, correlate
from zo_kernels.cpu.int8_dot import LANES, SLACK, WINDOWS
from zo_kernels.cpu.int8_kernels import gradient_update
from zo_kernels.cpu.int8_linear import int8_paired_linear
from zo_kernels.cpu.int8_products import After, Noise, convolution, empty, over_images, zeros
from zo_kernels.cpu.int8_range import NO_WORDS
from zo_kernels.cpu.int8_unpool import unpool
from zo_kernels.cpu.memory import span
from zo_kernels.cpu.noise import sample
from zo_kernels.geometry import (
    Geometry,
    Pair,
    empty_output,
    geometry,
    kernel_size,
    patches,
)
from zo_kernels.int8 import ROUNDINGS
from zo_kernels.reference.integer import rounding_words


def int8_matmul(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    acc, bits = int8_paired_linear(a, b.t(), None, stop=1)
    return acc, bits.squeeze(0)


def int8_conv2d_max_pool(
    x: Tensor,
    w: Tensor,
    halves: int = 1,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    geo = geometry(stride, padding, dilation)
    acc = empty_output(x, w, halves, False, geo, True, torch.int32)
    places = torch.empty_like(acc, dtype=torch.uint8)
    if acc.numel() == 0:
        return acc, torch.zeros(halves, dtype=torch.int32, device="cpu"), places
    noise, after = Noise(None, 0, 0, halves, 0.0, 1), After(relu, WINDOWS, places)
    return acc, convolution(x, w, acc, noise, geo, False, after), places


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
    places = [torch.tensor(each, device="cpu").numpy() for each in (lines, steps)]
    return places[0], places[1], outputs, apart


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
    if x.numel() == 0:
        return torch.zeros((grid[0], size[0], kh, kw), dtype=torch.int32, device="cpu")
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

    out = torch.zeros((grid[0], size[0], kh, kw), dtype=torch.int32, device="cpu")
    walk = (len(lines), outputs, *((1, kh) if kw == 1 else (outputs, 1)))
    for sums, totals in over_images(len(x), error.numel() * size[0] * kh * kw, job):
        collect(sums, totals, walk, out.view(grid[0], -1).numpy())
    return out


def int8_unpool(error: Tensor, places: Tensor, size: Sequence[int]) -> Tensor:
    images, channels, height, width = error.shape
    if error.numel() == 0:
        return error.new_zeros((images, channels, *size))
    even = torch.empty((images, channels, 2 * height, 2 * width), dtype=torch.int8, device="cpu")
    words = even.view(-1).view(torch.uint16).numpy()
    flat = (error.contiguous().view(-1).numpy(), places.contiguous().view(-1).numpy())
    unpool(*flat, images * channels * height, width, words)
    odd = (0, size[1] - 2 * width, 0, size[0] - 2 * height)
    return F.pad(even, odd) if any(odd) else even


@torch.no_grad()
def int8_gradient_update_(
    w: Tensor,
    gradient: Tensor,
    *,
    b_bp: int,
    rounding: str = "pseudo",
    key: Tensor | None = None,
    tensor: int = 0,
) -> None:
    if w.numel() == 0:
        return
    noise = rounding_words(w.shape, key, rounding, tensor, 0, sample)
    words = NO_WORDS if noise is None else noise.contiguous().view(-1).numpy()
    target = w.contiguous()
    flat = target.view(-1).numpy(), gradient.contiguous().view(-1).numpy()
    gradient_update(*flat, b_bp, ROUNDINGS[rounding], words)
    if target is not w:
        w.copy_(target)
