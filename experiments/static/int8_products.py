"""The shipped specialisations of the integer products."""

from __future__ import annotations

from collections.abc import Iterator

import zo_kernels.triton.int8_conv as conv2d
import zo_kernels.triton.int8_linear as linear
from experiments.static.config import Config
from zo_kernels.triton.linear import Tile

SIDE = 4096  # of the square weight for which time is predicted
# A layer of a residual network in channels_last: x runs in lines of channels. LeNet's second layer
# in NCHW: x is gathered byte by byte. A layer of one dimension, as an image of height 1.
LINES = {"B": 1024, "Ci": 64, "Co": 64, "H": 32, "W": 32, "KH": 3, "KW": 3}
GATHERED = {"B": 1024, "Ci": 6, "Co": 64, "H": 14, "W": 14, "KH": 5, "KW": 5}
SERIES = {"B": 256, "Ci": 64, "Co": 64, "H": 1, "W": 1024, "KH": 1, "KW": 3}
NOISE = ("tensor", "first_query", "p0", "magic", "shift", "r_max")  # never specialised


def _pointers(noise: bool) -> dict[str, str]:
    pointers = dict.fromkeys(("x_ptr", "w_ptr"), "*i8")
    pointers |= dict.fromkeys(("acc_ptr", "bits_ptr"), "*i32")
    return pointers | {"key_ptr": "*i64" if noise else "*i8"}  # x stands for what is not read


