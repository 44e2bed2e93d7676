"""The network of a run with first weights that its seed decides, wrapped for floats or integers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from elasticzo import ElasticZO
from elasticzo.cut import Tail, resolve_cut
from elasticzo.int8 import ElasticZOInt8
from elasticzo.models import LeNet5, PointNet, ResNet20, SmallCNN
from experiments.train.config import TrainConfig
from experiments.train.directions import library_directions
from experiments.train.local import LocalNet


def build_model(config: TrainConfig) -> nn.Module:
    """A fresh network for the configuration's data, from torch's generator as it stands: for images
    of ten classes, or for clouds."""
    model: nn.Module
    shape: tuple[int, ...] = (3, 32, 32) if config.data == "cifar10" else (1, 28, 28)
    if config.model == "pointnet":
        classes = 40 if config.data == "modelnet40" else 10
        model = PointNet(classes, batch_norm=bool(config.batch_norm))
        shape = (3, config.points or 128)
    elif config.model == "cnn":
        model = SmallCNN(channels=shape[0], batch_norm=bool(config.batch_norm))
    else:
        model = LeNet5() if config.model == "lenet5" else ResNet20(channels=shape[0])
    if config.init == "orthogonal":
        for module in model.modules():
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                nn.init.orthogonal_(module.weight, gain=math.sqrt(2.0))
    if config.method == "local":
        classes = int(last_layer(model).weight.shape[0])
        model = LocalNet(model, torch.zeros(2, *shape), classes)
    return model


def last_layer(model: nn.Module) -> nn.Linear | nn.Conv2d:
    """The layer that makes the logits."""
    return [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))][-1]


def library_tail(tail: tuple[str, ...]) -> list[str] | int | str:
    """What `ElasticZO` takes: `("2",)` -> 2, `("all",)` -> "all"."""
    if len(tail) == 1 and tail[0].lstrip("-").isdigit():
        return int(tail[0])
    return "all" if tail == ("all",) else list(tail)


def _seeded(config: TrainConfig) -> tuple[nn.Module, Tail, dict[str, Any]]:
    """The bare network, its cut, and what both wrappers are told."""
    torch.manual_seed(config.seed)
    assert config.tail is not None
    net, tail = build_model(config), library_tail(config.tail)
    if config.method.startswith("frozen-"):
        frozen = resolve_cut(net, tail).head_parameters
        for name, p in net.named_parameters():
            p.requires_grad_(name not in frozen)
        tail = "all"  # one pass: there is nothing to perturb
    names = ("queries", "seed", "pairing", "backend", "scale")
    return net.to(config.device), tail, {name: getattr(config, name) for name in names}


def build_network(config: TrainConfig) -> ElasticZO:
    """The wrapped network of a resolved configuration."""
    assert config.eps is not None and config.noise is not None
    net, tail, shared = _seeded(config)
    head = resolve_cut(net, tail).head_parameters
    shared |= {"directions": library_directions(config, head), "group": config.group}
    return ElasticZO(net, tail, eps=config.eps, noise=config.noise, **shared)


def build_int8_network(config: TrainConfig) -> ElasticZOInt8:
    """The int8 network of a resolved configuration, from the same float weights."""
    assert config.r_max and config.p_zero
    assert config.logit_shift is not None and config.fraction_bits is not None
    net, tail, shared = _seeded(config)
    with torch.no_grad():
        last_layer(net).weight.mul_(2.0**-config.logit_shift)
    return ElasticZOInt8(
        net,
        tail,
        r_max=config.r_max[0],
        p_zero=config.p_zero[0],
        fraction_bits=config.fraction_bits,
        loss=config.loss or "integer",
        **shared,
    )
