"""What a configuration of precision int8 may hold, and its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from experiments.train.config import TrainConfig
from experiments.train.recipes import INT8_RECIPES

# Schedules: (field, lowest, highest, whether the highest is allowed).
SCHEDULES = (
    ("r_max", 1, 127, True),
    ("p_zero", 0, 1, False),
    ("b_zo", 0, 31, True),
    ("b_bp", -8, 7, True),
)
NUMBERS = (("logit_shift", 0, 16), ("fraction_bits", 0, 16))
# What these fields are in a resolved configuration of another precision.
NO_INT8: Mapping[str, Any] = {
    **{name: () for name, *_ in SCHEDULES},
    "logit_shift": 0,
    "loss": "float",
    "fraction_bits": 0,
}
# Fields of the others that mean nothing to integers; None or 0 in a configuration of int8.
FLOAT_ONLY = (
    "noise",
    "eps",
    "head_lr",
    "clip",
    "head_weight_decay",
    "head_schedule",
    "head_warmup",
    "tail_optimizer",
    "tail_lr",
    "tail_momentum",
    "tail_weight_decay",
    "tail_schedule",
    "tail_warmup",
)


def check_int8(config: TrainConfig) -> None:
    """Raise ValueError for a field of another precision, or a value out of its range."""
    if config.model not in INT8_RECIPES:
        known = ", ".join(INT8_RECIPES)
        raise ValueError(f"precision int8 takes model {known}, got {config.model!r}")
    if config.batch_norm:
        raise ValueError("batch_norm belongs to precision fp32 or bf16, got True with int8")
    for name in FLOAT_ONLY:
        if getattr(config, name):
            raise ValueError(
                f"{name} belongs to precision fp32 or bf16, got {getattr(config, name)} with int8"
            )
    if config.tail_source == "clean":
        raise ValueError("tail_source must be plus, minus or mean with int8, got 'clean'")
    for name, low, high, with_high in SCHEDULES:
        values = getattr(config, name)
        if values is None:
            continue
        if not values:
            raise ValueError(f"{name} must have at least one value, got none")
        for value in values:
            if not (low <= value <= high and (with_high or value < high)):
                bracket = "]" if with_high else ")"
                raise ValueError(f"{name} must be in [{low}, {high}{bracket}, got {value}")
    for name, low, high in NUMBERS:
        value = getattr(config, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} must be in [{low}, {high}], got {value}")


def refuse_int8_fields(config: TrainConfig) -> None:
    for name, nothing in NO_INT8.items():
        value = getattr(config, name)
        if value is not None and value != nothing:
            raise ValueError(
                f"{name} belongs to precision int8, got {value} with {config.precision}"
            )


def int8_recipe(config: TrainConfig) -> dict[str, Any]:
    """The defaults of a method."""
    return asdict(INT8_RECIPES[config.model][config.method])


__all__ = ["NO_INT8", "check_int8", "int8_recipe", "refuse_int8_fields"]
