"""`ElasticZO` as a part of another module: its states are those of any `nn.Module`."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, pair_losses

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
NAMES = [
    *("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"),
    *("1.num_batches_tracked", "module.weight", "module.bias"),
]


class Versioned(nn.Linear):
    """A layer whose states of version 1 had another sign, as some of torchvision's migrate."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version") != 2:
            state[prefix + "weight"] = -state[prefix + "weight"]
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def net() -> nn.Module:
    """With a child whose name is the wrapper's own for its model."""
    made = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    made.add_module("module", Versioned(5, 3))
    return made


class Outer(nn.Module):
    def __init__(self, wrap: Callable[[nn.Module], nn.Module] | None = None) -> None:
        super().__init__()
        self.inner = wrap(net()) if wrap else ElasticZO(net(), tail=1, eps=0.1)
        self.scale = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.inner(x))


def step(model: ElasticZO, defer: bool = False) -> ZOSGD:
    zo = ZOSGD(model, lr=0.1, defer=defer)
    losses = pair_losses(F.cross_entropy, model.train()(X), Y)
    model.backward(losses)
    zo.step(losses)
    return zo


def equal(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in mine.items())


@pytest.mark.parametrize("defer", [False, True], ids=["at-once", "deferred"])
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_a_state_loads_through_the_module_around(assign: bool, defer: bool) -> None:
    source, target = nn.Sequential(Outer()), nn.Sequential(Outer())
    step(source[0].inner, defer)
    state = copy.deepcopy(source.state_dict())
    assert list(state)[:9] == [f"0.inner.{name}" for name in NAMES]
    assert not equal(source, target)
    step(target[0].inner, defer)  # waits, and must not be applied to what is loaded
    found = target.load_state_dict(state, assign=assign)
    assert found.missing_keys == [] == found.unexpected_keys
    assert equal(source, target)
    assert torch.equal(source.eval()(X), target.eval()(X))


def test_states_of_plain_models_fit_and_back() -> None:
    plain, wrapped = Outer(lambda model: model), Outer()
    wrapped.load_state_dict(plain.state_dict())
    assert equal(plain, wrapped)
    step(wrapped.inner)
    assert not equal(plain, wrapped)
    plain.load_state_dict(wrapped.state_dict())
    assert equal(plain, wrapped)


def test_a_model_whose_own_states_have_versions() -> None:
    source, target = (nn.Sequential(ElasticZO(Versioned(4, 3), tail=0)) for _ in range(2))
    target.load_state_dict(source.state_dict())
    assert list(source.state_dict()) == ["0.weight", "0.bias"] and equal(source, target)


def test_names_are_as_before_and_copies_load_too() -> None:
    model = Outer()
    model.load_state_dict(model.state_dict())
    for outer in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.double()):
        names = [n for n, _ in outer.named_parameters()]
        wanted = [f"inner.module.{n}" for n in NAMES if "running" not in n and "num" not in n]
        assert names == [*wanted, "scale.weight", "scale.bias"]
        assert isinstance(outer.inner.module, nn.Sequential)
        state = copy.deepcopy(outer.state_dict())
        for value in state.values():
            value += 1
        outer.load_state_dict(state)
        assert all(torch.equal(v, state[k]) for k, v in outer.state_dict().items())


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"inner.0.weight": None}, r'Missing key.*: "inner.0.weight"\.'),
    ({"inner.9.weight": torch.ones(1)}, r'Unexpected key.*: "inner.9.weight"\.'),
    ({"inner.w": torch.ones(1)}, r'Unexpected key.*: "inner.w"\.'),
    ({"inner.module.w": torch.ones(1)}, r'Unexpected key.*: "inner.module.w"\.'),
    ({"inner.0.bias": torch.ones(7)}, r"size mismatch for inner.0.bias: .*torch.Size\(\[7\]\)"),
    ({"inner.0.weight": [1]}, r'"inner.0.weight", expected torch.Tensor'),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[m[:24] for _, m in ERRORS])
def test_errors_are_those_of_torch(changes: dict[str, Any], message: str) -> None:
    messages = []
    for outer in (Outer(), Outer(lambda model: model)):
        state = {k: v for k, v in (outer.state_dict() | changes).items() if v is not None}
        state["inner.module.weight"] = -state["inner.module.weight"]  # it has no version now
        with pytest.raises(RuntimeError, match=message) as caught:
            outer.load_state_dict(state)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_not_strict() -> None:
    source, target = Outer(), Outer()
    state = source.state_dict()
    state["inner.x"] = state.pop("inner.0.weight")
    found = target.load_state_dict(state, strict=False)
    assert found.missing_keys == ["inner.0.weight"] and found.unexpected_keys == ["inner.x"]
    assert torch.equal(target.state_dict()["inner.0.bias"], state["inner.0.bias"])


def test_a_layer_that_fails_leaves_the_wrapper_whole() -> None:
    class Fails(nn.Linear):
        def _load_from_state_dict(self, *args: Any) -> None:
            raise KeyError("of its own")

    outer = nn.Sequential(ElasticZO(nn.Sequential(nn.Linear(4, 4), Fails(4, 3)), tail=1))
    names = [n for n, _ in outer.named_parameters()]
    with pytest.raises(KeyError, match="of its own"):
        outer.load_state_dict(outer.state_dict())
    assert [n for n, _ in outer.named_parameters()] == names
    step(outer[0])


def test_hooks_of_the_model_and_of_the_wrapper_run_once() -> None:
    outer, calls = Outer(), []
    for name, module in (("wrapper", outer.inner), ("model", outer.inner.module)):
        module.register_load_state_dict_pre_hook(
            lambda module, state, prefix, *_, name=name: calls.append((f"{name} before", prefix))
        )
        module.register_load_state_dict_post_hook(
            lambda module, keys, name=name: calls.append((f"{name} after", type(module).__name__))
        )
    outer.load_state_dict(outer.state_dict())
    assert calls == [
        *(("wrapper before", "inner."), ("model before", "inner.")),
        *(("model after", "Sequential"), ("wrapper after", "ElasticZO")),
    ]


def test_loading_forgets_a_forward_and_its_losses() -> None:
    outer = Outer()
    zo, model = ZOSGD(outer.inner, lr=0.1), outer.inner.train()
    losses = pair_losses(F.cross_entropy, model(X), Y)
    model.backward(losses * float("nan"))
    outer.load_state_dict(outer.state_dict())
    with pytest.raises(RuntimeError, match=r"zo.step without a training forward"):
        zo.step(losses)
    before = model.module[0].weight.clone()
    losses = pair_losses(F.cross_entropy, model(X), Y)
    model.backward(losses)
    zo.step(losses)
    assert zo.skipped == 0 and not torch.equal(model.module[0].weight, before)
