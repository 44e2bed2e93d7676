"""What the constructor and `load_state_dict` of `ElasticZOInt8` refuse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from elasticzo.cut import Cut
from elasticzo.int8.tensor import LIMIT, MAX_EXPONENT, MIN_EXPONENT
from elasticzo.settings import check_integer, check_long, check_number, check_queries
from zo_kernels import BACKENDS
from zo_kernels.int8 import MAX_FRACTION_BITS

LOSSES = ("integer", "float")
PAIRINGS = ("stacked", "sequential")


def check_order(names: list[str], head: list[str], tail: list[str]) -> None:
    if head and tail and names.index(head[-1]) > names.index(tail[0]):
        raise ValueError(
            f"the tail must come after the whole head: {tail[0]!r} (tail) runs before "
            f"{head[-1]!r} (head)"
        )


def check_settings(
    queries: Any, seed: Any, fraction_bits: Any, loss: Any, backend: Any, pairing: Any
) -> None:
    check_queries(queries)
    check_long("seed", seed)
    check_integer("fraction_bits", fraction_bits, 0, MAX_FRACTION_BITS)
    for name, value, known in (
        ("loss", loss, LOSSES),
        ("backend", backend, BACKENDS),
        ("pairing", pairing, PAIRINGS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")


def check_perturbation(r_max: Any, p_zero: Any) -> None:
    check_integer("r_max", r_max, 1, LIMIT)
    check_number("p_zero", p_zero, "a number in [0, 1)", lambda v: 0.0 <= v < 1.0)


def check_tail(cut: Cut, layers: Iterable[str]) -> None:
    """A tail that is named must have a weight: names of BatchNorm alone have none left here."""
    if cut.tail_modules and not any(name in cut.tail_modules for name in layers):
        raise ValueError(
            f"tail={cut.tail!r} names no layer of the integer network, whose BatchNorm is folded "
            f"into the layer before it; layers: {', '.join(layers)}; for Full ZO (no tail) use "
            "tail=0"
        )


def check_trained(cut: Cut, trained: list[str]) -> None:
    """A tail must have a weight that learns."""
    if cut.tail_modules and not trained:
        raise ValueError(
            f"tail={cut.tail!r} has no weight that may be trained: all of them are frozen "
            "(requires_grad=False); for Full ZO (no tail) use tail=0"
        )


def check_signs(signs: Any, queries: int) -> None:
    fits = isinstance(signs, Tensor) and signs.dtype == torch.int32
    if not fits or list(signs.shape) != [queries] or bool((signs.abs() > 1).any()):
        came = f"{signs.dtype} {signs.tolist()}" if isinstance(signs, Tensor) else repr(signs)
        raise ValueError(f"signs must be {queries} int32 values of -1, 0 or 1, got {came}")


def check_state(state_dict: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Copying floats into int8 weights would make zeros of them without a word."""
    for name in own:
        value = state_dict.get(name)
        if not isinstance(value, Tensor):
            continue  # torch says so
        if value.dtype != own[name].dtype:
            raise TypeError(
                f"{name!r} must be {own[name].dtype}, got {value.dtype}: float weights are "
                "converted by wrapping the float model"
            )
        if value.dtype == torch.int8 and value.numel() and int(value.amin()) < -LIMIT:
            raise ValueError(f"{name!r} must be in [-127, 127], got -128")
        if value.dtype == torch.int32 and not (
            value.ndim == 0 and MIN_EXPONENT <= int(value) <= MAX_EXPONENT
        ):
            raise ValueError(
                f"{name!r} must be one exponent in [{MIN_EXPONENT}, {MAX_EXPONENT}], got "
                f"{value.tolist()}"
            )
