"""What a step on the CPU does not make: sums of a whole layer where a maximum follows, patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elasticzo.int8 import ElasticZOInt8, Int8ZO
from elasticzo.memory.scratch import allocations
from elasticzo.models.points import MaxPoints
from tests.elasticzo.int8.nets import batch, fixed_weights, lenet

pytest.importorskip("numba")
B, POINTS, CHANNELS = 3, 300, 48


def points(tail: Any, **settings: Any) -> ElasticZOInt8:
    net = nn.Sequential(
        nn.Conv1d(3, CHANNELS, 1, bias=False), nn.ReLU(), MaxPoints(),
        nn.Linear(CHANNELS, 4, bias=False),
    )  # fmt: skip
    return ElasticZOInt8(fixed_weights(net), tail, r_max=9, **settings)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_points_meet_their_maximum_in_cache(training: bool) -> None:
    model = points(1, backend="numba").train(training)
    x, _ = batch((B, 3, POINTS), 4)
    model(x)
    largest = max(allocations(lambda: model(x)))
    assert largest < B * CHANNELS * POINTS  # bytes; the sums would be 4 or 8 times as many


def test_points_are_the_same_either_way() -> None:
    """With the maxima's places kept for a backward, and without; no noise in either."""
    x, _ = batch((B, 3, POINTS), 4)
    kept, lean = points("all", backend="numba"), points(0, backend="numba").eval()
    assert torch.equal(kept(x).q[0], lean(x).q)
    assert list(kept._tapes[0].kept) == ["0", "3"] and not lean._tapes


def step_of(model: ElasticZOInt8, x: Any, y: Tensor) -> Any:
    zo, bp = Int8ZO(model, b_zo=1), model.tail_optimizer(b_bp=3)

    def step() -> None:
        logits = model(x)
        losses = model.losses(logits, y)
        model.backward(logits, y)
        bp.step()
        zo.step(losses)

    return step


def test_full_backpropagation_makes_no_patches() -> None:
    """LeNet-5: patches of the first convolution alone are 25 bytes a pixel; the largest thing is
    what its maxima leave, 4 bytes for each."""
    model = lenet(tail="all", backend="numba")
    x, y = batch((32, 1, 28, 28), 10)
    step = step_of(model, x, y)
    step()
    assert max(allocations(step)) <= 4 * max(32 * 6 * 14 * 14, 120 * 784)


def test_a_tape_holds_bytes() -> None:
    model = lenet(tail="all", backend="numba")
    x, _ = batch((4, 1, 28, 28), 10)
    model(x)
    kept = model._tapes[0].kept
    assert [len(own.places) for own in kept.values()] == [1, 1, 0, 0, 0]
    for own in kept.values():
        assert {t.dtype for t in (own.x.q, own.out)} == {torch.int8}
        assert all(t.dtype == torch.uint8 and int(t.max()) <= 3 for t in own.places)
