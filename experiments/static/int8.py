"""The shipped configurations of the integer kernels that multiply no matrices."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from experiments.static.config import Config
from zo_kernels.int8 import ROUNDINGS
from zo_kernels.layout import PER_CALL

PER = PER_CALL["sparse_int8"]
WALK = "inner s_row s_outer s_inner"
HALVES, ELEMENTS, BATCH = 2, 1 << 24, 256  # for which time is predicted; elements of a half


def _module(name: str) -> Any:
    return import_module(f"zo_kernels.triton.{name}")


def _integers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "i32")


def _suffix(flat: bool, int64: bool) -> str:
    return f"{'flat' if flat else 'general'}{'-int64' if int64 else ''}"


def _elements(block: int, halves: int, bytes_each: int) -> dict[str, int]:
    """The problem of a kernel whose programs walk a block of a half each."""
    return {
        "halves": halves,
        "elements": ELEMENTS,
        "bytes": halves * ELEMENTS * bytes_each,
        "programs": halves * ELEMENTS // block,
    }


def int8_range(int64: bool = False) -> Config:
    module = _module("int8_range")
    pointers = {"acc_ptr": "*i32", "bits_ptr": "*i32"}
    return Config(
        f"int8_range{'-int64' if int64 else ''}",
        module._range_kernel,
        pointers | _integers("blocks elements"),
        {"INT64": int64, "BLOCK": module.RANGE_BLOCK},
        (*pointers, "elements"),
        module.RANGE_WARPS,
        problem=_elements(module.RANGE_BLOCK, HALVES, 4),
    )


def int8_requantize(rounding: str, flat: bool, int64: bool = False) -> Config:
    module = _module("int8_range")
    reads = dict.fromkeys(("acc_ptr", "bits_ptr", "exponent_ptr", "weight_ptr"), "*i32")
    pointers = reads | {"out_ptr": "*i8", "total_ptr": "*i32", "key_ptr": "*i64"}
    integers = "blocks tensor query s_bits s_exponent s_weight elements cols padded_cols "
    integers += f"{WALK} t_row t_outer t_inner s_half t_half"
    return Config(
        f"int8_requantize-{rounding}-{_suffix(flat, int64)}",
        module._requantize_kernel,
        pointers | _integers(integers),
        {
            "ROUNDING": ROUNDINGS[rounding],
            "RELU": True,
            "WEIGHT": True,
            "FLAT": flat,
            "INT64": int64,
            "BLOCK": module.BLOCK,
        },
        (*pointers, "elements", "s_half", "t_half") if flat else tuple(pointers),
        module.WARPS,
        problem=_elements(module.BLOCK, HALVES, 4 + 1),
    )


def int8_perturbed_weights(flat: bool, int64: bool = False) -> Config:
    """Both halves of one query."""
    module = _module("int8_weights")
    pointers = {"w_ptr": "*i8", "out_ptr": "*i8", "key_ptr": "*i64"}
    integers = "tensor first_query start stop p0 magic shift r_max elements cols padded_cols "
    integers += f"{WALK} t_row t_outer t_inner half_stride"
    return Config(
        f"int8_perturbed_weights-{_suffix(flat, int64)}",
        module._int8_perturbed_weights_kernel,
        pointers | _integers(integers),
        {"QUERIES": 1, "PER": PER, "FLAT": flat, "INT64": int64, "BLOCK": module.BLOCK},
        (*pointers, "elements", "half_stride") if flat else tuple(pointers),
        module.WARPS,
        problem=_elements(module.BLOCK, 1, 1 + HALVES) | {"noise": module.BLOCK},
    )


def int8_update(rounding: str, int64: bool = False) -> Config:
    """Time is predicted for one query, along the path of flat weights."""
    module, table = _module("int8_weights"), _module("table")
    pointers = {"table_ptr": "*i64", "block_ptr": "*i32", "key_ptr": "*i64", "g_ptr": "*i32"}
    return Config(
        f"int8_update-{rounding}{'-int64' if int64 else ''}",
        module._int8_update_kernel,
        pointers | _integers("queries p0 magic shift r_max s"),
        {"ROUNDING": ROUNDINGS[rounding], "PER": PER, "INT64": int64, "BLOCK": table.BLOCK},
        tuple(pointers),
        2 * module.UPDATE_WARPS if int64 else module.UPDATE_WARPS,
        problem=_elements(table.BLOCK, 1, 2) | {"turns": 1, "noise": table.BLOCK},
    )


def _logits(classes: int, tile: tuple[int, int], read: int, written: int) -> dict[str, int]:
    """The problem of a loss; `read`, `written`: bytes of a logit, and what else there is."""
    return {
        "halves": HALVES,
        "batch": BATCH,
        "classes": classes,
        "bytes": HALVES * BATCH * classes * read + 8 * BATCH + written,
        "programs": HALVES * -(-BATCH // tile[0]),
        "turns": -(-classes // tile[1]),
    }


def integer_cross_entropy(classes: int, fraction_bits: int = 12, int64: bool = False) -> Config:
    module = _module("int8_loss")
    tile = module.tile(classes, BATCH)
    pointers = {"logits_ptr": "*i8", "exponent_ptr": "*i32"}
    pointers |= {"target_ptr": "*i64", "losses_ptr": "*i64"}
    return Config(
        f"integer_cross_entropy-{classes}-F{fraction_bits}{'-int64' if int64 else ''}",
        module._cross_entropy_kernel,
        pointers | _integers("blocks batch classes"),
        {"F": fraction_bits, "INT64": int64, "BM": tile[0], "BN": tile[1]},
        (*pointers, "batch"),
        module.WARPS,
        problem=_logits(classes, tile, 1, 8 * HALVES),
    )


def integer_softmax_error(classes: int, rounding: str, fraction_bits: int = 12) -> Config:
    module = _module("int8_loss")
    tile = module.tile(classes, BATCH)
    pointers = {"logits_ptr": "*i8", "exponent_ptr": "*i32", "target_ptr": "*i64"}
    pointers |= {"key_ptr": "*i64", "out_ptr": "*i8", "total_ptr": "*i32"}
    constants = {"ROUNDING": ROUNDINGS[rounding], "F": fraction_bits, "INT64": False}
    return Config(
        f"integer_softmax_error-{classes}-F{fraction_bits}-{rounding}",
        module._softmax_error_kernel,
        pointers | _integers("blocks batch classes tensor query"),
        constants | {"BM": tile[0], "BN": tile[1]},
        (*pointers, "batch"),
        module.WARPS,
        problem=_logits(classes, tile, 2, 4 * HALVES),
    )


def integer_projected_sign() -> Config:
    module = _module("int8_loss")
    pointers = {"losses_ptr": "*i64", "out_ptr": "*i32"}
    return Config(
        "integer_projected_sign",
        module._sign_kernel,
        pointers | _integers("queries"),
        {"BLOCK": module.SIGN_BLOCK},
        tuple(pointers),
        1,
        problem={"queries": 1, "bytes": 2 * 8 + 4, "programs": 1},
    )


def configs(target: str) -> Iterator[Config]:
    """Every kernel on each target; on sm_90 their variants, too."""
    yield int8_range()
    yield int8_requantize("nearest", flat=True)
    yield int8_requantize("stochastic", flat=False)
    yield int8_perturbed_weights(flat=True)
    yield int8_update("nearest")
    yield int8_update("stochastic")
    yield integer_cross_entropy(10)
    yield integer_softmax_error(10, "stochastic")
    yield integer_projected_sign()
    if target == "cuda-90":
        yield int8_range(int64=True)
        yield int8_requantize("pseudo", flat=True)
        yield int8_requantize("nearest", flat=False)
        yield int8_requantize("stochastic", flat=True, int64=True)
        yield int8_perturbed_weights(flat=False)
        yield int8_perturbed_weights(flat=False, int64=True)
        yield int8_update("pseudo")
        yield int8_update("stochastic", int64=True)
        yield integer_cross_entropy(10, fraction_bits=0)
        yield integer_cross_entropy(1000, fraction_bits=16, int64=True)
        yield integer_softmax_error(1000, "nearest")


__all__ = [
    "configs",
    "int8_perturbed_weights",
    "int8_range",
    "int8_requantize",
    "int8_update",
    "integer_cross_entropy",
    "integer_projected_sign",
    "integer_softmax_error",
]
