"""State, inputs and forms of weights: each half starts from the same."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from elasticzo import ElasticZO
from tests.elasticzo._halves import PAIRINGS, B, D, check, explicit

# ---- state in attributes


class Carries(nn.Module):
    """A hidden state that the next forward starts from."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.o, self.h = nn.Linear(2 * D, D), nn.Linear(D, 3), None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x) if self.h is None else self.h
        self.h = torch.tanh(self.cell(torch.cat([x, h], 1))).detach()
        return self.o(self.h)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.calls, self.seen = nn.Linear(D, D), nn.Linear(D, 3), 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        return self.o(self.a(x) * self.calls)


class Keeps(nn.Module):
    """Something to look at, which nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.last = nn.Linear(D, D), nn.Linear(D, 3), None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.a(x)
        return self.o(self.last)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_each_half_starts_from_the_same_state(pairing: str) -> None:
    torch.manual_seed(0)
    x, net, calls = torch.randn(B, D).double(), Carries().double(), Counts().double()
    warns = pytest.warns(UserWarning, match=r"keeps state in h, which its next forward reads")
    model = ElasticZO(net, tail=0, eps=0.05, seed=3, pairing=pairing).train()
    with warns if pairing == "stacked" else nullcontext():
        model(x)
    for _ in range(2):
        start = copy.deepcopy(net)
        torch.testing.assert_close(model(x), explicit(model, start, x))
    assert net.h.shape == (B, D) and model.effective_pairing == "sequential"
    model = ElasticZO(calls, tail=0, eps=0.05, seed=3, pairing=pairing).train()
    for n in range(1, 4):
        start = copy.deepcopy(calls)
        torch.testing.assert_close(model(x), explicit(model, start, x))
        assert calls.calls == n and calls.seen == list(range(1, n + 1))
    assert model.effective_pairing == pairing
    model.check(x)
    model.settle(x)
    model.clean_forward(x)
    assert calls.calls == 3


def test_what_nothing_reads_does_not_matter() -> None:
    model = check(Keeps(), torch.randn(B, D).double())
    assert model.effective_pairing == "stacked" and model.module.last.shape == (2 * B, D)


def test_learnt_feedback_refuses_state() -> None:
    model = ElasticZO(Counts(), tail=1, directions="feedback").train()
    with pytest.raises(
        ValueError, match=r"runs the model twice a step, but it keeps state in calls"
    ):
        model(torch.randn(B, D))
    assert model.module.calls == 0


def test_learnt_feedback_refuses_draws_on_the_host() -> None:
    model = ElasticZO(Depth(lambda: random.random()), tail=1, directions="feedback").train()
    with pytest.raises(ValueError, match="it draws from the generators of Python or numpy"):
        model(torch.randn(B, D))


def test_a_generator_of_ones_own_is_put_back() -> None:
    class Noisy(Keeps):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.a(x) + torch.rand(x.shape, generator=self.generator).to(x))

    torch.manual_seed(0)
    net, x = Noisy().double(), torch.randn(B, D).double()
    model = ElasticZO(net, tail=0, eps=1e-9, pairing="sequential").train()
    for _ in range(2):
        y = model(x)
        torch.testing.assert_close(y[0], y[1], rtol=0.0, atol=1e-6)


class Depth(nn.Module):
    """Stochastic depth by a generator that is not torch's."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.a, self.b, self.o, self.draw = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3), draw

    def forward(self, x: Tensor) -> Tensor:
        h, share = self.a(x), self.draw()
        return self.o(h + share * self.b(h))


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize(
    "draw", [lambda: random.random(), lambda: float(np.random.random())], ids=["python", "numpy"]
)
def test_draws_on_the_host_are_the_same_in_each_half(draw: Any, pairing: str) -> None:
    torch.manual_seed(0)
    x, start = torch.randn(B, D).double(), Depth(draw).double()
    model = ElasticZO(copy.deepcopy(start), tail=0, eps=0.05, seed=3, pairing=pairing).train()
    for _ in range(3):
        random.seed(7)
        np.random.seed(7)
        y = model(x)
        after = draw()
        random.seed(7)
        np.random.seed(7)
        share = draw()
        start.draw = lambda share=share: share
        torch.testing.assert_close(y, explicit(model, start, x))
        assert after == draw()  # and drawn once


# ---- weights and inputs


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_a_parametrisation_that_jumps_is_refused(pairing: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(B, D).double()

    def net(**settings: Any) -> nn.Module:
        layer = nn.Linear(D, 4).double()
        return nn.Sequential(
            parametrizations.orthogonal(layer, **settings), nn.Linear(4, 3).double()
        )

    for given in ({}, {"orthogonal_map": "householder"}):
        model = ElasticZO(net(**given), tail=1, eps=1e-3, pairing=pairing).train()
        with pytest.raises(
            ValueError, match=r"parametrisation of '0.weight' \(_Orthogonal\) jumps"
        ):
            model(x)
    for given in ({"orthogonal_map": "cayley"}, {"orthogonal_map": "matrix_exp"}):
        ElasticZO(net(**given), tail=1, eps=0.1, pairing=pairing).train()(x)
    for form in (parametrizations.weight_norm, parametrizations.spectral_norm):
        form(layer := nn.Linear(D, 4).double())
        ElasticZO(nn.Sequential(layer, nn.Linear(4, 3).double()), tail=1, eps=0.3).train()(x)


def test_a_weight_whose_elements_share_memory_is_refused() -> None:
    for w in (torch.randn(1, D).expand(D, D), torch.randn(2 * D).as_strided((D, D), (1, 1))):
        net = nn.Sequential(nn.Linear(D, D), nn.Linear(D, 3))
        net[0].weight = nn.Parameter(w)
        with pytest.raises(ValueError, match=r"elements of head parameter '0.weight' share memory"):
            ElasticZO(net, tail=1)
    for w in (torch.randn(D, D).t(), torch.randn(D, 2 * D)[:, ::2], torch.randn(1, D)[:, :D]):
        net[0].weight = nn.Parameter(w)
        ElasticZO(net, tail=1).unwrap()


class Writes(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.how = nn.Conv1d(2, 3, 3), how

    def forward(self, x: Tensor) -> Tensor:
        (x.data if self.how == "data" else x).mul_(2)
        return self.conv(x)


@pytest.mark.parametrize("how", ["data", "itself"])
def test_a_model_that_writes_to_its_input(how: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(B, 2, 5).double()
    start, before = Writes(how).double(), x.clone()
    model = ElasticZO(copy.deepcopy(start), tail=0, eps=0.05, seed=3).train()
    for _ in range(2):
        torch.testing.assert_close(model(x), explicit(model, start.conv, 2 * x, prefix="conv."))
        assert torch.equal(x, before)
    model = ElasticZO(start, tail=0, pairing="sequential").train()
    with pytest.raises(ValueError, match="writes its input in place"):
        model(x)


def test_check_takes_what_is_infinite_everywhere() -> None:
    class Mask(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            x[..., -1] = self.value
            return x

    class Drop(Mask):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x.mean(0) > 0, self.value)

    for value in (float("-inf"), float("inf"), float("nan")):
        net = nn.Sequential(nn.Linear(D, D), Mask(value), nn.Softmax(-1), nn.Linear(D, 3))
        ElasticZO(net, tail=1).train().check(torch.randn(B, D))
    net = nn.Sequential(nn.Linear(D, D), Drop(float("-inf")), nn.Softmax(-1), nn.Linear(D, 3))
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"module '1' \(Drop\) gives other outputs"):
        ElasticZO(net, tail=1).train().check(torch.randn(64, D))
