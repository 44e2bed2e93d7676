"""`ElasticZOInt8` as a part of another module: its states are those of any `nn.Module`."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elasticzo.int8 import ElasticZOInt8, Int8Tensor, Int8ZO
from tests.elasticzo.int8.nets import batch, digest, small_net, train

X, Y = batch((3, 1, 8, 8), 4)


class Outer(nn.Module):
    """A float part beside an integer one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ElasticZOInt8(small_net(), tail=1)
        self.scale = nn.Linear(4, 2)

    def forward(self, x: Int8Tensor) -> Tensor:
        out: Tensor = self.scale(self.inner(x).dequantize().float())
        return out


def test_a_state_loads_through_the_module_around() -> None:
    source, target = Outer(), Outer()
    train(source.inner, [(X, Y)])
    state = source.state_dict()
    names = [f"{i}.{part}" for i in (0, 4, 6) for part in ("weight", "exponent")]
    assert list(state) == [f"inner.{n}" for n in names] + ["scale.weight", "scale.bias"]
    assert digest(source.inner) != digest(target.inner)
    assert target.load_state_dict(state).missing_keys == []
    assert digest(source.inner) == digest(target.inner)
    assert torch.equal(source.eval()(X), target.eval()(X))


def test_it_loads_two_levels_down_and_by_assigning() -> None:
    source, target = Outer(), Outer()
    nn.Sequential(target).load_state_dict(nn.Sequential(source).state_dict(), assign=True)
    ours, theirs = (m.inner.network.layers["0"].weight for m in (source, target))
    assert ours.data_ptr() == theirs.data_ptr()


def test_names_are_those_of_the_layers() -> None:
    model = Outer()
    assert [n for n, _ in model.named_buffers()] == list(model.inner.state_dict(prefix="inner."))
    assert model.get_submodule("inner.4") is model.inner.network.layers["4"]


def change(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    return {k: v for k, v in (state | changes).items() if v is not None}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"inner.0.weight": None}, RuntimeError, r'Missing key.*: "inner.0.weight"\.'),
        ({"inner.9.weight": torch.ones(1)}, RuntimeError, r'Unexpected key.*: "inner.9.weight"\.'),
        (
            {"inner.6.weight": torch.ones(4, 7, dtype=torch.int8)},
            RuntimeError,
            r"size mismatch for inner.6.weight: .* torch.Size\(\[4, 7\]\)",
        ),
        ({"inner.0.weight": [1]}, RuntimeError, r'"inner.0.weight", expected torch.Tensor'),
        (
            {"inner.6.weight": torch.ones(4, 8)},
            TypeError,
            r"'inner.6.weight' must be torch.int8, got torch.float32",
        ),
        (
            {"inner.6.exponent": torch.tensor(65, dtype=torch.int32)},
            ValueError,
            r"'inner.6.exponent' must be one exponent in \[-64, 64\], got 65",
        ),
    ],
    ids=["missing", "unexpected", "shape", "no-tensor", "dtype", "range"],
)
def test_strict_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    model = Outer()
    state = change(dict(model.state_dict()), **changes)
    with pytest.raises(error, match=message):
        model.load_state_dict(state)


def test_not_strict() -> None:
    source, target = Outer(), Outer()
    state = change(dict(source.state_dict()), **{"inner.0.weight": None, "inner.x": torch.ones(1)})
    found = target.load_state_dict(state, strict=False)
    assert found.missing_keys == ["inner.0.weight"] and found.unexpected_keys == ["inner.x"]
    assert torch.equal(target.state_dict()["inner.4.weight"], state["inner.4.weight"])


def test_loading_forgets_a_forward() -> None:
    model = Outer()
    zo = Int8ZO(model.inner, b_zo=1)
    losses = model.inner.losses(model.inner(X), Y)
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"zo.step without a training forward"):
        zo.step(losses)


def test_layers_may_have_the_names_of_attributes() -> None:
    names = ("network", "cut", "gradients", "loss", "queries", "head", "session", "estimator")
    layers = [nn.Linear(2, 2, bias=False) for _ in names]
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.weight.fill_(i + 1)
    parts = nn.Sequential(OrderedDict(zip(names, layers, strict=True)))
    model, other = ElasticZOInt8(parts, tail=1), ElasticZOInt8(parts, tail=1, seed=3)
    train(model, [batch((3, 2), 2)], b_zo=7)
    assert list(model.state_dict())[::2] == [f"{name}.weight" for name in names]
    assert all(model.get_submodule(name) is model.network.layers[name] for name in names)
    model.set_noise(r_max=3)
    other.load_state_dict(model.state_dict())
    assert digest(other) == digest(model)
