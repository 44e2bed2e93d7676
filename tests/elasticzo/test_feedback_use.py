"""Learnt feedback: any model, state, copies, capture, memory, what is refused."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, TrajectoryLog, capture_step, pair_losses, replay
from elasticzo.feedback import Feedback
from elasticzo.memory import inference_memory, training_memory
from elasticzo.models import LeNet5, ResNet20
from elasticzo.optim import ZOAdam
from tests.elasticzo._feedback import B, Plain, step, wrapped
from tests.elasticzo.zoo import ZOO, build, smooth_loss

# The second layer's forward direction ends in a state that the model does not read.
UNUSED = {
    "lstm_states": [f"lstm.{kind}_l1" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
}
TIME_FIRST = ("lstm_time_first", "encoder_time_first")


@pytest.mark.parametrize("name", [name for name in ZOO if name not in TIME_FIRST])
def test_any_model_learns(name: str) -> None:
    """All weights of the head move as soon as the matrices know something, the first step too
    where their gradient is exact; a forward is the model's own."""
    case = ZOO[name]
    net, inputs = build(case)
    model = ElasticZO(copy.deepcopy(net), case.tail, directions="feedback", seed=3).train()
    before = {n: p.clone() for n, p in model.named_head_parameters()}
    zo = ZOAdam(model, lr=1e-3)
    for _ in range(3):
        torch.manual_seed(1)
        step(model, inputs, zo)
    moved = {n for n, p in model.named_head_parameters() if not torch.equal(p, before[n])}
    assert moved == set(before) - set(UNUSED.get(name, ()))
    assert model(*inputs).shape[0] == 1
    assert {k.name for k in model.directions.values()} == {"feedback"}
    assert all(float(r) >= 0 for r in model.feedback_residual.values())


@pytest.mark.parametrize("name", TIME_FIRST)
def test_time_first_is_refused(name: str) -> None:
    case = ZOO[name]
    with pytest.raises(ValueError, match="batch_first"):
        ElasticZO(build(case)[0], case.tail, directions="feedback", pairing="sequential")


@pytest.mark.parametrize("name", ["residual_cnn", "dropouts", "conv1d"])
def test_it_resumes_where_it_stood(name: str) -> None:
    case = ZOO[name]
    net, inputs = build(case)
    model = ElasticZO(net, case.tail, directions="feedback", seed=3).train()
    zo = ZOAdam(model, lr=1e-3)
    for _ in range(3):
        step(model, inputs, zo)
    state, weights = copy.deepcopy((zo.state_dict(), model.state_dict()))
    twin = copy.deepcopy(model)  # with its matrices
    again = ElasticZO(build(case)[0], case.tail, directions="feedback", seed=9).train()
    again.load_state_dict(weights)
    other, third = ZOAdam(again, lr=1e-3), ZOAdam(twin, lr=1e-3)
    other.load_state_dict(state)
    third.load_state_dict(state)
    for m, o in ((model, zo), (again, other), (twin, third)):
        step(m, inputs, o)
    for m in (again, twin):
        for p, q in zip(model.head_parameters(), m.head_parameters(), strict=True):
            assert torch.equal(p, q)
        for k, t in model.session.learnt.items():
            assert torch.equal(t, m.session.learnt[k])
    fresh = ElasticZO(build(case)[0], case.tail, directions=Feedback(noise=0.2)).train()
    with pytest.raises(ValueError, match="estimator"):
        ZOAdam(fresh, lr=1e-3).load_state_dict(state)


