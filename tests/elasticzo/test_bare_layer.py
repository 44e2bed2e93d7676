"""A model that is one layer: there is no cut inside it, but Full ZO and Full BP."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from elasticzo import ZOSGD, ElasticZO, pair_losses
from elasticzo.int8 import ElasticZOInt8
from zo_kernels import sample

X, Y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 2


def one_step(tail: Any, pairing: str) -> tuple[nn.Linear, nn.Linear, ElasticZO, list[float]]:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    before = copy.deepcopy(layer)
    model = ElasticZO(layer, tail=tail, eps=0.1, pairing=pairing).train()
    zo, sgd = ZOSGD(model, lr=0.1), model.tail_optimizer(torch.optim.SGD, lr=0.1)
    losses = pair_losses(F.cross_entropy, model(X), Y)
    model.backward(losses)
    sgd.step()
    zo.step(losses)
    return before, layer, model, losses.tolist()


@pytest.mark.parametrize("pairing", ["stacked", "sequential"])
@pytest.mark.parametrize("tail", [1, "all"])
def test_full_bp(tail: int | str, pairing: str) -> None:
    before, layer, model, losses = one_step(tail, pairing)
    F.cross_entropy(before(X), Y).backward()
    for p, start in zip(layer.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, start - 0.1 * start.grad)
    assert len(losses) == model.halves and len(set(losses)) == 1
    assert model.cut.tail_parameters == ("weight", "bias") and model.cut.head_parameters == ()
    assert model.cut.named == ("all" if tail == "all" else "the model itself")


@pytest.mark.parametrize("pairing", ["stacked", "sequential"])
def test_full_zo(pairing: str) -> None:
    before, layer, model, losses = one_step(0, pairing)
    g = (losses[0] - losses[1]) / 0.2
    for i, (p, start) in enumerate(zip(layer.parameters(), before.parameters(), strict=True)):
        z = sample(p.shape, torch.tensor([0, 0]), tensor=i)
        torch.testing.assert_close(p, start - 0.1 * g * z)
    assert list(model.state_dict()) == ["weight", "bias"] and model.cut.named == "none"


def test_names_inside_it_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'weight'; layers .*: none inside it \(tail=0 or 1"):
        ElasticZO(nn.Linear(3, 2), tail=["weight"])
    with pytest.raises(ValueError, match=r"must be in 0..1 for this model, got 2"):
        ElasticZO(nn.Linear(3, 2), tail=2)


@pytest.mark.parametrize("tail", [0, 1, "all"])
def test_in_integers(tail: int | str) -> None:
    model = ElasticZOInt8(nn.Linear(3, 2, bias=False), tail=tail)
    names = (
        [n for n, _ in model.named_head_parameters()],
        [n for n, _ in model.named_tail_parameters()],
    )
    assert names == (([], ["weight"]) if tail else (["weight"], []))


def test_a_layer_with_layers_inside() -> None:
    """As adapters are added to a layer: the layer comes first, so a tail of it is all."""

    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.a = nn.Linear(3, 2)

    model = ElasticZO(Adapted(), tail=2)
    assert model.cut.head_parameters == () and model.cut.tail_modules == {"", "a"}
    assert ElasticZO(Adapted(), tail=1).cut.tail_parameters == ("a.weight", "a.bias")
