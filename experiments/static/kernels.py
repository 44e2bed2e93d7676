"""Configurations of perturbation, update, staging, sampling and the paired product.

`perturb_` has no kernel of its own: it launches that of `perturbed_weights` over its weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from itertools import product
from typing import Any

from experiments.static.config import TYPES, Config
from zo_kernels.layout import PER_CALL
from zo_kernels.registry import NOISES
from zo_kernels.rules import RULES
from zo_kernels.triton.philox import KIND
from zo_kernels.triton.table import BLOCK

SIDE = 4096  # of the square weight for which time is predicted
BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2, "i8": 1, "i64": 8}


def _module(name: str) -> Any:
    return import_module(f"zo_kernels.{name}")


def _wide(dtype: str) -> Any:
    return TYPES["fp64" if dtype == "fp64" else "fp32"]


def perturbed_weights(
    noise: str,
    dtype: str,
    flat: bool,
    out: str | None = None,
    int64: bool = False,
    queries: int = 1,
) -> Config:
    module = _module("triton.weights")
    out = out or dtype
    pointers = {
        "w_ptr": f"*{dtype}",
        "out_ptr": f"*{out}",
        "key_ptr": "*i64",
        "eps_ptr": "*fp64",
    }
    integers = "tensor first_query start stop elements cols padded_cols inner s_row s_outer"
    integers += " s_inner t_row t_outer t_inner half_stride"
    aligned = (*pointers, "elements", "half_stride")
    parts = [noise, dtype, *([out] if out != dtype else []), "flat" if flat else "general"]
    parts += ["int64"] * int64 + ([f"q{queries}"] if queries > 1 else [])
    elements = SIDE * SIDE
    return Config(
        "-".join(["perturbed_weights", *parts]),
        module._perturbed_weights_kernel,
        pointers | dict.fromkeys(integers.split(), "i32") | {"scale": "fp64"},
        {
            "QUERIES": queries,
            "NOISE": KIND[noise],
            "PER": PER_CALL[noise],
            "FLAT": flat,
            "INT64": int64,
            "WIDE": _wide(dtype),
            "BLOCK": module.BLOCK,
        },
        aligned if flat else tuple(pointers),
        module.WARPS,
        problem={
            "elements": elements,
            "bytes": elements * (BYTES[dtype] + 2 * queries * BYTES[out]),
            "programs": elements // module.BLOCK,
            "noise": queries * module.BLOCK,
        },
    )


def _rule(rule: str) -> tuple[dict[str, str], dict[str, Any]]:
    """What a kernel takes along for a rule: pointers, constants."""
    kept = len(RULES[rule].state)
    pointers = {"kept_ptr": "*i64", "settings_ptr": "*fp64"}
    if kept:
        return pointers, {"RULE": rule, "KEPT": 1 + kept}
    return {}, {"RULE": rule, "KEPT": 0, **dict.fromkeys(pointers)}


def update(noise: str, dtype: str, int64: bool = False, rule: str = "sgd") -> Config:
    """Time is predicted for one query, along the path of flat weights."""
    module = _module("triton.update")
    pointers = {
        "table_ptr": "*i64",
        "scale_ptr": "*fp64",
        "block_ptr": "*i32",
        "key_ptr": "*i64",
        "coeff_ptr": "*fp64",
        "lr_ptr": "*fp64",
        "decay_ptr": "*fp64",
        "skip_ptr": "*fp32",
        **_rule(rule)[0],
    }
    elements = SIDE * SIDE
    parts = [noise, dtype, *["int64"] * int64, *([rule] if rule != "sgd" else [])]
    return Config(
        "-".join(["update", *parts]),
        module._update_kernel,
        pointers | {"queries": "i32"},
        {
            "DTYPE": TYPES[dtype],
            "WIDE": _wide(dtype),
            "NOISE": KIND[noise],
            "PER": PER_CALL[noise],
            "INT64": int64,
            "BLOCK": BLOCK,
            **_rule(rule)[1],
        },
        tuple(pointers),
        module.WARPS,
        problem={
            "elements": elements,
            "bytes": 2 * (1 + len(RULES[rule].state)) * elements * BYTES[dtype],
            "programs": elements // BLOCK,
            "turns": 1,
            "noise": BLOCK,
        },
    )


def stage(
    noise: str,
    dtype: str,
    flat: bool,
    pending: bool,
    out: str | None = None,
    one: bool | None = None,
    int64: bool = False,
    rule: str = "sgd",
) -> Config:
    """Flat weights alone and general ones among many, or as `one` says; one query, one update."""
    module = _module("triton.stage")
    out, one = out or dtype, flat if one is None else one
    pointers = {
        "table_ptr": "*i64",
        "scale_ptr": "*fp64",
        "block_ptr": "*i32",
        "out_ptr": f"*{out}",
        "key_ptr": "*i64",
        "eps_ptr": "*fp64",
        "before_ptr": "*i64",
        **dict.fromkeys(("coeff_ptr", "lr_ptr", "decay_ptr"), "*fp64"),
        "skip_ptr": "*fp32" if pending else "*fp64",  # eps stands for what is not read
        **_rule(rule)[0],
    }
    integers = ("queries", "first_query", "start", "stop")
    form = ("flat" if flat else "general") + ("" if one == flat else "-one" if one else "-many")
    parts = [noise, dtype, *([out] if out != dtype else []), form, *["pending"] * pending]
    moved = 1 + pending + 2 * len(RULES[rule].state)
    elements = SIDE * SIDE
    return Config(
        "-".join(["stage", *parts, *["int64"] * int64, *([rule] if rule != "sgd" else [])]),
        module._stage_kernel,
        pointers | dict.fromkeys(integers, "i32"),
        {
            "PENDING": pending,
            "ONE": one,
            "FLAT": flat,
            "QUERIES": 1,
            "DTYPE": TYPES[dtype],
            "WIDE": _wide(dtype),
            "NOISE": KIND[noise],
            "PER": PER_CALL[noise],
            "INT64": int64,
            "BLOCK": BLOCK,
            **_rule(rule)[1],
        },
        tuple(pointers),
        module.WARPS,
        problem={
            "elements": elements,
            "bytes": elements * (moved * BYTES[dtype] + 2 * BYTES[out]),
            "programs": elements // BLOCK,
            "turns": 1,
            "noise": BLOCK,
        },
    )


def sample(noise: str, int64: bool = False) -> Config:
    module = _module("triton.noise")
    out = {"sparse_int8": "i8", "bits": "i64"}.get(noise, "fp32")
    integers = ["tensor", "third", "p0", "r_max", "first_group", "elements"]
    elements = SIDE * SIDE
    return Config(
        f"sample-{noise}{'-int64' if int64 else ''}",
        module._sample_kernel,
        {"out_ptr": f"*{out}", "key_ptr": "*i64", **dict.fromkeys(integers, "i32")},
        {"NOISE": KIND[noise], "PER": PER_CALL[noise], "INT64": int64, "BLOCK": module.BLOCK},
        ("out_ptr", "key_ptr", "elements"),
        4,
        problem={
            "elements": elements,
            "bytes": elements * BYTES[out],
            "programs": elements // module.BLOCK,
            "noise": module.BLOCK,
        },
    )


def _linear_problem(tile: Any, rows: int, read: str, out: str, shared: bool, halves: int) -> Any:
    """A square weight; rows of a half."""
    inputs = rows * SIDE * (1 if shared else halves)
    numbers = (SIDE * SIDE + SIDE + inputs) * BYTES[read] + halves * rows * SIDE * BYTES[out]
    return {
        "M": rows,
        "N": SIDE,
        "K": SIDE,
        "bytes": numbers,
        "flops": 2 * halves * rows * SIDE * SIDE,
        "programs": -(-rows // tile.rows) * -(-SIDE // tile.cols),
        "turns": -(-SIDE // tile.depth),
        "noise": tile.cols * tile.depth,
    }


def paired_linear(
    noise: str,
    kind: str,
    rows: int,
    shared: bool = False,
    int64: bool = False,
    pair: bool = True,
    bare: bool = False,
    ragged: bool = False,
    hip: bool = False,
) -> Config:
    """The tile for `rows` of a kind of operands; "mixed" rounds fp32 ones to bf16.

    `pair`: both halves, or one. `bare`: without bias and ReLU. `ragged`: sizes of no alignment.
    Time is predicted for as many rows as the tile has, for the largest one for 4,096.
    """
    module = _module("triton.linear")
    tiles = module.tiles_of(kind, ragged, hip)
    (tile,) = [tile for tile in tiles if tile.rows == rows]
    dtype = "bf16" if kind == "bf16" else "fp32"
    out = "bf16" if kind in ("bf16", "mixed") else "fp32"
    read = dict.fromkeys(("x_ptr", "w_ptr", "b_ptr"), f"*{dtype}")
    pointers = read | {"y_ptr": f"*{out}", "key_ptr": "*i64", "eps_ptr": "*fp64"}
    # A launch makes a constant of 1 alone; 0 (no bias, a shared half) is a multiple of 16.
    sizes = ["M", "N", "K", "s_xm", "s_wn", "x_half", "y_half", *(["s_b"] if bare else [])]
    integers = ["tensor", "bias_tensor", "first_query", *sizes]
    ones = ["s_xk", "s_wk", *([] if bare else ["s_b"])]
    flags = {"shared": shared, "single": not pair, "bare": bare, "ragged": ragged, "int64": int64}
    parts = [noise, kind, str(rows), *(name for name, on in flags.items() if on)]
    most = SIDE if tile == tiles[-1] else rows
    return Config(
        "-".join(["paired_linear", *parts]),
        module._paired_linear_kernel,
        pointers | dict.fromkeys(integers, "i32") | {"scale": "fp64", "bias_scale": "fp64"},
        dict.fromkeys(ones, 1)
        | {
            "NOISE": KIND[noise],
            "PAIR": pair,
            "SHARED": shared,
            "BIAS": not bare,
            "RELU": not bare,
            "DOT": TYPES[out],
            "PRECISION": "ieee" if out == "bf16" else kind,
            "UPCAST": False,
            "INT64": int64,
            "BM": tile.rows,
            "BN": tile.cols,
            "BK": tile.depth,
        },
        tuple(pointers) if ragged else (*pointers, *sizes),
        tile.warps,
        tile.stages,
        _linear_problem(tile, most, dtype, out, shared, 2 if pair else 1),
    )


def _perturbation(target: str) -> Iterator[Config]:
    """Flat and general weights; every pair of dtypes on sm_90."""
    for noise in NOISES:
        for dtype in ("fp32", "bf16"):
            yield perturbed_weights(noise, dtype, flat=True)
            yield perturbed_weights(noise, dtype, flat=False)
        if target == "cuda-90":
            for out in ("bf16", "fp16"):
                yield perturbed_weights(noise, "fp32", flat=True, out=out)
            yield perturbed_weights(noise, "fp64", flat=True)
            yield perturbed_weights(noise, "fp32", flat=False, int64=True)
    if target == "cuda-90":
        yield perturbed_weights("normal", "fp64", flat=False)
        yield perturbed_weights("normal", "fp64", flat=True, out="bf16")
        yield perturbed_weights("normal", "fp32", flat=True, queries=4)


def _staging(target: str) -> Iterator[Config]:
    """Flat and general weights, with an update and without; every pair of dtypes on sm_90."""
    if target != "cuda-90":
        for flat in (True, False):
            yield stage("normal", "fp32", flat, True, out="bf16")
            yield stage("normal", "bf16", flat, True)
        return
    for noise, flat, pending in product(NOISES, (True, False), (True, False)):
        for dtype, out in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")):
            yield stage(noise, dtype, flat, pending, out=out)
    yield stage("normal", "fp32", flat=True, pending=True, one=False)
    yield stage("normal", "fp64", flat=True, pending=True)
    yield stage("normal", "fp32", flat=False, pending=True, out="bf16", int64=True)


def _products(target: str) -> Iterator[Config]:
    """Every tile; on sm_90 with either noise, and the other forms of a launch, too."""
    hip = target.startswith("hip")
    for kind, tiles in _module("triton.linear").TILES.items():
        if kind == "tf32x3" and hip:
            continue  # refused there
        whole = target == "cuda-90" or kind in ("bf16", "mixed", "tf32")
        for tile in tiles:
            for noise in NOISES if whole else ("normal",):
                yield paired_linear(noise, kind, tile.rows, hip=hip)
    if target == "cuda-90":
        yield paired_linear("rademacher", "mixed", 64, shared=True)
        yield paired_linear("normal", "bf16", 64, pair=False)
        yield paired_linear("normal", "bf16", 16, bare=True)
        yield paired_linear("normal", "tf32", 64, int64=True)
        for rows in (16, 64, 128):
            yield paired_linear("normal", "bf16", rows, ragged=True)
        for kind, rows in (("bf16", 128), ("mixed", 64), ("tf32", 16)):
            yield paired_linear("rademacher", kind, rows, ragged=True)
    else:
        yield paired_linear("normal", "bf16", 128, ragged=True, hip=hip)
    if hip:
        yield paired_linear("normal", "mixed", 16, shared=True, hip=True)
        yield paired_linear("normal", "mixed", 16, ragged=True, hip=True)


def _rules(target: str) -> Iterator[Config]:
    """Updates that keep state, or take a sign."""
    for rule in RULES:
        if rule != "sgd":
            yield update("normal", "fp32", rule=rule)
    yield update("normal", "bf16", rule="adam")
    yield stage("normal", "fp32", flat=True, pending=True, rule="adam")
    if target == "cuda-90":
        yield update("normal", "fp64", rule="adam")
        yield stage("normal", "fp32", flat=False, pending=True, out="bf16", rule="momentum")


def configs(target: str) -> Iterator[Config]:
    """Everything that ships on sm_90, the heaviest ones elsewhere."""
    yield from _perturbation(target)
    yield from _staging(target)
    for noise in NOISES:
        for dtype in ("fp32", "bf16", "fp64") if target == "cuda-90" else ("fp32", "bf16"):
            yield update(noise, dtype)
    if target == "cuda-90":
        yield update("normal", "fp32", int64=True)
        yield update("normal", "fp64", int64=True)
        yield sample("normal", int64=True)
    yield from _rules(target)
    yield from map(sample, PER_CALL if target == "cuda-90" else ("normal", "sparse_int8"))
    yield from _products(target)


__all__ = ["configs", "paired_linear", "perturbed_weights", "sample", "stage", "update"]
