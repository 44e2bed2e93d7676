"""A step against an independent model of it in Python integers and float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo.int8 import ElasticZOInt8, Int8Tensor, Int8ZO
from tests.elasticzo.int8.nets import (
    batch,
    digest,
    fixed_weights,
    lenet,
    point_net,
    small_net,
    train,
)
from zo_kernels.reference import sample


def bits(t: Tensor) -> int:
    return max(int(t.abs().max()) - 1, 0).bit_length()


def requantized(acc: Tensor, exponent: int) -> tuple[Tensor, int]:
    """To nearest, half away from zero; one exponent."""
    s = max(bits(acc) - 7, 0)
    q = acc.sign() * ((acc.abs() + (2**s >> 1)) >> s)
    return q.clamp(-127, 127), exponent + s


def forward_model(model: ElasticZOInt8, x: Int8Tensor, half: int | None) -> tuple[Tensor, int]:
    """The small net (or the points' net) on one half, float64 products of integers."""
    q, e = x.q.long(), int(x.exponent)
    for block in model.network.blocks:
        w = block.layer.weight.long()
        name = f"{block.name}.weight"
        if half is not None and name in dict(model.named_head_parameters()):
            noise = model.noise_of(name)
            z = sample(
                w.shape,
                model.session.key,
                tensor=block.layer.tensor,
                query=half // 2,
                noise="sparse_int8",
                p_zero=noise.p_zero,
                r_max=noise.r_max,
            ).long()
            w = (w + (z if half % 2 == 0 else -z)).clamp(-127, 127)
        convolution = {2: F.linear, 3: F.conv1d, 4: F.conv2d}[w.ndim]
        padding = {"padding": block.layer.padding} if w.ndim == 4 else {}
        acc = convolution(q.double(), w.double(), **padding).long()
        if block.relu:
            acc = acc.clamp_min(0)
        for pool in block.pools:
            acc = acc.amax(-1) if pool.window is None else F.max_pool2d(acc.double(), 2).long()
        q, e = requantized(acc, e + int(block.layer.exponent))
        q = q.flatten(1) if block.flatten else q
    return q, e


NETS: list[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = [
    ("images", small_net, (3, 1, 8, 8)),
    ("points", point_net, (3, 3, 5)),
]


@pytest.mark.parametrize(("name", "net", "shape"), NETS, ids=[n for n, *_ in NETS])
@pytest.mark.parametrize("queries", [1, 2])
def test_forward_of_the_halves(
    name: str, net: Any, shape: tuple[int, ...], queries: int, backend: str
) -> None:
    model = ElasticZOInt8(
        fixed_weights(net()), tail=1, r_max=9, p_zero=0.3, queries=queries, backend=backend
    )
    x, _ = batch(shape, 4)
    logits = model(x)
    assert logits.shape == (2 * queries, shape[0], 4) and logits.exponent.shape == (2 * queries,)
    for half in range(2 * queries):
        q, e = forward_model(model, x, half)
        assert torch.equal(logits.q[half].long(), q) and int(logits.exponent[half]) == e
    model.eval()
    q, e = forward_model(model, x, None)
    out = model(x)
    assert torch.equal(out.q.long(), q) and int(out.exponent) == e and out.exponent.ndim == 0


def test_the_direction_is_what_kernels_make(backend: str) -> None:
    """`weights` and `sum` of the direction against the forward's weights and the update."""
    model = ElasticZOInt8(
        fixed_weights(small_net()), tail=1, r_max=9, p_zero=0.3, queries=2, scale={"0.*": 0.5}
    )
    direction, points, key = model.direction, model.estimator.points, model.session.key.clone()
    signs = torch.tensor([1, -1], dtype=torch.int32)
    moved = {}
    for head, w in model.head:
        at = (head, w, key)
        for query in range(2):
            one = (torch.arange(2) == query).to(torch.int32)
            z = direction.sum(*at, one, backend)
            halves = direction.weights(*at, None, points, None, backend)
            for half, sign in ((2 * query, 1), (2 * query + 1, -1)):
                assert torch.equal(halves[half].int(), (w.int() + sign * z).clamp(-127, 127))
        moved[head.name] = (w.int() - direction.sum(*at, signs, backend)).clamp(-127, 127)
    Int8ZO(model, b_zo=31).update_by(signs)
    for name, w in model.named_head_parameters():
        assert torch.equal(w.int(), moved[name])


@pytest.mark.parametrize("loss", ["integer", "float"])
def test_update_of_the_head(loss: str) -> None:
    model = ElasticZOInt8(small_net(), tail=1, r_max=9, p_zero=0.3, queries=3, loss=loss)
    before = {name: w.clone() for name, w in model.named_head_parameters()}
    x, y = batch((6, 1, 8, 8), 4)
    zo = Int8ZO(model, b_zo=3)
    losses = model.losses(model(x), y)
    assert losses.shape == (6,) and losses.is_floating_point() == (loss == "float")
    signs = [int(losses[2 * q] > losses[2 * q + 1]) - int(losses[2 * q] < losses[2 * q + 1])
             for q in range(3)]  # fmt: skip
    zo.step(losses)
    assert zo.signs.tolist() == signs and model.step_index == 1
    key = torch.tensor([0, 0])
    shift = (3 * 9 - 1).bit_length() - 3
    for tensor, (name, w) in enumerate(model.named_head_parameters()):
        total = sum(
            g * sample(w.shape, key, tensor=tensor, query=q, noise="sparse_int8", p_zero=0.3,
                       r_max=9).long()
            for q, g in enumerate(signs)
        )  # fmt: skip
        move = total.sign() * ((total.abs() + (2**shift >> 1)) >> shift)
        assert torch.equal(w.long(), (before[name].long() - move).clamp(-127, 127))


def test_scale_thins_a_layer_out() -> None:
    model = ElasticZOInt8(
        lenet_net(), tail=1, r_max=9, p_zero=0.5, scale={"fc*": 0.1, "fc2.*": 0.0, "conv2.*": 9.0}
    )
    before = {name: w.clone() for name, w in model.named_head_parameters()}
    x, _ = batch((2, 1, 28, 28), 10)
    model(x)
    Int8ZO(model, b_zo=8).step(torch.tensor([2, 1]))
    moved = {n: float((w != before[n]).double().mean()) for n, w in model.named_head_parameters()}
    assert moved["fc2.weight"] == 0.0
    n = before["fc1.weight"].numel()
    expected = 0.05 * 18 / 19  # a drawn 0 of 19 values moves nothing
    assert abs(moved["fc1.weight"] - expected) < 5 * (expected / n) ** 0.5
    assert moved["conv2.weight"] > 0.9


def lenet_net() -> nn.Module:
    from elasticzo.models import LeNet5

    return fixed_weights(LeNet5())


@pytest.mark.parametrize("source", ["plus", "mean"])
@pytest.mark.parametrize("tail", [0, 1, 2])
def test_sequential_is_stacked(tail: int, source: str) -> None:
    batches = [batch((4, 1, 8, 8), 4, i) for i in range(4)]
    found = set()
    for pairing in ("stacked", "sequential"):
        model = ElasticZOInt8(
            fixed_weights(small_net()), tail=tail, r_max=9, queries=2, pairing=pairing
        )
        if tail == 0:
            zo = Int8ZO(model, b_zo=3)
            for x, y in batches:
                zo.step(model.losses(model(x), y))
        else:
            train(model, batches, source)
        found.add(digest(model))
    assert len(found) == 1


# From a run of the reference; every backend and pairing must end here.
SMALL = {"1": "e290ddfc4179049f", "all": "b1da1ef15f7e4623"}
LENET = "df8b37b2261c92d5"


@pytest.mark.parametrize("tail", [1, "all"], ids=["cls2", "full-bp"])
def test_digest_of_a_small_run(tail: Any, backend: str) -> None:
    """Weights after four steps, Triton's interpreter among the backends."""
    model = ElasticZOInt8(
        fixed_weights(small_net()), tail=tail, r_max=9, p_zero=0.3, seed=5, backend=backend
    )
    train(model, [batch((4, 1, 8, 8), 4, i) for i in range(4)], "mean")
    assert digest(model) == SMALL[str(tail)]


@pytest.mark.parametrize("settings", [
    {"backend": "reference"}, {"backend": "numba"}, {"backend": "numba", "pairing": "sequential"},
], ids=["reference", "numba", "sequential"])  # fmt: skip
def test_digest_of_lenet(settings: dict[str, Any]) -> None:
    """200 steps of ZO-Feat-Cls1."""
    pytest.importorskip("numba")
    model = lenet(tail=2, **settings)
    batches = [batch((1, 1, 28, 28), 10, i) for i in range(4)]
    train(model, batches * 50)
    assert digest(model) == LENET


def test_noise_goes_on_with_the_step() -> None:
    model = lenet(tail=1)
    x, _y = batch((2, 1, 28, 28), 10)
    first, again = model(x), model(x)
    assert torch.equal(first.q, again.q)  # the same z until a step
    zo = Int8ZO(model, b_zo=0)
    zo.step(torch.zeros(2, dtype=torch.int64))  # a sign of 0 moves nothing
    assert zo.signs.tolist() == [0]
    assert not torch.equal(model(x).q, first.q)


@pytest.mark.parametrize(
    ("tail", "steps"), [(0, 300), (1, 60), ("all", 30)], ids=["full-zo", "cls2", "full-bp"]
)
def test_learns(tail: Any, steps: int) -> None:
    """The loss of one batch, noisy copies of one image a class, falls under each method."""
    patterns, y = batch((4, 1, 8, 8), 4)[0].q, torch.arange(12) % 4
    noise = batch((12, 1, 8, 8), 4, 1)[0].q // 4
    x = Int8Tensor((patterns[y] // 2 + noise).to(torch.int8), torch.tensor(-6, dtype=torch.int32))
    model = ElasticZOInt8(small_net(), tail=tail, r_max=31, p_zero=0.5)
    zo, bp = Int8ZO(model, b_zo=1), model.tail_optimizer(b_bp=3)
    history = []
    for _ in range(steps):
        logits = model(x)
        losses = model.losses(logits, y)
        history.append(float(losses.double().mean()))
        if tail:
            model.backward(logits, y)
            bp.step()
        zo.step(losses)
    assert sum(history[-5:]) < 0.8 * sum(history[:5])
