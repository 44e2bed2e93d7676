"""What the constructor and `load_state_dict` of `ElasticZOInt8` refuse."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from elasticzo.int8.tensor import LIMIT, MAX_EXPONENT, MIN_EXPONENT
from zo_kernels import BACKENDS
from zo_kernels._int8 import MAX_FRACTION_BITS
from zo_kernels._lib import MAX_QUERIES

LOSSES = ("integer", "float")
PAIRINGS = ("stacked", "sequential")


def check_order(names: list[str], head: list[str], tail: list[str]) -> None:
    if head and tail and names.index(head[-1]) > names.index(tail[0]):
        raise ValueError(
            f"the tail must come after the whole head: {tail[0]!r} (tail) runs before "
            f"{head[-1]!r} (head)"
        )


def resolve_scale(head: list[str], scale: Mapping[str, float] | None) -> dict[str, float]:
    found = dict.fromkeys(head, 1.0)
    for pattern, s in (scale or {}).items():
        matched = fnmatch.filter(head, pattern)
        if not matched:
            names = ", ".join(head) or "none"
            raise ValueError(f"scale must match weights of the head ({names}), got {pattern!r}")
        if not 0.0 <= s < float("inf"):
            raise ValueError(f"scale of {pattern!r} must be in [0, inf), got {s}")
        found |= dict.fromkeys(matched, float(s))
    return found


def check_settings(
    queries: int, seed: int, fraction_bits: int, loss: str, backend: str, pairing: str
) -> None:
    if not (isinstance(queries, int) and 1 <= queries < MAX_QUERIES):
        raise ValueError(f"queries must be an integer in [1, 2^24), got {queries!r}")
    if not (isinstance(seed, int) and 0 <= seed < 1 << 63):
        raise ValueError(f"seed must be an integer in [0, 2^63), got {seed!r}")
    if not (isinstance(fraction_bits, int) and 0 <= fraction_bits <= MAX_FRACTION_BITS):
        raise ValueError(
            f"fraction_bits must be an integer in [0, {MAX_FRACTION_BITS}], got {fraction_bits!r}"
        )
    for name, value, known in (
        ("loss", loss, LOSSES),
        ("backend", backend, BACKENDS),
        ("pairing", pairing, PAIRINGS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")


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


__all__ = ["check_order", "check_settings", "check_state", "resolve_scale"]
