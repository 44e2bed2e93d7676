"""One table of the fields of a configuration: which precision each belongs to, and its range."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal

from elasticzo.data import CLOUD_SETS
from experiments.files import check_folder
from experiments.train.config import MAX_THREADS, TrainConfig
from experiments.train.recipes import INT8_RECIPES

Arithmetic = Literal["float", "int8"]


@dataclass(frozen=True)
class Field:
    """What a field may hold.

    Attributes:
        low, high, ends: its range, also of each value of a schedule; the ends as an interval has
            them, "[" with and "(" without.
        of: the arithmetic it means something to; None is both.
        nothing: what it is in a resolved configuration of the other one.
    """

    low: float = -math.inf
    high: float = math.inf
    ends: str = "[]"
    of: Arithmetic | None = None
    nothing: Any = None

    def check(self, name: str, value: Any) -> None:
        """Raises: ValueError unless the value, or all of several, are in the range."""
        for one in value if isinstance(value, tuple) else (value,):
            above = one >= self.low if self.ends[0] == "[" else one > self.low
            below = one <= self.high if self.ends[1] == "]" else one < self.high
            if not (above and below):  # NaN is neither
                raise ValueError(
                    f"{name} must be in {self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}, "
                    f"got {one}"
                )

    def clipped(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Several values moved into the range."""
        return tuple(min(max(v, self.low), self.high) for v in values)


INF = math.inf
FIELDS: Mapping[str, Field] = {
    "queries": Field(1, 2**24 - 1),
    "step_epochs": Field(1, INF, "[)"),
    "step_gamma": Field(0, 1, "(]"),
    "batch_size": Field(1, INF, "[)"),
    "epochs": Field(1, 2**32 - 1),
    "eval_epochs": Field(1, INF, "[)"),
    "seed": Field(0, 2**63 - 1),
    "points": Field(1, INF, "[)"),
    "train_images": Field(1, INF, "[)"),
    "hold_out": Field(0, INF, "[)"),
    "rotate": Field(-360, 360),
    "threads": Field(1, MAX_THREADS),
    "checkpoint_steps": Field(1, INF, "[)"),
    "log_steps": Field(1, INF, "[)"),
    # floats
    "directions": Field(of="float", nothing="weight"),
    "group": Field(1, 2**31, of="float", nothing=1),
    "noise": Field(of="float"),
    "eps": Field(0, INF, "()", of="float"),
    "head_lr": Field(0, INF, "[)", of="float"),
    "head_optimizer": Field(of="float", nothing="sgd"),
    "head_momentum": Field(0, 1, "[)", of="float", nothing=0.0),
    "clip": Field(0, INF, "(]", of="float"),
    "head_weight_decay": Field(0, INF, "[)", of="float"),
    "head_schedule": Field(of="float"),
    "head_warmup": Field(0, 1, "[)", of="float"),
    "tail_optimizer": Field(of="float"),
    "tail_lr": Field(0, INF, "[)", of="float"),
    "tail_momentum": Field(0, 1, "[)", of="float"),
    "tail_weight_decay": Field(0, INF, "[)", of="float"),
    "tail_schedule": Field(of="float"),
    "tail_warmup": Field(0, 1, "[)", of="float"),
    # integers; the first four are schedules
    "r_max": Field(1, 127, of="int8", nothing=()),
    "p_zero": Field(0, 1, "[)", of="int8", nothing=()),
    "b_zo": Field(0, 31, of="int8", nothing=()),
    "b_bp": Field(-8, 7, of="int8", nothing=()),
    "logit_shift": Field(0, 16, of="int8", nothing=0),
    "loss": Field(of="int8", nothing="float"),
    "fraction_bits": Field(0, 16, of="int8", nothing=0),
}


def fields_of(arithmetic: Arithmetic) -> dict[str, Field]:
    """The fields that belong to one of them alone."""
    return {name: field for name, field in FIELDS.items() if field.of == arithmetic}