def _problem(
    tile: Tile, rows: int, cols: int, depth: int, inputs: int, outputs: int, halves: int
) -> dict[str, int]:
    """`inputs` and `outputs`: elements read and written, the weight aside."""
    return {
        "M": rows,
        "N": cols,
        "K": depth,
        "bytes": cols * depth + inputs + 4 * outputs,
        "flops": 2 * halves * rows * cols * depth,
        "programs": -(-rows // tile.rows) * -(-cols // tile.cols),
        "turns": -(-depth // tile.depth),
    }


def int8_paired_linear(
    tile: Tile,
    *,
    ragged: bool = False,
    odd: bool = False,
    noise: bool = True,
    pair: bool = True,
    shared: bool = False,
    int64: bool = False,
    order: str = "nt",
) -> Config:
    """A square weight, for as many rows as the tile has, for the largest one 4,096.

    `ragged`: no size is a multiple of 16. `odd`: those of rows and outputs, not of inputs.
    `order`: "nt" is `x w^T`; the others are launches of `int8_matmul`.
    """
    pointers = _pointers(noise)
    strides = {"nt": ("s_xk", "s_wk"), "nn": ("s_xk", "s_wn"), "tn": ("s_xm", "s_wn")}[order]
    every = ("M", "N", "K", "s_xm", "s_xk", "s_wn", "s_wk", "x_half", "acc_half")
    sizes = tuple(name for name in every if name not in strides)
    tail = order != "nt"
    flags = {"plain": not (noise or tail), "single": not (pair or tail), "shared": shared}
    flags |= {"ragged": ragged, "odd": odd, "int64": int64}
    unaligned = sizes if ragged else ("M", "N", "acc_half") if odd else ()
    halves = 2 if pair else 1
    rows = SIDE if tile.rows == linear.TILES[-1].rows else tile.rows
    elements = (rows * SIDE * (1 if shared else halves), halves * rows * SIDE)
    problem = _problem(tile, rows, SIDE, SIDE, *elements, halves)
    return Config(
        (f"int8_matmul-{order}-{tile.rows}" if tail else f"int8_paired_linear-{tile.rows}")
        + "".join(f"-{name}" for name, on in flags.items() if on),
        linear._int8_paired_linear_kernel,
        pointers | dict.fromkeys((*NOISE, *sizes), "i32"),
        dict.fromkeys(strides, 1)
        | {
            "NOISE": noise,
            "PAIR": pair,
            "MINUS": False,
            "SHARED": shared,
            "RELU": not tail,
            "INT64": int64,
            "BM": tile.rows,
            "BN": tile.cols,
            "BK": tile.depth,
        },
        (*pointers, *(name for name in sizes if name not in unaligned)),
        tile.warps,
        tile.stages,
        problem | ({"noise": tile.cols * tile.depth} if noise else {}),
    )


def int8_matmul(rows: int, order: str, *, ragged: bool = False) -> Config:
    """One product without noise, "nn": the error that goes back, "tn": the gradient of a weight."""
    tile = linear.tile_for(rows, ragged, along=False)
    return int8_paired_linear(tile, ragged=ragged, noise=False, pair=False, order=order)


def _sizes(layer: dict[str, int], last: bool, pool: bool, shared: bool) -> dict[str, int]:
    """Integer arguments of a launch with stride 1 and as much padding as keeps the size."""
    batch, channels, outputs, height, width, kernel_h, kernel_w = layer.values()
    grid_h, grid_w = (height // 2, width // 2) if pool else (height, width)
    pixels, grid = height * width, grid_h * grid_w
    taps = kernel_h * kernel_w
    depth = taps * channels
    return {
        "M": batch * grid * (4 if pool else 1),
        "N": outputs,
        "K": depth,
        "channels": channels,
        "size_h": height,
        "size_w": width,
        "grid_h": grid_h,
        "grid_w": grid_w,
        **dict.fromkeys(("stride_h", "stride_w", "dilation_h", "dilation_w"), 1),
        "s_xb": channels * pixels,
        "s_xc": 1 if last else pixels,
        "s_xh": width * (channels if last else 1),
        "s_xw": channels if last else 1,
        "s_wn": depth,
        "s_outer": channels if last else 1,
        "s_inner": 1 if last else taps,
        "s_ab": outputs * grid,
        "s_ap": outputs if last else 1,
        "s_an": 1 if last else grid,
        "x_half": 0 if shared else batch * channels * pixels,
        "acc_half": batch * outputs * grid,
    }


def int8_paired_conv2d(
    tile: Tile,
    *,
    lines: bool,
    pool: bool = False,
    noise: bool = True,
    pair: bool = True,
    shared: bool = False,
    int64: bool = False,
    series: bool = False,
) -> Config:
    """`series`: a launch of `int8_paired_conv1d`."""
    layer = (SERIES if series else LINES if lines else GATHERED) | {"Co": tile.cols}
    sizes, pointers = _sizes(layer, lines, pool, shared), _pointers(noise)
    ones = {name: 1 for name, value in sizes.items() if value == 1}
    rest = (*NOISE, "pad_h", "pad_w")
    types = {name: "i32" for name in (*sizes, *rest) if name not in ones}
    flags = {"pool": pool, "plain": not noise, "single": not pair}
    flags |= {"shared": shared, "int64": int64}
    access, halves = "lines" if lines else "gathered", 2 if pair else 1
    inputs = layer["B"] * layer["Ci"] * layer["H"] * layer["W"] * (1 if shared else halves)
    outputs = halves * sizes["acc_half"]
    rows, cols, depth = (sizes[name] for name in "MNK")
    problem = _problem(tile, rows, cols, depth, inputs, outputs, halves)
    return Config(
        f"int8_paired_conv{1 if series else 2}d-{tile.rows}x{tile.cols}-{access}"
        + "".join(f"-{name}" for name, on in flags.items() if on),
        conv2d._int8_paired_conv2d_kernel,
        pointers | types,
        ones
        | {
            "KERNEL_W": layer["KW"],
            "NOISE": noise,
            "PAIR": pair,
            "MINUS": False,
            "SHARED": shared,
            "RELU": True,
            "POOL": pool,
            "PAD": True,
            "ONE_TAP": layer["Ci"] % tile.depth == 0,
            "INT64": int64,
            "BM": tile.rows,
            "BN": tile.cols,
            "BK": tile.depth,
        },
        (*pointers, *(name for name in sizes if sizes[name] % 16 == 0)),
        tile.warps,
        tile.stages,
        problem | ({"noise": tile.cols * tile.depth} if noise else {}),
    )


def _linear(target: str) -> Iterator[Config]:
    largest = linear.TILES[-1]
    for tile in linear.TILES:
        yield int8_paired_linear(tile)
        yield int8_paired_linear(tile, odd=True)
    for tile in linear.RAGGED:
        yield int8_paired_linear(tile, ragged=True)
    for order in ("nn", "tn"):
        for tile in linear.TILES:
            yield int8_matmul(tile.rows, order)
        for tile in linear.RAGGED:
            yield int8_matmul(tile.rows, order, ragged=True)
    if target == "cuda-90":
        for tile in linear.TILES:
            yield int8_paired_linear(tile, noise=False)
            yield int8_paired_linear(tile, noise=False, pair=False)
        for tile in linear.RAGGED:
            yield int8_paired_linear(tile, ragged=True, int64=True)
        yield int8_paired_linear(largest, shared=True)
        yield int8_paired_linear(largest, pair=False)
        yield int8_paired_linear(largest, int64=True)


def _conv2d(target: str) -> Iterator[Config]:
    for tile in conv2d.TILES:
        yield int8_paired_conv2d(tile, lines=True)
    for tile in conv2d.GATHERED:
        yield int8_paired_conv2d(tile, lines=False, pool=True)
    yield int8_paired_conv2d(conv2d.GATHERED[-1], lines=False, series=True)
    if target == "cuda-90":
        largest, few = conv2d.TILES[-1], conv2d.GATHERED[1]
        yield int8_paired_conv2d(few, lines=False)
        yield int8_paired_conv2d(few, lines=False, pool=True, int64=True)
        yield int8_paired_conv2d(largest, lines=True, pool=True)
        yield int8_paired_conv2d(largest, lines=True, shared=True)
        yield int8_paired_conv2d(largest, lines=True, noise=False, pair=False)
        yield int8_paired_conv2d(largest, lines=True, int64=True)


def configs(target: str) -> Iterator[Config]:
    """The tiles on each target; on sm_90 other forms of a launch, too."""
    yield from _linear(target)
    yield from _conv2d(target)


__all__ = ["configs", "int8_matmul", "int8_paired_conv2d", "int8_paired_linear"]
