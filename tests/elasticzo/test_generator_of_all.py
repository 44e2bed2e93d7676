"""torch's generator is one for all threads: what others draw from it is neither taken for the
model's own draws, nor rewound."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, ZOAdam, capture_step, pair_losses
from elasticzo.feedback import Feedback


class Meanwhile(nn.Module):
    """While it runs, another thread does something."""

    def __init__(self, other: Callable[[], Any] = lambda: torch.rand(3)) -> None:
        super().__init__()
        self.other: Callable[[], Any] | None = other

    def forward(self, x: Tensor) -> Tensor:
        if self.other is not None:
            ask(self.other)
        return x


JOBS: list[Callable[[], Any]] = []
WAKE, DONE = threading.Semaphore(0), threading.Semaphore(0)


def ask(job: Callable[[], Any]) -> None:
    """Have the other thread do it, and wait."""
    JOBS.append(job)
    WAKE.release()
    DONE.acquire()


@contextmanager
def beside() -> Iterator[None]:
    """A second thread, which does what it is asked to."""

    def work() -> None:
        while WAKE.acquire() and (job := JOBS.pop()) is not None:
            job()
            DONE.release()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        JOBS.append(None)  # type: ignore[arg-type]
        WAKE.release()
        thread.join()


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


def net(*others: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *others, nn.Tanh(), nn.Linear(8, 3))


X, Y = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)), torch.arange(5) % 3


def trained(model: ElasticZO, steps: int = 4) -> list[Tensor]:
    zo = ZOSGD(model, lr=1e-2)
    for _ in range(steps):
        zo.step(pair_losses(F.cross_entropy, model.train()(X), Y))
    return [p.detach() for p in model.parameters()]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("first", [True, False], ids=["from the start", "later"])
@pytest.mark.parametrize("pairing", ["stacked", "sequential"])
def test_a_thread_that_draws_is_not_the_model(pairing: str, first: bool) -> None:
    alone = trained(ElasticZO(net(nn.Identity()), tail=0, pairing=pairing))
    draws: list[Tensor] = []
    meanwhile = Meanwhile(lambda: draws.append(torch.rand(2)))
    model = ElasticZO(net(meanwhile), tail=0, pairing=pairing)
    other, torch_state = meanwhile.other, torch.get_rng_state()
    if not first:
        meanwhile.other = None
    zo = ZOSGD(model, lr=1e-2)
    with beside():
        for _ in range(4):
            zo.step(pair_losses(F.cross_entropy, model.train()(X), Y))
            meanwhile.other = other
    assert model.effective_pairing == pairing
    for a, b in zip(alone, model.parameters(), strict=True):
        assert torch.equal(a, b)
    torch.set_rng_state(torch_state)  # all numbers came, in their order
    assert len(draws) >= 3 and all(torch.equal(d, torch.rand(2)) for d in draws)


def test_statistics_move_once_where_a_forward_runs_again() -> None:
    alone = ElasticZO(net(nn.Identity(), nn.BatchNorm1d(8)), tail=0)
    meanwhile = Meanwhile()
    model = ElasticZO(net(meanwhile, nn.BatchNorm1d(8)), tail=0)
    other, meanwhile.other = meanwhile.other, None
    with beside():
        for m in (alone, model):
            m.train()(X)
            meanwhile.other = other if m is model else None
            m(2 * X)  # the second micro-batch
            m(X)
    for a, b in zip(alone.buffers(), model.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:the model draws")
@pytest.mark.parametrize("pairing", ["stacked", "sequential"])
def test_a_model_that_draws_beside_a_thread_that_does_not(pairing: str) -> None:
    models = [ElasticZO(net(Noise()), tail=0, eps=1e-6, pairing=pairing) for _ in range(2)]
    for model in models:
        model.train()(X)  # the first forward may begin again
    torch.manual_seed(5)
    alone = trained(models[0])
    with beside():
        torch.manual_seed(5)
        here = trained(models[1])
        out = ElasticZO(net(Noise()), tail=0, eps=1e-6, pairing=pairing).train()(X)
    assert [m.effective_pairing for m in models] == ["sequential"] * 2
    assert all(map(torch.equal, alone, here))
    torch.testing.assert_close(out[0], out[1], rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:the model draws")
@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("pairing", ["stacked", "sequential"])
def test_both_draw(pairing: str, place: str) -> None:
    """Refused: neither may the halves differ, nor the thread's numbers come again."""
    draws: list[Tensor] = []
    meanwhile = Meanwhile(lambda: draws.append(torch.rand(2)))
    order = (meanwhile, Noise()) if place == "before" else (Noise(), meanwhile)
    model = ElasticZO(net(*order, nn.BatchNorm1d(8)), tail=0, pairing=pairing).train()
    buffers = [b.clone() for b in model.buffers()]
    with beside(), pytest.raises(RuntimeError, match="another thread drew from it meanwhile"):
        model(X)
    assert len({tuple(d.tolist()) for d in draws}) == len(draws)
    for a, b in zip(buffers, model.buffers(), strict=True):
        assert torch.equal(a, b)
    meanwhile.other = None
    with beside():  # one that does not draw
        out = model(X)
    assert torch.isfinite(out).all()


