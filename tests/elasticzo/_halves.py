"""Halves by hand: copies of a model whose weights were moved, to compare a wrapper with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from elasticzo import ElasticZO
from zo_kernels import sample

PAIRINGS = ("stacked", "sequential")
B, D = 4, 6


def explicit(model: ElasticZO, start: nn.Module, *inputs: Any, prefix: str = "") -> Tensor:
    """The halves on copies whose weights were moved by hand."""
    outputs = []
    for sign in (1, -1):
        moved = copy.deepcopy(start).train()
        with torch.no_grad():
            for head, _ in model.head:
                p = moved.get_parameter(head.name.removeprefix(prefix))
                z = sample(p.shape, torch.tensor([model.seed, 0]), tensor=head.index)
                p += sign * model.eps * head.scale * z.to(p)
        outputs.append(moved(*inputs))
    return torch.stack(outputs).detach()


def check(net: nn.Module, *inputs: Any, tail: Any = 0, **settings: Any) -> ElasticZO:
    """Twice: watched, and not."""
    torch.manual_seed(0)
    net = net.double()
    start = copy.deepcopy(net)
    model = ElasticZO(net, tail=tail, eps=0.05, seed=3, **settings).train()
    for _ in range(2):
        torch.testing.assert_close(model(*inputs).detach(), explicit(model, start, *inputs))
    return model


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x)
