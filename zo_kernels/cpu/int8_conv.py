"""CPU twins of the integer products: weights perturbed and packed once, then dot products.

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

from zo_kernels.cpu.int8_dot import ALL, LANES, WINDOWS, convolve, scratch_sizes
from zo_kernels.cpu.int8_pack import pack
from zo_kernels.cpu.int8_weights import _counters, _settings, _walk
from zo_kernels.cpu.memory import span
from zo_kernels.cpu.update import _pool
from zo_kernels.geometry import Geometry, Pair, conv_size, empty_output, geometry
from zo_kernels.layout import layout_of

PARALLEL_FROM = 1 << 25  # products: below, a thread's hand-over costs more than it saves
SAMPLES = 64  # of a linear layer in an "image": they stay in cache
ONE = Geometry((1, 1), (0, 0), (1, 1))
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
    return torch.empty(shape, dtype=dtype).numpy()


def zeros(shape: int | tuple[int, ...], dtype: torch.dtype = torch.int32) -> Any:
    return torch.zeros(shape, dtype=dtype).numpy()


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
    words = NO_NOISE if noise.key is None else _counters(noise.key, noise.tensor, 0)
    pack(
        *((w.data_ptr(), walk.extent), _walk(walk), (walk.rows, runs, length)),
        *((noise.start, noise.stop, together), _settings(noise.p_zero, noise.r_max), words),
        *(panels, first),
    )
    return panels, first


def over_images(images: int, products: int, job: Callable[[int, int], Any]) -> list[Any]:
    """What `job(first, end)` gives for the parts of the images: one for each thread torch uses."""
    workers = min(torch.get_num_threads(), images) if products >= PARALLEL_FROM else 1
    if workers < 2:
        return [job(0, images)]
    bounds = [images * i // workers for i in range(workers + 1)]
    jobs = [_pool(workers).submit(job, *span) for span in pairwise(bounds)]
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


def _multiply(
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


def int8_paired_linear(
    x: Tensor,
    w: Tensor,
    key: Tensor | None,
    *,
    tensor: int | None = None,
    start: int = 0,
    stop: int = 2,
    shared: bool = False,
    p_zero: float = 0.0,
    r_max: int = 1,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    count, (features, depth) = stop - start, w.shape
    rows = x.shape[0] if shared else x.shape[0] // count
    out = torch.empty((count * rows, features), dtype=torch.int32)
    if out.numel() == 0 or depth == 0:
        return out.zero_(), torch.zeros(count, dtype=torch.int32)
    noise = Noise(key, tensor or 0, start, stop, p_zero, r_max)
    wide = min(rows, SAMPLES)
    images = -(-rows // wide)
    s_row, s_col = x.stride()
    strides = (0 if shared else rows * s_row, wide * s_row, s_col, 0, s_row)
    source = Images(images, (depth, 1, wide), strides, rows)
    to = (rows * features, wide * features, 1, 0, features)
    target = Images(images, (features, 1, wide), to, rows)
    return out, _multiply((x, source), (out, target), w, noise, (1, 1), ONE, shared, After(relu))


def int8_paired_conv2d(
    x: Tensor,
    w: Tensor,
    key: Tensor | None,
    *,
    tensor: int | None = None,
    start: int = 0,
    stop: int = 2,
    shared: bool = False,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    p_zero: float = 0.0,
    r_max: int = 1,
    relu: bool = False,
    pool: bool = False,
) -> tuple[Tensor, Tensor]:
    count, geo = stop - start, geometry(stride, padding, dilation)
    out = empty_output(x, w, count, shared, geo, pool, torch.int32)
    if out.numel() == 0:
        return out, torch.zeros(count, dtype=torch.int32)
    noise = Noise(key, tensor or 0, start, stop, p_zero, r_max)
    after = After(relu, WINDOWS if pool else 0)
    return out, _convolution(x, w, out, noise, geo, shared, after)


def _convolution(
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
    return _multiply((x, source), (out, target), w, noise, kernel, geo, shared, after)


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
    noise, after = Noise(None, 0, 0, halves, 0.0, 1), After(relu, WINDOWS, places)
    return acc, _convolution(x, w, acc, noise, geo, False, after), places


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
    count, geo = stop - start, geometry((1, stride), (0, padding), (1, dilation))
    x, w = x.unsqueeze(2), w.unsqueeze(2)
    acc = torch.empty((x.shape[0] * (count if shared else 1), w.shape[0]), dtype=torch.int32)
    noise, to = Noise(key, tensor or 0, start, stop, p_zero, r_max), acc.unsqueeze(2).unsqueeze(3)
    return acc, _convolution(x, w, to, noise, geo, shared, After(relu, ALL))


def int8_matmul(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    acc, bits = int8_paired_linear(a, b.t(), None, stop=1)
    return acc, bits.squeeze(0)


__all__ = [
    "empty",
    "int8_conv2d_max_pool",
    "int8_matmul",
    "int8_paired_conv1d_max",
    "int8_paired_conv2d",
    "int8_paired_linear",
    "over_images",
    "zeros",
]
