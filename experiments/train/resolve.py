"""From what a user gave to what runs: checked values, no default left open."""

from __future__ import annotations

import fnmatch
import math
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from elasticzo.cut import resolve_cut
from elasticzo.data import CLOUD_SETS
from experiments.train.config import NOT_IDENTITY, PAPER, Data, Model, TrainConfig
from experiments.train.directions import check_directions, check_head_rule
from experiments.train.fields import check, fields_of
from experiments.train.network import build_model, library_tail
from experiments.train.recipes import (
    BF16_EPS,
    EPOCHS,
    INT8_RECIPES,
    POINTS,
    recipe_of,
    tail_of,
)
from zo_kernels import resolve_backend


def resolve(config: TrainConfig) -> TrainConfig:
    """The configuration with every default decided; the same for a resolved one.

    Raises: ValueError that says which field expected what, and what came.
    """
    check(config)
    tail, device = resolve_tail(config), pick_device(config.device)
    defaults = _integers(config) if config.precision == "int8" else _floats(config)
    scale = defaults.pop("scale")
    defaults |= _places(config, device)
    config = replace(config, **{k: v for k, v in defaults.items() if getattr(config, k) is None})
    backend: Any = resolve_backend(config.backend, device)
    head = head_names(config, tail)
    check_directions(config, head)
    scale = _scale(config, head, scale)
    return replace(config, tail=tail, scale=scale, device=str(device), backend=backend)


def _floats(config: TrainConfig) -> dict[str, Any]:
    """The defaults of a method, fp32 or bf16."""
    if config.method == "local" and config.model == "resnet20":
        raise ValueError("method 'local' needs layers one after the other, got model 'resnet20'")
    if config.method == "local" and config.start_from is not None:
        raise ValueError("method 'local' has classifiers that no trained run has: no start_from")
    recipe = asdict(recipe_of(config.model, config.method, config.directions))
    check_head_rule(config, recipe["head_optimizer"])
    optimizer = config.tail_optimizer or recipe["tail_optimizer"]
    if optimizer != "sgd" and config.tail_momentum:
        raise ValueError(
            f"tail_momentum belongs to tail_optimizer 'sgd', got {config.tail_momentum} with "
            f"{optimizer!r}"
        )
    return {
        **recipe,
        "eps": max(recipe["eps"], BF16_EPS) if config.precision == "bf16" else recipe["eps"],
        "tail_lr": recipe["tail_lr"][optimizer],
        "tail_momentum": 0.9 if optimizer == "sgd" else 0.0,
        **{name: field.nothing for name, field in fields_of("int8").items()},
    }


def _integers(config: TrainConfig) -> dict[str, Any]:
    """The defaults of a method, int8."""
    if config.method not in INT8_RECIPES[config.model]:
        raise ValueError(f"method {config.method!r} is of fp32 and bf16, got precision 'int8'")
    recipe = asdict(INT8_RECIPES[config.model][config.method])
    if config.start_from is not None:
        recipe["logit_shift"] = 0  # trained logits have their size
    return {**recipe, "batch_norm": False if config.model == "pointnet" else None}


def _places(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """Defaults that no recipe decides."""
    name = f"{config.data}-{config.model}-{config.method}-{config.seed}"
    if config.directions not in (None, PAPER["directions"]):
        name += f"-{config.directions}"
    clouds = config.data in CLOUD_SETS
    return {
        "epochs": EPOCHS[config.data],
        "points": POINTS if clouds else None,
        "augment": True if clouds else None,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "out": Path("runs") / (f"{name}-int8" if config.precision == "int8" else name),
    }


def resolve_tail(config: TrainConfig) -> tuple[str, ...]:
    """The cut as text: module names, one number, or "all"."""
    if config.tail is not None:
        if not config.tail:
            raise ValueError("tail must name a module, a number of last layers or all, got nothing")
        return config.tail
    tail = tail_of(config.model, config.method)
    return (str(tail),) if isinstance(tail, (int, str)) else tuple(tail)


def head_names(config: TrainConfig, tail: tuple[str, ...]) -> tuple[str, ...]:
    """Parameters that ZO trains."""
    if config.method.startswith("frozen-"):
        return ()
    head = _head(config.model, config.data, config.batch_norm, tail)
    if config.precision == "int8":
        return tuple(name for name in head if name.endswith(".weight"))
    return head


def _scale(
    config: TrainConfig, head: tuple[str, ...], default: dict[str, float]
) -> dict[str, float]:
    """Scales of the head. The recipe's patterns that this cut leaves nothing to are dropped; the
    user's must match."""
    given = config.scale if config.scale is not None else default
    matched = {k: float(v) for k, v in given.items() if fnmatch.filter(head, k)}
    if config.scale is not None:
        for pattern, value in given.items():
            if pattern not in matched:
                names = ", ".join(head) or "none"
                raise ValueError(
                    f"scale must match parameters of the head ({names}), got {pattern!r}"
                )
            if not 0.0 <= value < math.inf:
                raise ValueError(f"scale of {pattern!r} must be in [0, inf), got {value}")
    return matched


@lru_cache
def _head(
    model: Model, data: Data, batch_norm: bool | None, tail: tuple[str, ...]
) -> tuple[str, ...]:
    """Parameters before the cut: a study asks a thousand times."""
    with torch.device("meta"):
        network = build_model(TrainConfig(model=model, data=data, batch_norm=batch_norm))
    return resolve_cut(network, library_tail(tail)).head_parameters


def pick_device(name: str) -> torch.device:
    """The device of an option: auto, cpu, cuda or cuda:<n>.

    Raises: ValueError for another one, or one that is not there.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<n>, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def as_json(config: TrainConfig) -> dict[str, Any]:
    """Plain values: paths as text, infinity as "inf"."""
    plain: dict[str, Any] = {}
    for key, value in asdict(config).items():
        if isinstance(value, Path):
            value = str(value)
        elif isinstance(value, float) and math.isinf(value):
            value = "inf"
        plain[key] = list(value) if isinstance(value, tuple) else value
    return plain


def identity(config: TrainConfig) -> dict[str, Any]:
    """What decides the weights of a run: its resolved configuration without places and reports.

    A field that is None in a resolved configuration means nothing to that run, and one of `PAPER`
    that says what the paper does nothing new: fields that are added later leave the identity of
    earlier runs as it was.
    """
    decides = {k: v for k, v in as_json(config).items() if k not in NOT_IDENTITY}
    return {k: v for k, v in decides.items() if v not in (None, PAPER.get(k))}
