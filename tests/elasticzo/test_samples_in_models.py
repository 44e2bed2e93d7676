"""Directions of samples and nodes in whole models: pairings, micro-batches, state, logs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, TrajectoryLog, one_sided, replay
from elasticzo.models import LeNet5
from elasticzo.optim import ZOAdam
from elasticzo.optim.head import HeadOptimizer
from tests.elasticzo.zoo import ZOO, build

KINDS = ("sample", "node", "auto", "rank1")
FEW = ("residual_cnn", "transformer", "padding")
TIME_FIRST = ("lstm_time_first", "encoder_time_first")
EPS = 1e-2


def wrapped(name: str, directions: Any, pairing: str | None = None, **how: Any) -> Any:
    case = ZOO[name]
    net, inputs = build(case)
    settings = {"eps": EPS, "seed": 7, "pairing": pairing or case.pairings[0], **how}
    model = ElasticZO(copy.deepcopy(net), case.tail, directions=directions, **settings)
    return model.train(), inputs


def losses_of(model: ElasticZO, out: Tensor) -> Tensor:
    """A smooth loss of each sample and half, of outputs `[halves, B, ...]`."""
    flat = out.flatten(2)
    found = (torch.sin(flat) * torch.arange(1, flat.shape[2] + 1)).mean(2) + flat.square().mean(2)
    return found if model.head.by_sample else found.mean(1)


def train(model: ElasticZO, inputs: Any, zo: HeadOptimizer | None = None, steps: int = 3) -> Any:
    zo = zo or ZOSGD(model, lr=1e-3)
    for _ in range(steps):
        torch.manual_seed(3)  # attention draws its dropout from torch's generator
        losses = losses_of(model, model(*inputs))
        model.backward(losses)
        zo.step(losses)
    return zo


def weights(model: ElasticZO) -> list[Tensor]:
    return [p.detach().clone() for p in model.head_parameters()]


def same(a: ElasticZO, b: ElasticZO, exact: bool = True) -> None:
    for one, other in zip(weights(a), weights(b), strict=True):
        if exact:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", list(ZOO))
def test_any_model_takes_any_kind(name: str, kind: str) -> None:
    """Stacked and one by one the halves and steps agree; what a layer cannot serve has another
    kind, with a reason."""
    made = [wrapped(name, kind, pairing) for pairing in ZOO[name].pairings]
    outputs = []
    for model, inputs in made:
        torch.manual_seed(3)
        outputs.append(model(*inputs))
        losses = losses_of(model, outputs[-1])
        model.backward(losses)
        before = weights(model)
        ZOSGD(model, lr=1e-3).step(losses)
        moved = [not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True)]
        assert all(moved)
        kinds = model.directions.values()
        assert all(k.name in ("weight", "rank1", "sample", "node") for k in kinds)
        assert all(k.why for k in kinds if k.name not in (kind, "rank1"))
        if name in TIME_FIRST:
            assert {k.name for k in kinds} <= {"weight", "rank1"}
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-9, atol=1e-11)
    for model, _ in made[1:]:
        same(made[0][0], model, exact=False)


@pytest.mark.parametrize("kind", ["sample", "node"])
@pytest.mark.parametrize("name", ["odd_convs", "transformer_tail_layer", "padding", "tied"])
def test_a_step_is_the_same_however_it_is_cut(name: str, kind: str) -> None:
    """Micro-batches of 1, 3 and 2 samples against one batch of six (no batch statistics): each
    half's outputs, and the step up to the order of the layers' sums."""
    model, inputs = wrapped(name, kind)
    if name.startswith("transformer"):
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
            if isinstance(m, nn.MultiheadAttention):
                m.dropout = 0.0
    other = copy.deepcopy(model)
    out = model(*inputs)
    parts = [other(*(x[a:b] for x in inputs)) for a, b in ((0, 1), (1, 4), (4, 6))]
    torch.testing.assert_close(torch.cat(parts, 1), out, rtol=1e-9, atol=1e-11)
    ZOSGD(model, lr=1e-2).step(losses_of(model, out).detach())
    losses = [losses_of(other, part).detach() for part in parts]
    ZOSGD(other, lr=1e-2).step(torch.cat(losses, 1))
    same(model, other, exact=False)


@pytest.mark.parametrize("directions", [{"*": "auto"}, "sample"])
@pytest.mark.parametrize("name", FEW)
def test_it_resumes_where_it_stood(name: str, directions: Any) -> None:
    model, inputs = wrapped(name, directions, group=2)
    zo = train(model, inputs, ZOAdam(model, lr=1e-3))
    state, net = copy.deepcopy((zo.state_dict(), model.state_dict()))
    train(model, inputs, zo)
    again, _ = wrapped(name, directions, group=2)
    again.load_state_dict(net)
    other = ZOAdam(again, lr=1e-3)
    other.load_state_dict(state)
    train(again, inputs, other)
    same(model, again)
    third, _ = wrapped(name, "weight")
    with pytest.raises(ValueError, match="directions"):
        ZOAdam(third, lr=1e-3).load_state_dict(state)


@pytest.mark.parametrize("directions", ["sample", "auto"])
@pytest.mark.parametrize("name", ["residual_cnn", "tied", "padding"])
def test_a_log_makes_the_run_again(name: str, directions: str, tmp_path: Path) -> None:
    """Samples from the log alone, nodes with the inputs of each step."""
    model, inputs = wrapped(name, directions)
    fresh = copy.deepcopy(model)
    zo = ZOSGD(model, lr=1e-3)
    if any(k.name == "auto" for k in model.directions.values()):
        with pytest.raises(RuntimeError, match="settle"):
            TrajectoryLog(tmp_path / "run.log", zo)
        first = weights(model)
        model.settle(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, weights(model), strict=True))
    log = TrajectoryLog(tmp_path / "run.log", zo)
    train(model, inputs, zo)
    log.drain()
    nodes = any(k.name == "node" for k in model.directions.values())
    if nodes:
        with pytest.raises(ValueError, match="batches"):
            replay(log.path, fresh)
    assert replay(log.path, fresh, batches=[inputs] * 3 if nodes else None) == 3
    same(model, fresh)


@pytest.mark.parametrize("kind", ["sample", "node"])
def test_deferred_is_at_once(kind: str) -> None:
    """What has no kernel does not wait; the rest of the head does."""
    directions = {"*": "weight", "stem.*": kind}
    one, inputs = wrapped("residual_cnn", directions)
    other, _ = wrapped("residual_cnn", directions)
    start = weights(one)
    train(one, inputs, ZOSGD(one, lr=1e-3))
    train(other, inputs, ZOSGD(other, lr=1e-3, defer=True))
    same(one, other)
    assert not any(torch.equal(a, b) for a, b in zip(start, weights(other), strict=True))


@pytest.mark.parametrize("kind", ["sample", "node"])
def test_one_bad_sample_skips_the_step(kind: str) -> None:
    """As of a batch: weights, statistics and state are those before, and the next step is right."""
    model, inputs = wrapped("residual_cnn", kind)
    zo = train(model, inputs, ZOAdam(model, lr=1e-3))
    before, buffers = weights(model), [b.clone() for b in model.buffers()]
    moments = [s["exp_avg"].clone() for s in zo.state.values()]
    losses = losses_of(model, model(*inputs)).detach()
    losses[1, 2] = torch.nan
    zo.step(losses)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    kept = [s["exp_avg"] for s in zo.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, kept, strict=True))
    with pytest.warns(UserWarning, match="skipped"):
        assert zo.skipped == 1
    assert not model.session.kept and model.session.samples == 0


def test_tied_weights_sum_what_each_layer_learns() -> None:
    """A table and a product of one weight: the mean estimate is the whole gradient, n = 400 steps,
    5 sigma, stacked; alone each layer's part would be missing or doubled."""
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            y: Tensor = self.out(torch.tanh(self.embed(tokens)))
            return y

    net, tokens = Tied().double(), torch.tensor([0, 1, 1, 3])
    v = torch.randn(4, 5, dtype=torch.float64)
    true = torch.autograd.grad((net(tokens) * v).sum() / 4, net.embed.weight)[0]
    onto = torch.randn_like(true)
    for kind in ("sample", "node", "auto"):
        model = ElasticZO(copy.deepcopy(net), 0, eps=1e-4, directions=kind).train()
        assert {k.name for k in model.directions.values()} == {"node"}
        zo, start = ZOSGD(model, lr=1.0), weights(model)[0]
        found = []
        for _ in range(400):
            zo.step((model(tokens) * v).sum(2))
            found.append(((start - weights(model)[0]) * onto).sum())
            with torch.no_grad():
                next(model.head_parameters()).copy_(start)
        t = torch.stack(found)
        assert (t.mean() - (true * onto).sum()).abs() <= 5 * t.std() / 400**0.5


