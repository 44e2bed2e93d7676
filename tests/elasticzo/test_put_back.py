"""What a call that fails, or only looks, leaves behind: nothing."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo import ZOSGD, ElasticZO, pair_losses

X, Y = torch.linspace(-1, 1, 20).view(5, 4), torch.tensor([0, 1, 2, 0, 1])


class Stops(nn.Module):
    """Raises when it is told to."""

    error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return x


def wrapped(pairing: str) -> tuple[ElasticZO, Stops]:
    torch.manual_seed(0)
    stops = Stops()
    layers = nn.Linear(4, 8), nn.BatchNorm1d(8), stops, nn.Linear(8, 3), nn.BatchNorm1d(3)
    return ElasticZO(nn.Sequential(*layers), tail=["4"], eps=1e-2, pairing=pairing).train(), stops


def buffers(model: ElasticZO) -> list[Tensor]:
    return [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("when", ["first", "later", "second micro-batch", "clean"])
@pytest.mark.parametrize("pairing", ["stacked", "sequential"])
def test_a_forward_that_raises_moves_no_statistics(
    pairing: str, when: str, error: BaseException
) -> None:
    model, stops = wrapped(pairing)
    twin, _ = wrapped(pairing)
    zo, other = ZOSGD(model, lr=0.1), ZOSGD(twin, lr=0.1)
    if when != "first":
        for m, o in ((model, zo), (twin, other)):
            o.step(pair_losses(F.cross_entropy, m(X), Y))
    if when == "second micro-batch":
        first = [pair_losses(F.cross_entropy, m(X), Y) for m in (model, twin)]
    before = buffers(model)
    stops.error = error
    with pytest.raises(type(error)):
        (model.clean_forward if when == "clean" else model)(2 * X)
    stops.error = None
    assert all(map(torch.equal, before, buffers(model)))
    losses = [pair_losses(F.cross_entropy, m(X), Y) for m in (model, twin)]
    if when == "second micro-batch":
        losses = [(a + b) / 2 for a, b in zip(first, losses, strict=True)]
    zo.step(losses[0])
    other.step(losses[1])
    assert all(map(torch.equal, buffers(model), buffers(twin)))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


class Fills(nn.Module):
    """Puts one value in the last place of every row, as masks do; `odd`: another one if stacked."""

    def __init__(self, value: float, odd: float | None = None) -> None:
        super().__init__()
        self.value, self.odd = value, odd

    def forward(self, x: Tensor) -> Tensor:
        stacked = len(x) > len(X) and self.odd is not None
        last = torch.full_like(x[:, -1:], self.odd if stacked else self.value)  # type: ignore[arg-type]
        return torch.cat([x[:, :-1], last], 1)


def checked(fills: Fills, end: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(4, 8), fills, end, nn.Linear(8, 3))
    ElasticZO(net, tail=1).train().check(X)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_check_takes_equal_infinities_for_equal(value: float) -> None:
    checked(Fills(value), nn.Softmax(1))


@pytest.mark.parametrize(
    ("value", "odd"), [(float("inf"), -float("inf")), (float("inf"), 1e30), (1.0, float("nan"))]
)
def test_check_tells_infinities_apart(value: float, odd: float) -> None:
    with pytest.raises(ValueError, match=r"module '1' .* gives other outputs"):
        checked(Fills(value, odd), nn.Identity())


def test_check_sees_past_an_infinity() -> None:
    class Shifts(Fills):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (0.5 if len(x) > len(X) else 0.0)

    with pytest.raises(ValueError, match=r"module '1' .* gives other outputs"):
        checked(Shifts(float("inf")), nn.Identity())


def test_readers_of_attributes_are_not_refused() -> None:
    model, _ = wrapped("stacked")
    assert dict(inspect.getmembers(model))["effective_pairing"] == "stacked"
    plain, x = model.eval().module, torch.randn(2, 4)
    assert torch.equal(torch.jit.trace(model, x)(x), plain(x))  # type: ignore[no-untyped-call]