def test_attention_without_dropout_draws_nothing() -> None:
    """Its operator may draw, and does not."""
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
    model = ElasticZO(net(nn.Unflatten(1, (2, 4)), nn.Flatten(), Meanwhile()), tail=0)
    encoder = ElasticZO(nn.Sequential(layer, Meanwhile(), nn.Linear(8, 3)), tail=1).train()
    with beside():
        model.train()(X)
        encoder(torch.randn(3, 4, 8))
    assert encoder.effective_pairing == model.effective_pairing == "stacked"


def test_learnt_feedback() -> None:
    """Its second pass repeats what the model drew, and only that."""
    model = ElasticZO(net(Noise()), tail=1, directions=Feedback()).train()
    zo = ZOSGD(model, lr=1e-2)
    with beside():
        losses = pair_losses(F.cross_entropy, model(X), Y)
        model.backward(losses)
        ask(lambda: torch.rand(3))
        state = torch.get_rng_state()
        zo.step(losses)
        assert torch.equal(torch.get_rng_state(), state)
    meanwhile = Meanwhile()
    model = ElasticZO(net(meanwhile), tail=1, directions=Feedback()).train()
    zo = ZOSGD(model, lr=1e-2)
    with beside():
        losses = pair_losses(F.cross_entropy, model(X), Y)
        assert model.session.kept[0].generator is None
        model.backward(losses)
        zo.step(losses)


def test_a_captured_step() -> None:
    meanwhile = Meanwhile()
    model = ElasticZO(net(meanwhile), tail=0).train()
    with beside():
        step = capture_step(ZOSGD(model, lr=torch.tensor(1e-2)), F.cross_entropy, X, Y)
        assert torch.isfinite(step(X, Y)).all()


def test_check_and_settle_leave_a_thread_its_numbers() -> None:
    draws: list[Tensor] = []
    model = ElasticZO(net(Meanwhile(lambda: draws.append(torch.rand(2)))), tail=0).train()
    with beside():
        model.settle(X)
        model.check(X)
        model(X)
    assert len({tuple(d.tolist()) for d in draws}) == len(draws) > 3


def test_learnt_feedback_has_the_bits_that_it_has_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look at draws is not to look at kernels, which run as ever."""
    found = []
    for alone in (True, False):
        monkeypatch.setattr("elasticzo.forward.evaluator.alone", lambda alone=alone: alone)
        torch.manual_seed(0)
        wide = nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 200), nn.Linear(200, 3))
        model = ElasticZO(wide, tail=1, directions=Feedback()).train()
        zo = ZOAdam(model, lr=1e-2)
        for _ in range(3):
            losses = pair_losses(F.cross_entropy, model(X), Y)
            model.backward(losses)
            zo.step(losses)
        found.append([p.clone() for p in model.head_parameters()])
    assert all(map(torch.equal, *found))
