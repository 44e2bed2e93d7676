"""The step: by hand, unbiased, gated, scheduled, accumulated, continued."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, TrajectoryLog, pair_losses, replay, unwrap
from elasticzo.models import LeNet5, ResNet20
from tests.elasticzo.zoo import smooth_loss
from zo_kernels import sample

SEED = 11


class Toy(nn.Module):
    """Two linear layers without bias: `c(tanh(a x))`."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4, bias=False)
        self.c = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.a(x)))


def toy(dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[ElasticZO, Tensor]:
    torch.manual_seed(0)
    net, x = Toy().to(dtype), torch.randn(6, 3, dtype=dtype)
    return ElasticZO(net, **{"tail": ["c"], "seed": SEED, **settings}).train(), x


def z_of(
    step: int, tensor: int, shape: tuple[int, ...], query: int = 0, noise: str = "normal"
) -> Tensor:
    key = torch.tensor([SEED, step])
    return sample(shape, key, tensor=tensor, query=query, noise=noise).double()


@pytest.mark.parametrize("noise", ["normal", "rademacher"])
@pytest.mark.parametrize("queries", [1, 3], ids=["Q1", "Q3"])
def test_a_step_equals_the_one_computed_by_hand(queries: int, noise: str) -> None:
    lr, decay, clip, eps, scale = 0.3, 0.1, 0.05, 1e-2, 2.0
    model, x = toy(queries=queries, eps=eps, noise=noise, scale={"a.*": scale})
    zo = ZOSGD(model, lr=lr, clip=clip, weight_decay=decay)
    a = model.module.a.weight.detach().clone()
    c = model.module.c.weight.detach().clone()
    for step in range(3):
        total = torch.zeros_like(a)
        for q in range(queries):
            z = z_of(step, 0, (4, 3), q, noise)
            loss = [
                smooth_loss(torch.tanh(x @ (a + s * eps * scale * z).t()) @ c.t()) for s in (1, -1)
            ]
            g = (loss[0] - loss[1]) / (2 * eps)
            total += g.clamp(-clip, clip) / queries * scale * z
        a = a - lr * (total + decay * a)
        zo.step(pair_losses(smooth_loss, model(x)))
        torch.testing.assert_close(model.module.a.weight, a, rtol=1e-12, atol=1e-12)
    assert torch.equal(model.module.c.weight, c)


def test_the_estimate_is_unbiased() -> None:
    """E[g z] = grad + O(eps^2) over n = 20,000 directions; every component within 5 sigma."""
    model, x = toy(eps=1e-4, queries=100)
    exact = ElasticZO(unwrap(copy.deepcopy(model.module)), tail="all")
    exact.module.a.weight.requires_grad_(True)
    gradient = torch.autograd.grad(smooth_loss(exact.module(x)), exact.module.a.weight)[0]
    estimates = []
    zo = ZOSGD(model, lr=0.0)
    with torch.no_grad():
        for step in range(200):
            zo.step(pair_losses(smooth_loss, model(x)))
            g = zo.projected_gradient
            z = torch.stack([z_of(step, 0, (4, 3), q) for q in range(100)])
            estimates.append(g[:, None, None] * z)
    drawn = torch.cat(estimates)
    n = drawn.shape[0]
    sigma = drawn.std(0) / math.sqrt(n)
    assert n == 20_000
    assert ((drawn.mean(0) - gradient).abs() <= 5 * sigma).all()


def test_zero_scale_and_frozen_parameters_stay() -> None:
    net = LeNet5()
    net.conv2.weight.requires_grad_(False)
    model = ElasticZO(net, tail=["fc3"], scale={"fc1.*": 0.0}).train()
    zo = ZOSGD(model, lr=1e-2)
    before = copy.deepcopy(model.state_dict())
    zo.step(pair_losses(F.cross_entropy, model(torch.randn(4, 1, 28, 28)), torch.arange(4)))
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"conv1.weight", "conv1.bias", "conv2.bias", "fc2.weight", "fc2.bias"}


def test_the_row_of_a_padding_token_stays(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 3, padding_idx=1), nn.Flatten(), nn.Linear(6, 2))
    start = copy.deepcopy(net)
    model = ElasticZO(net, tail=0).train()
    zo = ZOSGD(model, lr=0.1, weight_decay=0.1)
    log = TrajectoryLog(tmp_path / "log", zo)
    for _ in range(2):
        zo.step(pair_losses(smooth_loss, model(torch.tensor([[0, 1], [1, 4]]))))
    log.drain()
    assert torch.equal(net[0].weight[1], start[0].weight[1])
    assert not torch.equal(net[0].weight[0], start[0].weight[0])
    replay(tmp_path / "log", ElasticZO(start, tail=0))
    assert torch.equal(net[0].weight, start[0].weight)


