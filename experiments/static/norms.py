"""Specialisations of the normalisations and of cross-entropy, as launches of real layers make them.

Integers of these kernels are not specialised: what divides them is told by ALIGN.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch

from experiments.static.config import Config
from zo_kernels.triton.norms import alignment, power_of_two
from zo_kernels.triton.plan import plan_of

HALVES = 2
BYTES = {"fp32": 4, "bf16": 2}
PARTS, TARGETS = 1024, 4096  # of the two small kernels of cross-entropy
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
BATCH_NORM, CROSS_ENTROPY, LAYER_NORM = (
    import_module(f"zo_kernels.triton.{name}")
    for name in ("batch_norm", "cross_entropy", "layer_norm")
)


def _config(
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    scalars: str,
    constants: dict[str, Any],
    warps: int,
    problem: dict[str, int],
) -> Config:
    floats = ("epsilon", "smoothing", "uniform")
    types = {scalar: "fp32" if scalar in floats else "i32" for scalar in scalars.split()}
    signature = {k: f"*{v}" for k, v in pointers.items()} | types
    return Config(name, kernel, signature, constants, (*pointers,), warps, problem=problem)


def batch_norm(
    kind: str, dtype: str, layout: str, batch: int, channels: int, size: int, relu: bool = True
) -> Config:
    """`kind`: "moments", "merge" or "normalize" of `[HALVES * batch, channels, size, size]`."""
    x = torch.empty((HALVES * batch, channels, size, size), device="meta")
    plan = plan_of(x.to(memory_format=FORMATS[layout]), HALVES)
    if kind == "normalize":
        plan = plan.wider()
    constants = plan.constants
    wide = {"INT64": plan.wide, "CHANNELS": plan.tile_channels}
    blocks_r, blocks_c = plan.blocks
    of_x, of_moments = BYTES[dtype] * x.numel(), 8 * HALVES * channels
    extents, spans = "outer rows channels", "outer rows channels splits per_split"
    moments = {"mean_ptr": "fp32", "var_ptr": "fp32"}
    match kind:
        case "moments":
            pointers = {"x_ptr": dtype, "mean_ptr": "fp32", "m2_ptr": "fp32"}
            constants |= wide | {"FINAL": plan.splits == 1}
            moved, programs = of_x + plan.splits * of_moments, blocks_c * plan.splits
        case "merge":
            parts = {"part_mean_ptr": "fp32", "part_m2_ptr": "fp32"}
            pointers = {"x_ptr": dtype} | parts | moments
            constants |= {
                "SPLITS": power_of_two(plan.splits),
                "CHANNELS": BATCH_NORM.MERGED_CHANNELS,
            }
            moved = (plan.splits + 1) * of_moments
            programs = -(-channels // BATCH_NORM.MERGED_CHANNELS)
        case _:
            pointers = {"x_ptr": dtype, "y_ptr": dtype} | moments | {"w_ptr": dtype, "b_ptr": dtype}
            constants |= wide | {"RUNNING": False, "WEIGHT": True, "BIAS": True, "RELU": relu}
            moved, programs = 2 * of_x + of_moments, blocks_r * blocks_c * plan.outer
    return _config(
        f"paired_batch_norm_{kind}-{dtype}-{layout}-{batch}x{channels}x{size}x{size}",
        getattr(BATCH_NORM, f"_{kind}_kernel"),
        pointers,
        f"epsilon {extents}" if kind == "normalize" else spans,
        constants,
        BATCH_NORM.WARPS,
        {
            **{"halves": HALVES, "batch": batch, "channels": channels, "spatial": size * size},
            **{"bytes": moved, "programs": HALVES * programs, "turns": plan.per_split},
        },
    )


def layer_norm(dtype: str, rows: int, cols: int) -> Config:
    """`[HALVES * rows, cols]`."""
    constants: dict[str, Any] = dict.fromkeys(("WEIGHT", "BIAS"), True) | {"RELU": False}
    constants |= {"ALIGN": alignment(cols)}
    tile, long = LAYER_NORM.tile_for(rows, cols), LAYER_NORM.is_long(cols)
    constants |= {"BLOCK": tile[1]} if long else {"ROWS": tile[0], "COLS": tile[1]}
    turns = -(-cols // tile[1])
    moved = 2 * HALVES * (rows + 1) * cols * BYTES[dtype]  # also of long rows, read twice
    programs = HALVES * (rows if long else -(-rows // tile[0]))
    return _config(
        f"paired_layer_norm-{dtype}-{rows}x{cols}",
        LAYER_NORM._long_layer_norm_kernel if long else LAYER_NORM._layer_norm_kernel,
        dict.fromkeys(("x_ptr", "y_ptr", "w_ptr", "b_ptr"), dtype),
        "epsilon rows cols",
        constants,
        tile[2],
        {
            **{"halves": HALVES, "rows": rows, "cols": cols},
            **{"bytes": moved, "programs": programs, "turns": turns},
        },
    )


def cross_entropy(
    kind: str, dtype: str, rows: int, classes: int, smooth: bool = False, each: bool = False
) -> Config:
    """`kind`: "forward" or "backward" of `[HALVES, rows, classes]`. Its sums are in fp64; `each`
    row by itself has none."""
    height, width, warps = CROSS_ENTROPY.tile_for(rows, classes)
    constants = {"ALIGN": alignment(classes), "ROWS": height, "COLS": width, "EACH": each}
    pointers = {"x_ptr": dtype, "target_ptr": "i64", "lse_ptr": "fp32"}
    sizes = "B C s_half s_row smoothing"
    of_x, programs = HALVES * rows * classes * BYTES[dtype], HALVES * -(-rows // height)
    moved, turns = 8 * rows + 4 * HALVES * rows * (1 + each), 1
    if kind == "forward":
        kernel = CROSS_ENTROPY._cross_entropy_kernel
        pointers |= {"part_ptr": "fp32" if each else "fp64"}
        constants |= {
            "SMOOTH": smooth,
            "LOOP": classes > width,
            "VEC": min(16 // BYTES[dtype], width),
        }
        scalars = f"part_count {sizes} ignore_index"
        moved, turns = moved + of_x, -(-classes // width)
    else:
        kernel = CROSS_ENTROPY._cross_entropy_backward_kernel
        pointers |= {"scale_ptr": "fp32", "out_ptr": dtype}
        scalars = f"{sizes} uniform ignore_index"
        moved, programs = moved + 2 * of_x, programs * -(-classes // width)
    return _config(
        f"paired_cross_entropy_{kind}-{dtype}-{'each' if each else 'fp64-sum'}-{rows}x{classes}"
        f"{'-smooth' if smooth else ''}",
        *(kernel, pointers, scalars, constants, warps),
        {
            **{"halves": HALVES, "rows": rows, "classes": classes},
            **{"bytes": moved, "programs": programs, "turns": turns},
        },
    )


def small_cross_entropy(kind: str) -> Config:
    """ "mean": losses from their parts; "scale": of the gradient, from a count of targets."""
    if kind == "mean":
        pointers, scalars = {"part_ptr": "fp64", "loss_ptr": "fp32"}, "blocks part_count"
        constants, warps = {"BLOCK": CROSS_ENTROPY.SUM_BLOCK}, 4
        problem = {"parts": PARTS, "bytes": 16 * HALVES * PARTS, "programs": HALVES}
        turns = -(-PARTS // CROSS_ENTROPY.SUM_BLOCK)
    else:
        pointers = {"target_ptr": "i64", "grad_ptr": "fp32", "scale_ptr": "fp32"}
        scalars, warps = "B halves ignore_index", 8
        constants = {"HALVES": HALVES, "BLOCK": CROSS_ENTROPY.COUNT_BLOCK}
        problem = {"rows": TARGETS, "bytes": 8 * TARGETS, "programs": 1}
        turns = -(-TARGETS // CROSS_ENTROPY.COUNT_BLOCK)
    return _config(
        f"paired_cross_entropy_{kind}-fp64",
        getattr(CROSS_ENTROPY, f"_{kind}_kernel"),
        *(pointers, scalars, constants, warps),
        {"halves": HALVES, **problem, "turns": turns},
    )


def configs(target: str) -> Iterator[Config]:
    """A representative set for sm_90, the heaviest ones elsewhere."""
    yield batch_norm("moments", "fp32", "nhwc", 256, 512, 14)
    yield batch_norm("merge", "bf16", "nhwc", 256, 64, 56)
    yield batch_norm("normalize", "bf16", "nhwc", 256, 512, 14)
    yield batch_norm("normalize", "fp32", "nchw", 256, 64, 56)
    yield layer_norm("fp32", 4096, 16384)
    yield layer_norm("bf16", 64, 50257)
    yield cross_entropy("forward", "bf16", 64, 32000, smooth=True)
    yield cross_entropy("backward", "fp32", 64, 32000)
    if target != "cuda-90":
        return
    for layout in FORMATS:
        yield batch_norm("moments", "bf16", layout, 256, 64, 56)
        yield batch_norm("moments", "fp32", layout, 32, 6, 28)
    yield batch_norm("moments", "bf16", "nchw", 256, 256, 14)
    yield batch_norm("moments", "bf16", "nchw", 32, 512, 7)
    yield batch_norm("merge", "fp32", "nchw", 256, 64, 56)
    yield batch_norm("normalize", "bf16", "nchw", 256, 256, 14)
    yield batch_norm("normalize", "bf16", "nchw", 256, 512, 7)
    yield batch_norm("normalize", "fp32", "nhwc", 256, 64, 56)
    yield layer_norm("bf16", 16384, 64)
    yield layer_norm("fp32", 16384, 768)
    yield layer_norm("bf16", 4096, 1000)
    yield layer_norm("bf16", 4096, 4096)
    yield cross_entropy("forward", "fp32", 4096, 10)
    yield cross_entropy("forward", "bf16", 1024, 1000)
    yield cross_entropy("forward", "fp32", 1024, 1000, smooth=True)
    yield cross_entropy("forward", "fp32", 64, 32000)
    yield cross_entropy("backward", "bf16", 1024, 1000)
    yield cross_entropy("backward", "fp32", 4096, 10)
    yield cross_entropy("forward", "bf16", 1024, 1000, each=True)
    yield cross_entropy("backward", "bf16", 1024, 1000, each=True)
    yield small_cross_entropy("mean")
    yield small_cross_entropy("scale")


__all__ = ["configs"]