def test_a_skipped_step_changes_nothing() -> None:
    net, inputs = build(ZOO["residual_cnn"])
    model = ElasticZO(net, ["fc"], directions="feedback").train()
    zo = ZOAdam(model, lr=1e-3)
    for _ in range(2):
        step(model, inputs, zo)
    kept = [*model.head_parameters(), *model.buffers(), *model.session.learnt.values()]
    kept += [t for state in zo.state.values() for t in state.values()]
    before = [t.clone() for t in kept]
    losses = pair_losses(smooth_loss, model(*inputs))
    model.backward(losses * torch.nan)
    zo.step(losses * torch.nan)
    now = [*model.head_parameters(), *model.buffers(), *model.session.learnt.values()]
    now += [t for state in zo.state.values() for t in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def test_nothing_is_kept_between_segments() -> None:
    """While a later layer runs, what an earlier one saved for its backward is gone."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(m for _ in range(4) for m in (nn.Linear(8, 8), nn.Sigmoid())), nn.Linear(8, 2)
    )
    model, x, seen = wrapped(net, tail=["8"]), torch.randn(B, 8), list[list[bool]]()
    alive: list[weakref.ref[Tensor]] = []

    def note(m: nn.Module, args: Any, out: Tensor) -> None:
        gc.collect()
        seen.append([ref() is not None for ref in alive])
        alive.append(weakref.ref(out))

    zo = ZOSGD(model, lr=0.1)
    step(model, (x,), zo)  # the first noisy pass does not know the order yet
    losses = pair_losses(smooth_loss, model(x))
    model.backward(losses)
    for m in net:
        if isinstance(m, nn.Sigmoid):
            m.register_forward_hook(note)
    alive.clear()
    zo.step(losses)
    assert len(seen) == 4 and not any(any(old[:-1]) for old in seen[1:])


def test_controls_settings_and_what_the_model_says() -> None:
    x, y = torch.randn(4, 1, 28, 28), torch.arange(4)
    for matrix in ("zero", "random"):
        model = wrapped(LeNet5(), ["fc3"], matrix=matrix)
        before = {n: p.clone() for n, p in model.named_head_parameters()}
        zo = ZOSGD(model, lr=0.1)
        for _ in range(2):
            step(model, (x,), zo, F.cross_entropy, y)
        moved = {n for n, p in model.named_head_parameters() if not torch.equal(p, before[n])}
        assert moved == ({"fc2.weight", "fc2.bias"} if matrix == "zero" else set(before))
        assert len(model.session.learnt) == (0 if matrix == "zero" else 3)
    assert "8 feedback" in model.extra_repr()
    settings: list[dict[str, Any]] = [
        {"matrix": "fixed"},
        {"noise": 0.0},
        {"beta": 2},
        {"width": 0},
        {"fit": "lms"},
    ]
    for wrong in (*settings, {"unbiased": True, "matrix": "random"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Feedback(**wrong)


def test_refusals(tmp_path: Path) -> None:
    x, net = torch.randn(3, 1, 28, 28), LeNet5()
    with pytest.raises(ValueError, match="whole head"):
        ElasticZO(net, 1, directions={"fc1": "feedback"})
    with pytest.raises(ValueError, match="clip"):
        ZOSGD(ElasticZO(LeNet5(), 1, directions={"*": "feedback"}), lr=0.1, clip=1.0)
    with pytest.raises(ValueError, match="group=2"):
        ElasticZO(net, 1, directions="feedback", group=2)
    with pytest.raises(ValueError, match="queries=2"):
        ElasticZO(net, 1, directions="feedback", queries=2)
    model = ElasticZO(net, 1, directions="feedback").train()
    zo = ZOSGD(model, lr=0.1)
    losses = pair_losses(smooth_loss, model(x))
    with pytest.raises(RuntimeError, match=r"model\.backward"):
        zo.step(losses)
    model.forget_forwards()
    log = TrajectoryLog(tmp_path / "run.log", zo)
    step(model, (x,), zo)
    log.drain()
    with pytest.raises(ValueError, match="checkpoint"):
        replay(log.path, ElasticZO(LeNet5(), 1, directions="feedback"))


def test_captured_as_any_step() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 1, 28, 28), torch.randint(0, 10, (8,))
    runs = []
    for captured in (False, True):
        torch.manual_seed(1)
        model = ElasticZO(LeNet5(), ["fc3"], directions="feedback").train()
        zo = ZOSGD(model, lr=torch.tensor(0.1))
        sgd = model.tail_optimizer(torch.optim.SGD, lr=torch.tensor(0.1), fused=True)
        once = capture_step(zo, F.cross_entropy, x, y, tail=sgd) if captured else None
        for _ in range(3):
            if once is not None:
                once(x, y)
                continue
            step(model, (x,), zo, F.cross_entropy, y)
            sgd.step()
            sgd.zero_grad()
        runs.append([p.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_memory_is_that_of_inference_in_parts() -> None:
    """ResNet-20, 64 images: the matrices, a tenth more than inference, and a third of Full BP."""
    net, x = ResNet20(channels=3), torch.zeros(64, 3, 32, 32)
    parts = ElasticZO(copy.deepcopy(net), ["fc"], directions=Feedback(parts=4)).train()
    full = ElasticZO(copy.deepcopy(net), "all").train()
    mine, bp = (training_memory(m, x, state_tensors=0).steady for m in (parts, full))
    assert mine.bytes <= 1.1 * inference_memory(net, x).bytes + mine.parts["optimizer"]
    assert mine.bytes < 0.35 * bp.bytes


def test_layers_must_keep_their_order() -> None:
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.tail = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
            self.turned = False

        def forward(self, x: Tensor) -> Tensor:
            for m in (self.b, self.a) if self.turned else (self.a, self.b):
                x = torch.tanh(m(x))
            y: Tensor = self.tail(x)
            return y

    net = Turns()
    model = wrapped(net)
    zo = ZOSGD(model, lr=0.1)
    step(model, (torch.randn(B, 3),), zo)
    net.turned = True
    with pytest.raises(RuntimeError, match="same order"):
        step(model, (torch.randn(B, 3),), zo)


def test_what_would_be_another_network_is_refused() -> None:
    x = torch.randn(B, 4)
    model = wrapped(Plain())
    zo = ZOSGD(model, lr=0.1)

    def until_step(after: Callable[[], Any]) -> Tensor:
        losses = pair_losses(smooth_loss, model(x))
        model.backward(losses)
        after()
        return losses

    losses = until_step(lambda: x.mul_(2.0))
    with pytest.raises(RuntimeError, match="memory of its own"):
        zo.step(losses)
    losses = until_step(model.eval)
    with pytest.raises(RuntimeError, match="switched"):
        zo.step(losses)
    model.train()
    step(model, (x,), zo)  # what was refused is forgotten
    twin = copy.deepcopy(model)
    step(twin, (x,), ZOSGD(twin, lr=0.1))
    losses = until_step(lambda: None)
    with pytest.raises(RuntimeError, match="without a training forward"):
        ZOSGD(copy.deepcopy(model), lr=0.1).step(losses)
    pickle.loads(pickle.dumps(model))
    dead = wrapped(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.Linear(3, 2)), ["3"]
    )
    nn.init.constant_(dead.module[0].bias, -1e3)
    step(dead, (x,), ZOSGD(dead, lr=0.1))
    assert all(m.isfinite().all() and m.abs().max() < 1e3 for m in dead.session.learnt.values())
    flat = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1), nn.Flatten(0))
    with pytest.raises(ValueError, match="dimension 0"):
        wrapped(nn.Sequential(flat, Sum()), ["0.1"])(x)


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum()


class Skips(nn.Module):
    """A layer of the user's that reads an earlier activation which is no argument of it."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.skip = nn.Parameter(torch.ones(6)), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.w * self.skip


def test_a_layer_reads_what_took_an_activations_place_by_other_ways_too() -> None:
    """The skip of a user's layer, an attribute, has the noise that the block's input has."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), Skips()
            self.tail, self.seen = nn.Linear(6, 2), []

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).relu()
            z = self.b(h).relu()
            self.c.skip = h
            y = self.c(z)
            self.seen.append((y - z).detach())  # w = 1: the skip as it was read
            out: Tensor = self.tail(y)
            return out

    net, x = Net(), torch.randn(5, 4)
    model = wrapped(net, noise=0.5)
    step(model, (x,), ZOSGD(model, lr=0.0))
    clean, noisy = net.seen[-2:]
    torch.testing.assert_close(clean, net.a(x).relu().detach())
    assert (noisy - clean).abs().min() > 0.05  # each element has its sign