@pytest.mark.parametrize("pairing", ["stacked", "sequential"])
def test_what_nodes_learn_from_must_stay(pairing: str) -> None:
    model, inputs = wrapped("padding", "node", pairing)
    losses = losses_of(model, model(*inputs)).detach()
    inputs[0].zero_()
    with pytest.raises(RuntimeError, match="memory of its own"):
        ZOSGD(model, lr=0.1).step(losses)


def test_nothing_moves_where_a_kept_input_changed() -> None:
    """Neither do the layers that learn by samples, whose estimates need no input."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model = ElasticZO(net, 0, directions={"0": "node", "2": "sample"}).train()
    x, before = torch.randn(6, 4), weights(model)
    losses = losses_of(model, model(x)).detach()
    x.zero_()
    with pytest.raises(RuntimeError, match="memory of its own"):
        ZOSGD(model, lr=0.1).step(losses)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def test_one_sided_nodes_keep_the_clean_input_too() -> None:
    one, inputs = wrapped("input_twice", "node", estimator=one_sided(2))
    other, _ = wrapped("input_twice", "node", "sequential", estimator=one_sided(2))
    start = weights(one)
    train(one, inputs, steps=1)
    train(other, inputs, steps=1)
    same(one, other, exact=False)
    assert not any(torch.equal(a, b) for a, b in zip(start, weights(other), strict=True))


def test_each_sample_is_clipped() -> None:
    model, inputs = wrapped("input_twice", "sample")
    out, losses = model(*inputs), torch.zeros(2, 6, dtype=torch.float64)
    losses[0] = torch.tensor([1e3, -1e3, 0.0, 0.0, 0.0, 1e-3])
    before = weights(model)
    ZOSGD(model, lr=1.0, clip=0.5).step(losses)
    one = model.head.parameters["a.weight"]
    c = torch.tensor([[0.5, -0.5, 0, 0, 0, 1e-3 / (2 * EPS)]], dtype=torch.float64)
    key = torch.tensor([7, 0])
    u = model.estimator.samples.sum(one, before[0], key, c / 6, "auto")
    torch.testing.assert_close(before[0] - u, weights(model)[0])
    assert out.shape[:2] == (2, 6)


def test_one_sided_and_several_queries() -> None:
    for estimator in (one_sided(3), None):
        how = {"estimator": estimator} if estimator else {"queries": 3}
        model, inputs = wrapped("conv1d", "auto", **how)
        other, _ = wrapped("conv1d", "auto", "sequential", **how)
        torch.testing.assert_close(model(*inputs), other(*inputs), rtol=1e-9, atol=1e-11)
        model.forget_forwards()
        train(model, inputs, steps=1)


def test_kinds_by_pattern_and_what_the_model_says() -> None:
    net = LeNet5()
    model = ElasticZO(net, ["fc3"], directions={"conv1": "sample", "fc*": "node"}).train()
    kinds = {n: k.name for n, k in model.directions.items()}
    assert kinds["conv1.bias"] == "sample" and kinds["conv2.weight"] == "weight"
    assert kinds["fc1.weight"] == "node"
    assert "2 sample, 2 weight, 4 node" in model.extra_repr()
    auto = ElasticZO(LeNet5(), ["fc3"], directions="auto").train()
    found = auto.settle(torch.zeros(2, 1, 28, 28))
    assert str(found["fc1.weight"]) == "node (1 places < 784 inputs)"
    assert str(found["conv1.weight"]) == "sample (784 places >= 25 inputs)"
    assert auto.session.forwards == 0


@pytest.mark.parametrize("kind", ["weight", *KINDS])
def test_known_layers_run_stacked(kind: str) -> None:
    """No weight counts as read around its layer, so that nothing runs a half at a time."""
    model = ElasticZO(LeNet5(), ["fc3"], eps=EPS, directions=kind).train()
    model(torch.randn(4, 1, 28, 28))
    assert model.effective_pairing == "stacked"
    assert not any(layer.by_half for layer in model.engine.plan.layers.values())


def test_refusals() -> None:
    net, x = LeNet5(), torch.zeros(3, 1, 28, 28)
    with pytest.raises(ValueError, match="must be one of"):
        ElasticZO(net, 1, directions="samples")
    with pytest.raises(TypeError, match="pattern"):
        ElasticZO(net, 1, directions=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no head parameter"):
        ElasticZO(net, 1, directions={"fc9": "node"})
    with pytest.raises(ValueError, match="one kind"):
        ElasticZO(net, 1, directions={"fc1.weight": "node"})
    with pytest.raises(ValueError, match="rank1"):
        ElasticZO(net, 1, directions="node", noise="rank1")
    with pytest.raises(ValueError, match="group"):
        ElasticZO(net, 1, directions="sample", group=0)
    model = ElasticZO(net, 1, directions="sample").train()
    zo = ZOSGD(model, lr=0.1)
    model(x)
    with pytest.raises(ValueError, match='reduction="none"'):
        zo.step(torch.zeros(2))
    with pytest.raises(ValueError, match=r"4\]"):
        zo.step(torch.zeros(2, 4))
    with pytest.raises(ValueError, match='reduction="none"'):
        model.backward(torch.zeros(2))


def test_a_layer_that_reads_no_samples_has_a_direction_of_the_batch() -> None:
    """Positions pass through a layer without the batch: it is learnt by noise of its weights."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.fc = nn.Linear(3, 4), nn.Linear(4, 2)
            self.register_buffer("grid", torch.randn(5, 3))

        def forward(self, x: Tensor) -> Tensor:
            rows = self.inner(x.flatten(0, 1)).view(*x.shape[:2], 4)
            y: Tensor = self.fc(rows.mean(1))
            return y

    model = ElasticZO(Table(), tail=["fc"], directions="sample").train()
    model(torch.randn(6, 5, 3))
    kind = model.directions["inner.weight"]
    assert kind.name == "weight" and "30 rows for 6 samples" in kind.why
