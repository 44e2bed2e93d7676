"""Calls of `paired_linear` and `paired_conv2d`: inputs, operations, float64 results of a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zo_kernels as zk
from experiments.benchmarks.cases import NOISES, WEIGHT, Case, Shared
from experiments.benchmarks.section import BOUNDS, Refused, require
from zo_kernels import reference
from zo_kernels.paths import FUSED_NOISE
from zo_kernels.triton.conv import TILES as CONV_TILES
from zo_kernels.triton.linear import TILES

Product = tuple[Tensor, Tensor, Tensor]  # x, w, bias
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
END = 16  # rows at both ends of a half that are compared


def product_kinds() -> Iterator[tuple[str, str, torch.dtype]]:
    """Name, unit of the peaks, dtype of x and w."""
    yield "bf16", "bf16", torch.bfloat16
    yield "tf32", "tf32", torch.float32
    if not torch.version.hip:
        yield "tf32x3", "tf32", torch.float32
    yield "ieee", "fp32", torch.float32


def verify(
    s: Shared, given: Product, y: Tensor, noise: str, layer: Layer, ends: int, bound: float
) -> float:
    """The largest error of `ends` samples at both ends of each half. Raises: Refused."""
    x, w, b = given
    if not bool(torch.isfinite(y).all()):
        raise Refused("outputs are not finite")
    ws, bs = (
        reference.perturbed_weights(t.double(), s.key, s.eps, tensor=i, noise=noise)
        for i, t in ((1, w), (2, b))
    )
    errors = []
    for h, of_half in enumerate(torch.arange(len(x), device=s.device).chunk(2)):
        here = torch.cat([of_half[:ends], of_half[-ends:]])
        exact = layer(x[here].double(), ws[h], bs[h])
        errors.append(require(f"samples of half {h}", y[here], exact, bound))
    return max(errors)


def linears(s: Shared, width: int, most: int) -> Iterator[Case]:
    """`paired_linear` in every tile: as many rows as it holds."""
    for kind, unit, dtype in product_kinds():
        for rows in sorted({min(tile.rows, most) for tile in TILES[kind]}):
            for noise in NOISES:
                yield linear(s, rows, width, kind, unit, dtype, noise)


def linear(
    s: Shared, rows: int, width: int, kind: str, unit: str, dtype: torch.dtype, noise: str
) -> Case:
    precision = "ieee" if kind == "bf16" else kind

    def make() -> Product:
        x = s.normal(2 * rows, width, dtype=dtype)
        return x, s.normal(width, width, dtype=dtype, scale=WEIGHT), s.normal(width, dtype=dtype)

    def call(given: Product) -> Tensor:
        places: dict[str, Any] = {"tensor": 1, "bias_tensor": 2, "noise": noise}
        places |= {"precision": precision, "backend": s.backend}
        return zk.paired_linear(*given, s.key, s.eps, **places)

    def check(given: Product, run: Callable[[Product], Tensor] = call) -> float:
        return verify(s, given, run(given), noise, F.linear, END, BOUNDS[kind])

    size, item = width * width, dtype.itemsize
    products = 4.0 * rows * size * (3 if kind == "tf32x3" else 1)
    return Case(
        "paired_linear",
        f"{rows}x{width}x{width} {kind} {noise}",
        make,
        call,
        check,
        size * item + 4 * rows * width * item,
        flops=products,
        kind=unit,
        elements=size * -(-rows // TILES[kind][-1].rows),
        instructions=FUSED_NOISE[noise],
        precision=precision,
        vendor=lambda given: [F.linear(x, given[1], given[2]) for x in given[0].chunk(2)],
        vendor_what="both products, weights not perturbed",
    )


def convolutions(s: Shared, batch: int, size: int, outputs: list[int]) -> Iterator[Case]:
    """`paired_conv2d`, 3x3: few and many output channels, with ReLU and pooling behind it."""
    for kind, unit, dtype in product_kinds():
        known = {min(tile.cols, outputs[-1]) for tile in CONV_TILES[kind]}
        for channels in sorted({*outputs} & known) or outputs[:1]:
            for noise in NOISES:
                yield convolution(s, batch, size, channels, kind, unit, dtype, noise)


def convolution(
    s: Shared,
    batch: int,
    size: int,
    channels: int,
    kind: str,
    unit: str,
    dtype: torch.dtype,
    noise: str,
    after: bool = True,
) -> Case:
    """With ReLU and pooling after it, or alone."""
    precision = "ieee" if kind == "bf16" else kind

    def make() -> Product:
        x = s.normal(2 * batch, channels, size, size, dtype=dtype)
        w = s.normal(channels, channels, 3, 3, dtype=dtype, scale=WEIGHT)
        x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
        return x, w, s.normal(channels, dtype=dtype)

    def call(given: Product) -> Tensor:
        places: dict[str, Any] = {"tensor": 1, "bias_tensor": 2, "noise": noise, "padding": 1}
        places |= {"relu": after, "pool": after, "precision": precision, "backend": s.backend}
        x, w, b = given
        return zk.paired_conv2d(x, w, b, s.key, s.eps, **places)

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = F.conv2d(x, w, b, padding=1)
        return F.max_pool2d(y.relu(), 2) if after else y

    def check(given: Product, run: Callable[[Product], Tensor] = call) -> float:
        return verify(s, given, run(given), noise, plain, 1, BOUNDS[kind])

    places, count = batch * size * size, 9 * channels * channels
    products = 4.0 * places * count * (3 if kind == "tf32x3" else 1)
    moved = 2 * places * channels * (1 + (1 / 4 if after else 1)) + count
    rows = CONV_TILES[kind][-1].rows
    return Case(
        "paired_conv2d",
        f"{batch}x{channels}x{size}x{size} 3x3 {kind} {noise}{' relu pool' if after else ''}",
        make,
        call,
        check,
        int(moved * dtype.itemsize),
        flops=products,
        kind=unit,
        elements=count * -(-places // rows),
        instructions=FUSED_NOISE[noise],
        precision=precision,
        vendor=lambda given: [plain(x, given[1], given[2]) for x in given[0].chunk(2)],
        vendor_what="both convolutions and what follows, weights not perturbed",
    )
