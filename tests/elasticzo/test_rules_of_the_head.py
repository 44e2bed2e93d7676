"""What holds for every rule of the head: a new one is a line in `OPTIMIZERS`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elasticzo import ElasticZO, TrajectoryLog, ZOAdam, capture_step, pair_losses, replay
from elasticzo.checkpoint import load_checkpoint, save_checkpoint
from elasticzo.optim import OPTIMIZERS
from tests.elasticzo.zoo import ZOO, build, smooth_loss
from zo_kernels import RULES

SETTINGS: dict[str, dict[str, Any]] = {"momentum": {"momentum": 0.9}, "adam": {"betas": (0.8, 0.9)}}
LR = {"sgd": 1e-2, "momentum": 1e-2, "sign": 1e-4}
every = pytest.mark.parametrize("rule", list(OPTIMIZERS))
MODELS = ("residual_cnn", "padding", "conv1d")


def wrapped(model: str, **settings: Any) -> tuple[ElasticZO, Any]:
    case = ZOO[model]
    net, inputs = build(case, dtype=settings.pop("dtype", torch.float32))
    how = {"eps": 1e-2, "seed": 7, "queries": 2, **settings}
    return ElasticZO(copy.deepcopy(net), tail=case.tail, **how).train(), inputs


def optimizer(rule: str, model: ElasticZO, **how: Any) -> Any:
    first = next(iter(model.head_parameters()))
    groups = [{"params": [first], "lr": 2 * LR.get(rule, 1e-3), "weight_decay": 0.3}]
    given = SETTINGS.get(rule, {}) | how
    return OPTIMIZERS[rule](
        model, given.pop("lr", LR.get(rule, 1e-3)), groups, weight_decay=0.1, **given
    )


def steps(model: ElasticZO, zo: Any, inputs: Any, count: int = 3) -> list[Tensor]:
    for _ in range(count):
        zo.step(pair_losses(smooth_loss, model(*inputs)))
    return [p.detach().clone() for p in model.head_parameters()]


def test_every_rule_has_an_optimiser() -> None:
    assert list(OPTIMIZERS) == list(RULES)


@pytest.mark.parametrize("model", MODELS)
@every
def test_a_skipped_step_leaves_weights_and_state(rule: str, model: str) -> None:
    net, inputs = wrapped(model)
    zo = optimizer(rule, net)
    before = steps(net, zo, inputs)
    state = copy.deepcopy(zo.state_dict()["state"])
    net(*inputs)
    zo.step([float("nan"), 1.0, 1.0, 2.0])
    assert all(map(torch.equal, before, net.head_parameters()))
    after = zo.state_dict()["state"]
    assert state.keys() == after.keys()
    for at in state:
        assert all(torch.equal(state[at][k], after[at][k]) for k in state[at])
    with pytest.warns(UserWarning, match="1 zeroth-order step"):
        assert zo.skipped == 1


@pytest.mark.parametrize("model", MODELS)
@every
def test_state_goes_through_a_checkpoint(rule: str, model: str, tmp_path: Path) -> None:
    net, inputs = wrapped(model)
    zo = optimizer(rule, net)
    steps(net, zo, inputs)
    save_checkpoint(tmp_path / "state", {"model": net.state_dict(), "zo": zo.state_dict()})
    wanted = steps(net, zo, inputs)
    other, _ = wrapped(model)
    again = optimizer(rule, other)
    state = load_checkpoint(tmp_path / "state")
    other.load_state_dict(state["model"])
    again.load_state_dict(state["zo"])
    assert all(map(torch.equal, wanted, steps(other, again, inputs)))
    kept = again.state_dict()["state"]
    names = [*RULES[rule].state, *(("step",) if rule == "adam" else ())]
    assert all(sorted(entry) == sorted(names) for entry in kept.values())
    assert bool(kept) == bool(names)


@pytest.mark.parametrize("model", MODELS)
@every
def test_deferred_captured_and_replayed_have_the_same_bits(
    rule: str, model: str, tmp_path: Path
) -> None:
    net, inputs = wrapped(model)
    start = copy.deepcopy(net)
    zo = optimizer(rule, net)
    log = TrajectoryLog(tmp_path / "log", zo)
    wanted = steps(net, zo, inputs)
    log.drain()
    other, _ = wrapped(model)
    assert all(map(torch.equal, wanted, steps(other, optimizer(rule, other, defer=True), inputs)))
    assert replay(log.path, start) == 3
    assert all(map(torch.equal, wanted, start.head_parameters()))


@pytest.mark.parametrize("defer", [False, True], ids=["at once", "deferred"])
@every
def test_captured_equals_eager(rule: str, defer: bool) -> None:
    runs = []
    for captured in (False, True):
        net, inputs = wrapped("input_twice")
        lr = torch.tensor(LR.get(rule, 1e-3), dtype=torch.float64)
        how = SETTINGS.get(rule, {})
        zo = OPTIMIZERS[rule](net, lr, weight_decay=0.1, defer=defer, **how)
        if captured:
            tail = net.tail_optimizer(torch.optim.SGD, lr=torch.tensor(0.0))
            step = capture_step(zo, smooth_loss, inputs, (), tail=tail)
            for _ in range(3):
                step(inputs, ())
            runs.append([p.clone() for p in net.head_parameters()])
        else:
            runs.append(steps(net, zo, inputs))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("rule", ["sgd", "momentum", "nesterov", "adam", "adamw"])
def test_it_is_torch_s_on_the_materialised_gradient(rule: str) -> None:
    """float64, five steps; u = sum_q a_q s z_q given to torch as the gradient. Bound: rounding of
    z to fp32, which both have, and sums in another order."""
    mine = {
        "sgd": ("sgd", {}),
        "momentum": ("momentum", {"momentum": 0.9}),
        "nesterov": ("momentum", {"momentum": 0.9, "nesterov": True}),
        "adam": ("adam", {}),
        "adamw": ("adam", {"decoupled_weight_decay": True}),
    }[rule]
    theirs: Any = {
        "sgd": torch.optim.SGD,
        "momentum": lambda p, **k: torch.optim.SGD(p, momentum=0.9, **k),
        "nesterov": lambda p, **k: torch.optim.SGD(p, momentum=0.9, nesterov=True, **k),
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }[rule]
    net, inputs = wrapped("input_twice", dtype=torch.float64)
    zo = OPTIMIZERS[mine[0]](net, lr=1e-2, weight_decay=0.1, **mine[1])
    twin = {name: torch.nn.Parameter(p.detach().clone()) for name, p in net.named_head_parameters()}
    reference = theirs(list(twin.values()), lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        losses = pair_losses(smooth_loss, net(*inputs))
        key = net.session.key.clone()
        zo.step(losses)
        a = net.estimator.coefficients(zo.projected_gradient, None)
        for head, w in net.head:
            twin[head.name].grad = net.estimator.direction.sum(head, w, key, a, "auto")
        reference.step()
    for name, p in net.named_head_parameters():
        torch.testing.assert_close(p, twin[name].detach(), rtol=1e-6, atol=1e-9)


def test_a_log_that_begins_with_a_state_is_not_replayed(tmp_path: Path) -> None:
    net, inputs = wrapped("padding")
    zo = ZOAdam(net, lr=1e-3)
    steps(net, zo, inputs, 1)
    log = TrajectoryLog(tmp_path / "log", zo)
    steps(net, zo, inputs, 1)
    log.drain()
    with pytest.raises(ValueError, match=r"begins at step 1, where the state of its rule \(adam\)"):
        replay(log.path, wrapped("padding")[0])


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        ("momentum", {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ("sgd", {"nesterov": True}, "nesterov needs momentum > 0"),
        ("adam", {"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ("adam", {"eps": 0.0}, "eps must be a finite number > 0, got 0.0"),
    ],
)
def test_settings_are_refused_by_name(rule: str, settings: dict[str, Any], message: str) -> None:
    net, _ = wrapped("padding")
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS[rule](net, lr=1e-3, **settings)


@pytest.mark.parametrize("rule", [r for r in OPTIMIZERS if RULES[r].state])
def test_a_damaged_state_is_refused_and_nothing_loaded(rule: str) -> None:
    net, inputs = wrapped("padding")
    zo = optimizer(rule, net)
    steps(net, zo, inputs)
    state = zo.state_dict()
    at = next(iter(state["state"]))
    name = RULES[rule].state[0]
    before = zo.state[net.head_parameters().__next__()][name].clone()
    for damage in ({}, {**state["state"][at], "more": 1}):
        damaged = {**state, "state": {**state["state"], at: damage}}
        with pytest.raises(ValueError, match=r"must have the entries"):
            zo.load_state_dict(damaged)
    assert torch.equal(before, zo.state[net.head_parameters().__next__()][name])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize("rule", OPTIMIZERS)
@pytest.mark.parametrize("scale", [{"*": 0.0}, None], ids=["scale 0", "frozen"])
def test_a_head_that_nothing_moves(rule: str, defer: bool, scale: dict[str, float] | None) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    net[0].requires_grad_(scale is not None)
    model = ElasticZO(net, tail=1, scale=scale).train()
    before = copy.deepcopy(model.state_dict())
    zo = OPTIMIZERS[rule](model, lr=0.1, defer=defer)
    for _ in range(2):
        zo.step(pair_losses(smooth_loss, model(torch.ones(5, 3))))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.step_index == 2