def check(config: TrainConfig) -> None:
    """Raise ValueError for a value out of its range, or of another precision."""
    for name, choices in _all_choices().items():
        value = getattr(config, name)
        if choices and value is not None and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    for name, field in FIELDS.items():
        _check_field(config, name, field)
    _check_clouds(config)
    _check_images(config)
    if config.precision == "int8":
        _check_int8(config)
    if config.data != "digits" and config.data_dir is None:
        raise ValueError(
            f"data {config.data!r} is read from files: data_dir must name their folder"
        )
    if config.out is not None:
        check_folder("out", config.out)


def _check_field(config: TrainConfig, name: str, field: Field) -> None:
    value = getattr(config, name)
    foreign = field.of is not None and (field.of == "int8") != (config.precision == "int8")
    if foreign and value and value != field.nothing:
        owner = "int8" if field.of == "int8" else "fp32 or bf16"
        raise ValueError(
            f"{name} belongs to precision {owner}, got {value} with {config.precision}"
        )
    if value == () and not foreign:
        raise ValueError(f"{name} must have at least one value, got none")
    if value is not None and not isinstance(value, str):
        field.check(name, value)


def _check_int8(config: TrainConfig) -> None:
    """What integers cannot do."""
    if config.model not in INT8_RECIPES:
        known = ", ".join(INT8_RECIPES)
        raise ValueError(f"precision int8 takes model {known}, got {config.model!r}")
    if config.batch_norm:
        raise ValueError("batch_norm belongs to precision fp32 or bf16, got True with int8")
    if config.tail_source == "clean":
        raise ValueError("tail_source must be plus, minus or mean with int8, got 'clean'")


IMAGES = {"lenet5": "28x28 images", "cnn": "cifar10"}  # of networks that take one size alone


def _check_images(config: TrainConfig) -> None:
    """A network of one size wants images of that size."""
    colour = config.data == "cifar10"
    if IMAGES.get(config.model) == ("28x28 images" if colour else "cifar10"):
        wanted = IMAGES[config.model]
        raise ValueError(f"model {config.model!r} takes {wanted}, got data {config.data!r}")
    if colour and config.download:
        raise ValueError("data 'cifar10' is not fetched: data_dir must hold its batches")
    if config.batch_norm is not None and config.model not in ("pointnet", "cnn"):
        raise ValueError(
            f"batch_norm belongs to pointnet and cnn, got {config.batch_norm} with {config.model!r}"
        )


def _check_clouds(config: TrainConfig) -> None:
    """A network for clouds wants clouds, and what belongs to them nothing else."""
    clouds, pointnet = config.data in CLOUD_SETS, config.model == "pointnet"
    if clouds != pointnet:
        wanted = "clouds (" + ", ".join(CLOUD_SETS) + ")" if pointnet else "images"
        raise ValueError(f"model {config.model!r} takes {wanted}, got data {config.data!r}")
    if clouds and config.download:
        raise ValueError(f"data {config.data!r} is not fetched: data_dir must hold its HDF5 files")
    if clouds and config.rotate is not None:
        raise ValueError(f"rotate belongs to images, got {config.rotate} with {config.data!r}")
    for name in ("points", "augment"):
        if not clouds and getattr(config, name) is not None:
            raise ValueError(
                f"{name} belongs to pointnet and clouds, got {getattr(config, name)} with "
                f"{config.model!r}"
            )


@lru_cache(maxsize=1)
def _all_choices() -> dict[str, tuple[str, ...]]:
    """By field; once, since reading annotations takes longer than all checks."""
    hints = typing.get_type_hints(TrainConfig)
    return {f.name: _choices(hints[f.name]) for f in fields(TrainConfig)}


def _choices(hint: Any) -> tuple[str, ...]:
    """The values of a Literal, alone or in a union."""
    found: tuple[str, ...] = (
        typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    )
    for part in typing.get_args(hint):
        found += _choices(part) if typing.get_origin(part) is typing.Literal else ()
    return found
