"""The optimisers of head and tail of a run in floats."""

from __future__ import annotations

import math
from typing import Any

import torch

from elasticzo import ZOSGD, ElasticZO
from elasticzo.optim import HeadOptimizer, ZOAdam
from experiments.train.config import TrainConfig

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def head_optimizer(config: TrainConfig, model: ElasticZO) -> HeadOptimizer:
    """Of a resolved configuration."""
    assert config.head_lr is not None
    given: dict[str, Any] = {
        "lr": config.head_lr,
        "clip": config.clip if config.clip != math.inf else None,
        "weight_decay": config.head_weight_decay,
    }
    if config.head_optimizer == "sgd":
        return ZOSGD(model, momentum=config.head_momentum, **given)
    return ZOAdam(model, decoupled_weight_decay=config.head_optimizer == "adamw", **given)


def tail_optimizer(config: TrainConfig, model: ElasticZO) -> torch.optim.Optimizer | None:
    """Of a resolved configuration; None where there is no tail."""
    if not any(True for _ in model.tail_parameters()):
        return None
    settings: dict[str, Any] = {"lr": config.tail_lr, "weight_decay": config.tail_weight_decay}
    assert config.tail_optimizer is not None
    if config.tail_optimizer == "sgd":
        settings["momentum"] = config.tail_momentum
    return model.tail_optimizer(OPTIMIZERS[config.tail_optimizer], **settings)
