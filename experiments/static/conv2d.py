"""The shipped specialisations of `zo_kernels.paired_conv2d`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import zo_kernels.triton.conv as module
from experiments.static.config import TYPES, Config
from zo_kernels.triton.philox import KIND

# A layer of ResNet in channels_last: x runs in lines of channels. LeNet's second layer (with
# padding) in NCHW: x is gathered element by element.
LINES = {"B": 1024, "Ci": 64, "Co": 64, "H": 32, "W": 32, "K": 3}
GATHERED = {"B": 1024, "Ci": 6, "Co": 64, "H": 28, "W": 28, "K": 5}
BYTES = {"fp32": 4, "bf16": 2}
FEW = {"B": 1, "H": 8, "W": 8}


def _integers(problem: dict[str, int], last: bool, pool: bool, shared: bool) -> dict[str, int]:
    """Integer arguments of a launch with stride 1 and as much padding as keeps the size."""
    batch, channels, outputs, height, width, kernel = problem.values()
    grid_h, grid_w = (height // 2, width // 2) if pool else (height, width)
    pixels, grid = height * width, grid_h * grid_w
    taps, depth = kernel * kernel, kernel * kernel * channels
    integers = {
        "M": batch * grid * (4 if pool else 1),
        "N": outputs,
        "K": depth,
        "channels": channels,
        "size_h": height,
        "size_w": width,
        "grid_h": grid_h,
        "grid_w": grid_w,
        **dict.fromkeys(("stride_h", "stride_w", "dilation_h", "dilation_w", "s_b"), 1),
        "s_xb": channels * pixels,
        "s_xc": 1 if last else pixels,
        "s_xh": width * (channels if last else 1),
        "s_xw": channels if last else 1,
        "s_wn": depth,
        "s_outer": channels if last else 1,
        "s_inner": 1 if last else taps,
        "s_yb": outputs * grid,
        "s_yp": outputs if last else 1,
        "s_yn": 1 if last else grid,
        "x_half": 0 if shared else batch * channels * pixels,
        "y_half": batch * outputs * grid,
    }
    return integers


def _work(
    problem: dict[str, int], integers: dict[str, int], tile: Any, read: int, out: int, shared: bool
) -> dict[str, int]:
    """Of a launch over both halves; `read` and `out` are bytes of an element."""
    rows, outputs, depth = integers["M"], integers["N"], integers["K"]
    image = problem["B"] * integers["s_xb"]
    y = problem["B"] * integers["s_yb"]
    return {
        "bytes": ((1 if shared else 2) * image + outputs * (depth + 1)) * read + 2 * y * out,
        "flops": 4 * rows * outputs * depth,
        "programs": -(-rows // tile.rows) * -(-outputs // tile.cols),
        "turns": -(-depth // tile.depth),
        "noise": tile.cols * tile.depth,
    }


def paired_conv2d(
    noise: str,
    kind: str,
    tile: Any,
    problem: dict[str, int],
    *,
    channels_last: bool,
    pool: bool = False,
    shared: bool = False,
    int64: bool = False,
) -> Config:
    """A tile for a kind of operands; "mixed" rounds fp32 ones to bf16."""
    dtype = "bf16" if kind == "bf16" else "fp32"
    out = "bf16" if kind in ("bf16", "mixed") else "fp32"
    read = dict.fromkeys(("x_ptr", "w_ptr", "b_ptr"), f"*{dtype}")
    pointers = read | {"y_ptr": f"*{out}", "key_ptr": "*i64", "eps_ptr": "*fp64"}
    integers = _integers(problem, channels_last, pool, shared)
    rest = ("tensor", "bias_tensor", "first_query", "pad_h", "pad_w")  # never specialised
    ones = {name: 1 for name, value in integers.items() if value == 1}
    types = {name: "i32" for name in (*integers, *rest) if name not in ones}
    if int64:
        types |= dict.fromkeys({"x_half", "y_half"} & {*types}, "i64")
    names = {"-pool": pool, "-shared": shared, "-int64": int64}
    access = "lines" if channels_last else "gathered"
    return Config(
        f"paired_conv2d-{noise}-{kind}-{tile.rows}x{tile.cols}-{access}"
        + "".join(name for name, yes in names.items() if yes),
        module._paired_conv2d_kernel,
        pointers | types | {"scale": "fp64", "bias_scale": "fp64"},
        ones
        | {
            "KERNEL_W": problem["K"],
            "NOISE": KIND[noise],
            "PAIR": True,
            "SHARED": shared,
            "BIAS": True,
            "RELU": True,
            "POOL": pool,
            "PAD": True,
            "ONE_TAP": problem["Ci"] % tile.depth == 0,
            "DOT": TYPES[out],
            "PRECISION": "ieee" if out == "bf16" else kind,
            "UPCAST": False,
            "INT64": int64,
            "BM": tile.rows,
            "BN": tile.cols,
            "BK": tile.depth,
        },
        (*pointers, *(name for name in integers if integers[name] % 16 == 0)),
        tile.warps,
        tile.stages,
        problem | _work(problem, integers, tile, BYTES[dtype], BYTES[out], shared),
    )


def _tiles(kind: str) -> Iterator[tuple[Any, bool]]:
    """Tiles of a kind, for x in lines and gathered."""
    for tile in module.TILES[kind]:
        yield tile, True
        if tile.cols <= module.GATHERED_COLS.get(kind, tile.cols):
            yield tile, False


def _config(noise: str, kind: str, tile: Any, lines: bool, **given: bool) -> Config:
    size = FEW if tile.rows == 64 else {}
    problem = (LINES if lines else GATHERED) | {"Co": tile.cols} | size
    return paired_conv2d(noise, kind, tile, problem, channels_last=lines, **given)


def configs(target: str) -> Iterator[Config]:
    """Every tile on sm_90; the heaviest of each kind elsewhere."""
    for kind, tiles in module.TILES.items():
        if kind == "tf32x3" and target.startswith("hip"):
            continue
        for tile, lines in _tiles(kind):
            if target == "cuda-90" or tile == tiles[-1] or (not lines and tile.rows == 128):
                for noise in ("normal", "rademacher"):
                    yield _config(noise, kind, tile, lines, pool=not lines)
        if target == "cuda-90":
            yield _config("normal", kind, tiles[-1], True, shared=True)
            yield _config("rademacher", kind, tiles[-1], True, pool=True, int64=True)


__all__ = ["configs", "paired_conv2d"]
