"""What the tests of learnt feedback share: a network of three segments, a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from elasticzo import ElasticZO, pair_losses
from elasticzo.feedback import Feedback
from elasticzo.optim.head import HeadOptimizer
from tests.elasticzo.zoo import smooth_loss

B, NOISE = 6, 0.1


def wrapped(net: nn.Module, tail: Any = ("tail",), **settings: Any) -> ElasticZO:
    how = Feedback(**{"noise": NOISE, **settings})
    return ElasticZO(net, tail, directions=how, seed=5).train()


class Plain(nn.Module):
    """Three segments, the last of which ends at the cut."""

    def __init__(self, act: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 7, bias=False), nn.Linear(7, 3)
        self.tail, self.act = nn.Linear(3, 2), act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tail(self.c(self.act(self.b(self.act(self.a(x))))))
        return y


def step(
    model: ElasticZO, inputs: Any, zo: HeadOptimizer, loss: Any = smooth_loss, *targets: Any
) -> Tensor:
    losses = pair_losses(loss, model(*inputs), *targets)
    model.backward(losses)
    zo.step(losses)
    return losses


def identity(x: Tensor) -> Tensor:
    return x
