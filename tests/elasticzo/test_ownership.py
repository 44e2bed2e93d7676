"""What a wrapper froze: copies, assigned states and a second wrapper know it; `unwrap` ends it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from elasticzo import ZOSGD, ElasticZO, pair_losses, unwrap
from elasticzo.int8 import ElasticZOInt8

X, Y = torch.linspace(-1, 1, 20).view(5, 4), torch.tensor([0, 1, 2, 0, 1])


def net() -> nn.Module:
    layers = nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)
    return nn.Sequential(*layers)


def assigned(model: ElasticZO) -> Any:
    model.load_state_dict(net().state_dict(), assign=True)
    return model.module


HABITS: dict[str, Callable[[ElasticZO], Any]] = {
    "itself": lambda m: m.module,
    "deepcopy": lambda m: copy.deepcopy(m.module),
    "copy of the wrapper": lambda m: copy.deepcopy(m).module,
    "pickle": lambda m: pickle.loads(pickle.dumps(m.module)),
    "averaged": lambda m: AveragedModel(m).module.module,
    "average of the model": lambda m: AveragedModel(m.module).module,
    "assign": assigned,
    "child": lambda m: nn.Sequential(copy.deepcopy(m.module[0]), nn.Linear(8, 3, bias=False)),
}


@pytest.mark.parametrize("wrap", [ElasticZO, ElasticZOInt8])
@pytest.mark.parametrize("habit", HABITS.values(), ids=HABITS)
def test_what_a_wrapper_froze_is_given_back_before_another_has_it(habit: Any, wrap: Any) -> None:
    model = habit(ElasticZO(net(), tail=1))
    with pytest.raises(ValueError, match=r"\(0.weight\) are frozen by a wrapper .*unwrap\(model\)"):
        wrap(model, tail=1)
    assert unwrap(model) is model
    assert all(p.requires_grad for p in model.parameters())
    assert [name for name, _ in wrap(model, tail=1).named_head_parameters()] == ["0.weight"]


def test_a_user_s_own_freeze_is_kept() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 3))
    inner[0].bias.requires_grad_(False)
    model = ElasticZO(inner, tail=1)
    assert model.unwrap() is inner
    assert [name for name, p in inner.named_parameters() if not p.requires_grad] == ["0.bias"]
    inner[1].requires_grad_(False)
    head = [name for name, _ in ElasticZO(inner, tail=1).named_head_parameters()]
    assert head == ["0.weight"]


def test_a_copy_is_unwrapped_alone() -> None:
    model = ElasticZO(net(), tail=1).train()
    other = copy.deepcopy(model)
    unwrap(other.module)
    assert model(X).shape == (2, 5, 3) and not model.module[0].weight.requires_grad
    with pytest.raises(RuntimeError, match="the model was unwrapped"):
        other(X)


def test_what_was_given_back_is_trained_no_more() -> None:
    model = ElasticZO(net(), tail=1).train()
    zo = ZOSGD(model, lr=0.1)
    losses = pair_losses(F.cross_entropy, model(X), Y)
    plain = unwrap(model.module)
    before = plain[0].weight.clone()
    for call in (lambda: zo.step(losses), lambda: model(X), lambda: model.clean_forward(X)):
        with pytest.raises(RuntimeError, match="the model was unwrapped"):
            call()
    assert torch.equal(before, plain[0].weight)
    assert torch.equal(model.eval()(X), plain(X))


def test_an_update_that_waits_is_applied() -> None:
    model = ElasticZO(net(), tail=1).train()
    zo = ZOSGD(model, lr=0.1, defer=True)
    before = model.module[0].weight.clone()
    zo.step(pair_losses(F.cross_entropy, model(X), Y))
    assert not torch.equal(before, unwrap(model.module)[0].weight)


def test_an_empty_head_says_so(recwarn: pytest.WarningsRecorder) -> None:
    inner = net()
    inner[0].requires_grad_(False)
    for wrap in (ElasticZO, ElasticZOInt8):
        wrap(inner, tail="all")
        wrap(net(), tail=1)
    assert not recwarn.list
    for wrap in (ElasticZO, ElasticZOInt8):
        with pytest.warns(UserWarning, match=r"tail=1 leaves the head empty.*tail='all'"):
            wrap(inner, tail=1)
    with pytest.warns(UserWarning, match="leaves the head empty"):
        ElasticZO(net(), tail=["0", "2"])


def test_a_wrapper_in_a_wrapper_is_refused() -> None:
    wrapped = ElasticZO(net(), tail=1)
    integer = ElasticZOInt8(net(), tail=1)
    for inner in (wrapped, integer):
        named = type(inner).__name__
        for wrap in (ElasticZO, ElasticZOInt8):
            with pytest.raises(ValueError, match=rf"free of wrappers: 'the model' is .*\({named}"):
                wrap(inner, tail=1)
        with pytest.raises(ValueError, match=rf"free of wrappers: '0' is one \({named}\)"):
            ElasticZO(nn.Sequential(inner, nn.Linear(3, 3)), tail=1)
    with pytest.raises(TypeError, match="must be a module or an ElasticZO, got ElasticZOInt8"):
        unwrap(integer)