def test_groups_have_their_own_rates() -> None:
    model, x = toy(tail=0)
    plain, _ = toy(tail=0)
    zo = ZOSGD(model, lr=0.1, groups=[{"params": [model.module.a.weight], "lr": 0.0}])
    other = ZOSGD(plain, lr=0.1)
    start = model.module.a.weight.clone()
    losses = pair_losses(smooth_loss, model(x))
    zo.step(losses)
    plain(x)
    other.step(losses)
    assert torch.equal(model.module.a.weight, start)
    assert torch.equal(model.module.c.weight, plain.module.c.weight)
    assert [g["lr"] for g in zo.param_groups] == [0.0, 0.1]


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
def test_schedulers_move_the_learning_rate(tensor_lr: bool) -> None:
    model, x = toy()
    lr = torch.tensor(1.0) if tensor_lr else 1.0
    zo = ZOSGD(model, lr=lr)
    tail = model.tail_optimizer(torch.optim.SGD, lr=1.0)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.5) for o in (zo, tail)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            before = model.module.a.weight.clone()
            losses = pair_losses(smooth_loss, model(x))
            model.backward(losses)
            tail.step()
            tail.zero_grad()
            zo.step(losses)
            g = zo.projected_gradient[0]
            expected = before - 0.5**step * g * z_of(step, 0, (4, 3))
            torch.testing.assert_close(model.module.a.weight, expected, rtol=1e-12, atol=1e-12)
            for schedule in schedules:
                schedule.step()
    assert float(tail.param_groups[0]["lr"]) == 0.125


def test_micro_batches_accumulate_to_the_whole_batch() -> None:
    weights = []
    for parts in (1, 3):
        model, x = toy()
        zo = ZOSGD(model, lr=0.1)
        tail = model.tail_optimizer(torch.optim.SGD, lr=0.1)
        for _ in range(2):
            total = torch.zeros(2, dtype=torch.float64)
            for part in x.chunk(parts):
                losses = pair_losses(lambda y: y.square().mean() + y.mean(), model(part)) / parts
                model.backward(losses)
                total += losses.detach()
            tail.step()
            tail.zero_grad()
            zo.step(total)
        weights.append(model.state_dict())
    for key in weights[0]:
        torch.testing.assert_close(weights[0][key], weights[1][key], rtol=1e-9, atol=1e-12)


TAILS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "adam": (torch.optim.Adam, {"lr": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.1, "momentum": 0.5}),
}


def small_resnet(**settings: Any) -> tuple[ElasticZO, Tensor, Tensor]:
    torch.manual_seed(2)
    model = ElasticZO(ResNet20(channels=1, classes=3), **{"tail": 1, **settings}).train()
    return model, torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", TAILS)
def test_losses_that_are_not_finite_change_nothing(name: str, bad: float) -> None:
    """A run with a bad step in it equals the run without, but for the step's number: weights,
    momentum and BatchNorm statistics are bit-identical, also when the very first step is bad."""
    cls, settings = TAILS[name]
    model, x, y = small_resnet()
    zo = ZOSGD(model, lr=1e-4)
    tail = model.tail_optimizer(cls, **settings)

    def step(poison: float | None) -> None:
        losses = pair_losses(F.cross_entropy, model(x), y)
        if poison is not None:
            losses = losses * torch.tensor([1.0, poison])
        model.backward(losses)
        tail.step()
        tail.zero_grad()
        zo.step(losses)

    for at in range(3):
        state, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(tail.state_dict())
        step(bad)
        for key, value in model.state_dict().items():
            assert torch.equal(value, state[key]), (at, key)
        # A first step that is skipped may create a momentum of zero, and nothing else.
        for p, entry in tail.state_dict()["state"].items():
            for k, v in entry.items():
                old = moments["state"].get(p, {}).get(k, torch.zeros_like(v))
                assert torch.equal(v, old), (at, p, k)
        step(None)
        assert any(not torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.warns(UserWarning, match="3 zeroth-order step"):
        assert zo.skipped == 3
    assert model.step_index == 6


def test_a_plain_backward_and_a_plain_optimizer_work() -> None:
    model, x = toy()
    reference, _ = toy()
    zo, zo_ref = ZOSGD(model, lr=0.1), ZOSGD(reference, lr=0.1)
    plain = torch.optim.SGD(model.tail_parameters(), lr=0.1)
    gated = reference.tail_optimizer(torch.optim.SGD, lr=0.1)
    for _ in range(2):
        losses = pair_losses(smooth_loss, model(x))
        losses.mean().backward()
        plain.step()
        plain.zero_grad()
        zo.step(losses)
        losses = pair_losses(smooth_loss, reference(x))
        reference.backward(losses)
        gated.step()
        gated.zero_grad()
        zo_ref.step(losses)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[key], rtol=1e-12, atol=0)


