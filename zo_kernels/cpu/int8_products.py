"""CPU twins of the integer products: weights perturbed and packed once, then dot products.

A linear layer is a convolution with a kernel of 1 x 1 over images of one row: its samples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zo_kernels._conv import Geometry, Pair, conv_size, empty_output, geometry
from zo_kernels._layout import groups_per_row, layout_of
from zo_kernels.cpu.int8 import _counters, _memory, _settings, _walk
from zo_kernels.cpu.int8_dot import LANES, convolve, pack
from zo_kernels.cpu.int8_kernels import perturb_int8
from zo_kernels.cpu.ops import _pool

PARALLEL_FROM = 1 << 25  # products: below, a thread's hand-over costs more than it saves
SAMPLES = 64  # of a linear layer in an "image": they stay in cache
ONE = Geometry((1, 1), (0, 0), (1, 1))


class Noise(NamedTuple):
    """Which halves of a weight, and their noise; without a key they are the weight."""

    key: Tensor | None
    tensor: int
    start: int
    stop: int
    p_zero: float
    r_max: int


def _halves(w: Tensor, noise: Noise) -> Any:
    """`clip(w +- z)` with columns in the order of the noise: `[H, N K]`."""
    count = noise.stop - noise.start
    if noise.key is None:
        flat = w.movedim(1, -1).reshape(1, -1) if w.ndim > 2 else w.reshape(1, -1)
        return flat.contiguous().numpy().repeat(count, 0)
    walk = layout_of(w)
    if walk is None:
        w = w.contiguous()
        walk = layout_of(w)
        assert walk is not None
    out = np.empty((count, w.numel()), np.int8)
    to = (walk.cols, walk.inner, walk.cols, walk.inner, 1)
    groups = walk.rows * groups_per_row(walk.cols, "sparse_int8")
    rest = (_walk(walk), to, groups, _settings(noise.p_zero, noise.r_max))
    memory = _memory(w, walk.extent)
    for query in range(noise.start // 2, (noise.stop + 1) // 2):
        plus, minus = 2 * query >= noise.start, 2 * query + 1 < noise.stop
        first = out[2 * query - noise.start + (not plus)]
        second = out[2 * query + 1 - noise.start] if minus else first
        words = _counters(noise.key, noise.tensor, query)
        perturb_int8(memory, first, second, plus, minus, *rest, words)
    return out


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


def _packed(halves: Any, channels: int, runs: int, length: int) -> tuple[Any, Any]:
    blocks = -(-channels // LANES)
    size = blocks * runs * ((length + 3) // 4) * 4 * LANES
    panels = np.zeros((len(halves), size), np.int8)
    first = np.zeros((len(halves), blocks * LANES), np.int32)
    for half, panel, sums in zip(halves, panels, first, strict=True):
        pack(half, (channels, runs, length), panel, sums)
    return panels, first


def _extent(t: Tensor) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))


def _over_images(images: int, products: int, job: Callable[[int, int], Any]) -> Any:
    """The largest of what `job(first, end)` gives, over the threads torch uses."""
    workers = min(torch.get_num_threads(), images) if products >= PARALLEL_FROM else 1
    if workers < 2:
        return job(0, images)
    bounds = [images * i // workers for i in range(workers + 1)]
    jobs = [_pool(workers).submit(job, *span) for span in pairwise(bounds)]
    return np.maximum.reduce([each.result() for each in jobs])


class Images(NamedTuple):
    """`number` images of a half: `[C, H, W]`, and strides of a half, an image, a channel, a row, a
    column; together they have `columns`, where the last one is narrower."""

    number: int
    size: tuple[int, ...]
    strides: tuple[int, ...]
    columns: int


def _multiply(
    x: tuple[Tensor, Images],
    out: tuple[Tensor, Images],
    halves: Any,
    kernel: tuple[int, int],
    geo: Geometry,
    shared: bool,
    relu: bool,
    pool: bool,
) -> Tensor:
    """Fill `out`, whose size is that before pooling; returns the bits of each half."""
    source, images = x
    target, grid = out
    line = (images.size[2] + 2 * geo.padding[1]) * images.size[0]
    runs, length, offsets = _runs(images.size[0], kernel, geo.dilation, line)
    panels, first = _packed(halves, grid.size[0], runs, length)
    memory, to = _memory(source, _extent(source)), _memory(target, _extent(target))
    s_half, *s_x = images.strides
    together = len(halves) if shared else 1  # halves that use one copy of an image
    largest: list[int] = []
    for half in range(0, len(halves), together):
        here = slice(half, half + together)
        job = partial(
            _span,
            *(memory, (half * s_half, *s_x), images.size, (geo.stride, geo.padding), grid.size),
            *(panels[here], first[here], offsets, to, (half * grid.strides[0], *grid.strides)),
            *((relu, pool), grid.columns),
        )
        products = together * grid.columns * grid.size[1] * halves.shape[1]
        largest += _over_images(images.number, products, job).tolist()
    return torch.tensor([n.bit_length() for n in largest], dtype=torch.int32)


def _span(*args: Any) -> Any:
    *rest, columns, begin, end = args
    return convolve(*rest, (begin, end, columns))  # type: ignore[call-arg]


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
    halves = _halves(w, Noise(key, tensor or 0, start, stop, p_zero, r_max))
    wide = min(rows, SAMPLES)
    images = -(-rows // wide)
    s_row, s_col = x.stride()
    strides = (0 if shared else rows * s_row, wide * s_row, s_col, 0, s_row)
    source = Images(images, (depth, 1, wide), strides, rows)
    to = (rows * features, wide * features, 1, 0, features)
    target = Images(images, (features, 1, wide), to, rows)
    given = (halves, (1, 1), ONE, shared, relu, False)
    return out, _multiply((x, source), (out, target), *given)


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
    halves = _halves(w, Noise(key, tensor or 0, start, stop, p_zero, r_max))
    kernel, images = (w.shape[2], w.shape[3]), out.shape[0] // count
    height, width = conv_size(x.shape[2:], kernel, geo)
    size, grid = tuple(x.shape[1:]), (w.shape[0], height, width)
    strides = (images * x.stride(0), *x.stride())
    source = Images(images, size, strides, images * width)
    target = Images(images, grid, (images * out.stride(0), *out.stride()), images * width)
    given = (halves, kernel, geo, shared, relu, pool)
    return out, _multiply((x, source), (out, target), *given)


def int8_matmul(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    acc, bits = int8_paired_linear(a, b.t(), None, stop=1)
    return acc, bits.squeeze(0)


__all__ = ["int8_matmul", "int8_paired_conv2d", "int8_paired_linear"]
