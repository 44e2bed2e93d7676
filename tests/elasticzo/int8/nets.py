"""Small networks and batches for the tests of integer training."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from elasticzo.int8 import ElasticZOInt8, Int8Tensor, Int8ZO
from elasticzo.models import LeNet5
from elasticzo.models.points import MaxPoints


def small_net() -> nn.Sequential:
    """Every path of LeNet-5 at a size for the interpreter: 8x8 images, 4 classes."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 8, bias=False),
        nn.ReLU(),
        nn.Linear(8, 4, bias=False),
    )


def point_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(3, 8, 1, bias=False),
        nn.ReLU(),
        nn.Conv1d(8, 12, 1, bias=False),
        nn.ReLU(),
        MaxPoints(),
        nn.Linear(12, 4, bias=False),
    )


def generated(shape: tuple[int, ...], low: int, high: int, seed: int) -> Tensor:
    """Integers in [low, high) that no version of torch changes: a linear congruence."""
    n, state, values = 1, seed * 2 + 1, []
    for size in shape:
        n *= size
    for _ in range(n):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        values.append(low + (state >> 33) % (high - low))
    return torch.tensor(values).reshape(shape)


def fixed_weights(model: nn.Module) -> nn.Module:
    """Weights from `generated`, so that digests do not depend on torch's generator."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            if p.ndim > 1:
                p.copy_(generated(tuple(p.shape), -100, 101, 7 + i) / 400.0)
            else:
                p.zero_()
    return model


def batch(shape: tuple[int, ...], classes: int, seed: int = 0) -> tuple[Int8Tensor, Tensor]:
    q = generated(shape, -127, 128, 100 + seed).to(torch.int8)
    y = generated(shape[:1], 0, classes, 200 + seed)
    return Int8Tensor(q, torch.tensor(-6, dtype=torch.int32)), y


def train(
    model: ElasticZOInt8,
    batches: list[tuple[Int8Tensor, Tensor]],
    source: str = "plus",
    b_zo: int = 2,
    b_bp: int = 3,
) -> Int8ZO:
    zo = Int8ZO(model, b_zo=b_zo)
    bp = model.tail_optimizer(b_bp=b_bp)
    for x, y in batches:
        one_step(model, zo, bp, x, y, source)
    return zo


def one_step(model: Any, zo: Any, bp: Any, x: Int8Tensor, y: Tensor, source: str = "plus") -> None:
    logits = model(x)
    losses = model.losses(logits, y)
    model.backward(logits, y, source)
    bp.step()
    zo.step(losses)


def digest(model: ElasticZOInt8) -> str:
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode())
        found.update(value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def lenet(**settings: Any) -> ElasticZOInt8:
    settings = {"tail": 1, "r_max": 7, "p_zero": 0.5, "seed": 3} | settings
    return ElasticZOInt8(fixed_weights(LeNet5()), **settings)
