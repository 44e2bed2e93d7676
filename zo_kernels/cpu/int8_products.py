"""What integer products on the CPU share: weights perturbed and packed once, then dot products.

A linear layer is a convolution with a kernel of 1 x 1 over images of one row: its samples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zo_kernels.cpu.int8_dot import LANES, convolve, scratch_sizes
from zo_kernels.cpu.int8_pack import pack
from zo_kernels.cpu.int8_weights import counters, settings_of, walk_of
from zo_kernels.cpu.memory import span
from zo_kernels.cpu.sweeps import pool_of
from zo_kernels.geometry import Geometry, conv_size
from zo_kernels.layout import layout_of

PARALLEL_FROM = 1 << 25  # products: below, a thread's hand-over costs more than it saves
NO_NOISE = (np.uint64(0),) * 5


class Noise(NamedTuple):
    """Which halves of a weight, and their noise; without a key they are the weight."""

    key: Tensor | None
    tensor: int
    start: int
    stop: int
    p_zero: float
    r_max: int


@lru_cache(maxsize=1024)
def _runs(
    channels: int, kernel: tuple[int, int], dilation: tuple[int, int], line: int
) -> tuple[int, int, Any]:
    """How many runs of neighbouring bytes a patch has, their length, and the place in the image of
    each step of 4 bytes; `line` is the bytes of its row."""
    joined = dilation[1] == 1 or kernel[1] == 1
    length = channels * (kernel[1] if joined else 1)
    columns = 1 if joined else kernel[1]
    places = [
        h * dilation[0] * line + w * dilation[1] * channels + 4 * j
        for h in range(kernel[0])
        for w in range(columns)
        for j in range((length + 3) // 4)
    ]
    return kernel[0] * columns, length, np.array(places, np.int64)


def empty(shape: int | tuple[int, ...], dtype: torch.dtype = torch.int32) -> Any:
    """Scratch from torch's allocator, where memory is counted, as an array."""
    return torch.empty(shape, dtype=dtype, device="cpu").numpy()


def zeros(shape: int | tuple[int, ...], dtype: torch.dtype = torch.int32) -> Any:
    return torch.zeros(shape, dtype=dtype, device="cpu").numpy()


def _packed(w: Tensor, noise: Noise, together: int, runs: int, length: int) -> tuple[Any, Any]:
    """Panels of the halves, `together` of them in a group; without noise one group for all."""
    walk = layout_of(w)
    if walk is None:
        w = w.contiguous()
        walk = layout_of(w)
        assert walk is not None
    count = noise.stop - noise.start
    groups, channels = count // together, together * walk.rows
    if noise.key is None:
        groups, channels, together = 1, walk.rows, 0
    blocks = -(-channels // LANES)
    panels = zeros((groups, blocks * runs * ((length + 3) // 4) * 4 * LANES), torch.int8)
    first = zeros((groups, blocks * LANES))
    words = NO_NOISE if noise.key is None else counters(noise.key, noise.tensor, 0)
    pack(
        *((w.data_ptr(), walk.extent), walk_of(walk), (walk.rows, runs, length)),
        *((noise.start, noise.stop, together), settings_of(noise.p_zero, noise.r_max), words),
        *(panels, first),
    )
    return panels, first


def over_images(images: int, products: int, job: Callable[[int, int], Any]) -> list[Any]:
    """What `job(first, end)` gives for the parts of the images: one for each thread torch uses."""
    workers = min(torch.get_num_threads(), images) if products >= PARALLEL_FROM else 1
    if workers < 2:
        return [job(0, images)]
    bounds = [images * i // workers for i in range(workers + 1)]
    jobs = [pool_of(workers).submit(job, *span) for span in pairwise(bounds)]
    return [each.result() for each in jobs]


class Images(NamedTuple):
    """`number` images of a half: `[C, H, W]`, and strides of a half, an image, a channel, a row, a
    column; together they have `columns`, where the last one is narrower."""

    number: int
    size: tuple[int, ...]
    strides: tuple[int, ...]
    columns: int


@lru_cache(maxsize=1024)
def _sizes(
    size: tuple[int, ...], pad: tuple[int, int], grid: tuple[int, ...], pool: int
) -> tuple[tuple[int, ...], int]:
    """`scratch_sizes`, and the bytes they come to: words lie at the end, on a whole word."""
    sizes = scratch_sizes(size, pad, grid, pool)
    octets, words = sizes[0] + sizes[1] + sizes[4], sizes[2] + sizes[3]
    return sizes, -(-octets // 4) * 4 + 4 * words


class After(NamedTuple):
    """What follows the sums: ReLU, maxima (0, WINDOWS or ALL), and where their places go."""

    relu: bool
    pool: int = 0
    spots: Tensor | None = None


def multiply(
    x: tuple[Tensor, Images],
    out: tuple[Tensor, Images],
    w: Tensor,
    noise: Noise,
    kernel: tuple[int, int],
    geo: Geometry,
    shared: bool,
    after: After,
) -> Tensor:
    """Fill `out`, whose size is that before pooling; returns the bits of each half."""
    source, images = x
    target, grid = out
    line = (images.size[2] + 2 * geo.padding[1]) * images.size[0]
    runs, length, offsets = _runs(images.size[0], kernel, geo.dilation, line)
    count = noise.stop - noise.start
    # Perturbed halves that use one copy of an image: their channels lie side by side.
    together = count if shared and noise.key is not None else 1
    spots = (0, 0) if after.spots is None else span(after.spots)
    sizes, room = _sizes(images.size, geo.padding, grid.size, after.pool)
    given = (
        *((span(source), span(target), spots), images.strides, images.size),
        *((geo.stride, geo.padding), (count // together, together, *grid.size)),
        *_packed(w, noise, together, runs, length),
        *(offsets, grid.strides, (after.relu, after.pool)),
    )

    def job(first: int, end: int) -> Any:
        part = (first, end, images.number, grid.columns)
        return convolve(*given, part, (sizes, empty(room, torch.uint8)))

    products = count * grid.columns * grid.size[1] * w.numel()
    found = over_images(count // together * images.number, products, job)
    bits = found[0] if len(found) == 1 else np.maximum.reduce(found)
    return torch.from_numpy(bits.reshape(-1))


def convolution(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    noise: Noise,
    geo: Geometry,
    shared: bool,
    after: After,
) -> Tensor:
    """Fill `out`, which is not empty; returns its bits."""
    kernel, images = (w.shape[2], w.shape[3]), out.shape[0] // (noise.stop - noise.start)
    height, width = conv_size(x.shape[2:], kernel, geo)
    size, grid = tuple(x.shape[1:]), (w.shape[0], height, width)
    strides = (0 if shared else images * x.stride(0), *x.stride())
    source = Images(images, size, strides, images * width)
    target = Images(images, grid, (images * out.stride(0), *out.stride()), images * width)
    return multiply((x, source), (out, target), w, noise, kernel, geo, shared, after)