@pytest.mark.parametrize("source", ["plus", "minus", "mean", "clean"])
def test_where_the_tail_gradient_comes_from(source: str) -> None:
    model, x = toy(eps=0.1)
    a, c = model.module.a.weight, model.module.c.weight
    z = z_of(0, 0, (4, 3))
    losses = pair_losses(smooth_loss, model(x))
    if source == "clean":
        model.backward(losses, pair_losses(smooth_loss, model.clean_forward(x)).mean())
    else:
        model.backward(losses, source=source)
    got = c.grad
    signs = {"plus": [0.1], "minus": [-0.1], "mean": [0.1, -0.1], "clean": [0.0]}[source]
    leaf = c.detach().clone().requires_grad_()
    parts = [smooth_loss(torch.tanh(x @ (a + s * z).t()) @ leaf.t()) for s in signs]
    (torch.stack(parts).mean()).backward()
    torch.testing.assert_close(got, leaf.grad, rtol=1e-10, atol=1e-12)


def test_a_clean_loss_that_is_not_finite_skips_head_and_tail() -> None:
    model, x = toy(eps=0.1)
    zo, sgd = ZOSGD(model, lr=0.1), model.tail_optimizer(torch.optim.SGD, lr=0.1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    losses = pair_losses(smooth_loss, model(x))
    clean = pair_losses(smooth_loss, model.clean_forward(x))[0]
    model.backward(losses, clean * float("nan"))
    sgd.step()
    zo.step(losses)
    assert zo.skipped == 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_full_bp_is_one_pass_and_the_same_loop() -> None:
    torch.manual_seed(0)
    net = LeNet5()
    twin = copy.deepcopy(net)
    model = ElasticZO(net, tail="all").train()
    zo, sgd = ZOSGD(model, lr=0.1), model.tail_optimizer(torch.optim.SGD, lr=0.1)
    other = torch.optim.SGD(twin.parameters(), lr=0.1)
    x, y = torch.randn(4, 1, 28, 28), torch.arange(4)
    for _ in range(2):
        out = model(x)
        assert out.shape == (1, 4, 10)
        losses = pair_losses(F.cross_entropy, out, y)
        model.backward(losses)
        sgd.step()
        sgd.zero_grad()
        zo.step(losses)
        F.cross_entropy(twin(x), y).backward()
        other.step()
        other.zero_grad()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_a_run_continues_from_its_state_bit_for_bit() -> None:
    def run(steps: int, resume_at: int | None) -> dict[str, Tensor]:
        model, x, y = small_resnet()
        zo = ZOSGD(model, lr=1e-3)
        tail = model.tail_optimizer(torch.optim.Adam, lr=1e-2)
        for i in range(steps):
            if i == resume_at:
                saved = copy.deepcopy((model.state_dict(), zo.state_dict(), tail.state_dict()))
                model, x, y = small_resnet(seed=99)
                zo = ZOSGD(model, lr=1.0)
                tail = model.tail_optimizer(torch.optim.Adam, lr=1.0)
                model.load_state_dict(saved[0])
                zo.load_state_dict(saved[1])
                tail.load_state_dict(saved[2])
            losses = pair_losses(F.cross_entropy, model(x), y)
            model.backward(losses)
            tail.step()
            tail.zero_grad()
            zo.step(losses)
        return model.state_dict()

    whole, resumed = run(4, None), run(4, 2)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_backends_give_the_same_step(backend: str) -> None:
    pytest.importorskip("triton")
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("its kernels run on the device: test_paths.py")
    states = []
    for name in (backend, "numba"):
        model, x = toy(torch.float32, backend=name, queries=2)
        assert model.backend == name
        zo = ZOSGD(model, lr=0.1)
        for _ in range(2):
            zo.step(pair_losses(smooth_loss, model(x)))
        states.append(model.module.a.weight.detach().clone())
    # g amplifies the rounding of the losses (4 ulps of a loss below 8) by 1 / (2 eps).
    budget = 2 * 0.1 * 4.5 * (4 * 8 * 2**-24) / 2e-3
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=budget)
