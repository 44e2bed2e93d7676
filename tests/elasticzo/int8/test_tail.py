"""The integer backward against float64's autograd on the same integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elasticzo.int8 import ElasticZOInt8, Int8Tensor, Int8ZO
from elasticzo.int8.backward import aligned_sum, input_error, weight_gradient
from elasticzo.int8.layers import Int8Layer, Pool
from tests.elasticzo.int8.nets import batch, fixed_weights, point_net, small_net
from zo_kernels import int8_range, integer_softmax_error

CONVS: list[dict[str, Any]] = [
    {},
    {"padding": (1, 1)},
    {"stride": (2, 2)},
    {"stride": (2, 3), "padding": (2, 0), "dilation": (1, 2)},
    {"dilation": (2, 2), "padding": (2, 2)},
]


def ints(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def layer_of(w: Tensor, **settings: Any) -> Int8Layer:
    return Int8Layer(Int8Tensor(w, torch.tensor(-7, dtype=torch.int32)), 0, **settings)


@pytest.mark.parametrize("settings", CONVS, ids=[str(c) for c in CONVS])
@pytest.mark.parametrize("size", [(9, 11), (8, 10)], ids=["odd", "even"])
def test_convolution(settings: dict[str, Any], size: tuple[int, int], backend: str) -> None:
    w, x = ints(4, 3, 3, 2), ints(2, 3, *size)
    layer = layer_of(w, **settings)
    wd, xd = w.double().requires_grad_(), x.double().requires_grad_()
    y = F.conv2d(xd, wd, **settings)
    error = ints(*y.shape)
    y.backward(error.double())
    (g,) = weight_gradient(layer, error, x, backend)
    assert torch.equal(g.double(), wd.grad)
    acc, bits = input_error(layer, error, x, backend)
    assert torch.equal(acc.double(), xd.grad)
    assert torch.equal(bits, int8_range(acc))


def test_convolution_in_one_dimension() -> None:
    w, x = ints(4, 3, 3), ints(2, 3, 9)
    layer = layer_of(w, stride=(1, 2), padding=(0, 1))
    wd, xd = w.double().requires_grad_(), x.double().requires_grad_()
    y = F.conv1d(xd, wd, stride=2, padding=1)
    error = ints(*y.shape)
    y.backward(error.double())
    (g,) = weight_gradient(layer, error, x, "auto")
    assert g.shape == w.shape and torch.equal(g.double(), wd.grad)
    assert torch.equal(input_error(layer, error, x, "auto")[0].double(), xd.grad)


def test_linear() -> None:
    w, x, error = ints(5, 7), ints(3, 7), ints(3, 5)
    layer = layer_of(w)
    (g,) = weight_gradient(layer, error, x, "auto")
    assert torch.equal(g.double(), error.double().T @ x.double())
    assert torch.equal(
        input_error(layer, error, x, "auto")[0].double(), error.double() @ w.double()
    )


def test_rows_beyond_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over more rows than int32 can hold come in parts."""
    monkeypatch.setattr("elasticzo.int8.backward.MAX_ROWS", 4)
    w, x, error = ints(5, 7), ints(10, 7), ints(10, 5)
    parts = weight_gradient(layer_of(w), error, x, "auto")
    assert len(parts) == 3
    zero = torch.tensor(0, dtype=torch.int32)
    total = aligned_sum([(g, zero) for g in parts]).double()
    exact = error.double().T @ x.double()
    ratio = exact.abs().max() / total.abs().max()
    assert torch.allclose(total * ratio, exact, rtol=0, atol=float(ratio))


@pytest.mark.parametrize(
    ("window", "stride"), [((2, 2), (2, 2)), ((3, 2), (3, 2)), ((3, 3), (2, 2)), ((2, 2), (1, 1))]
)
def test_max_pool(window: tuple[int, int], stride: tuple[int, int]) -> None:
    acc = torch.randperm(2 * 3 * 7 * 8).reshape(2, 3, 7, 8).to(torch.int32)
    pool = Pool(window, stride)
    out, places = pool.with_places(acc)
    xd = acc.double().requires_grad_()
    y = F.max_pool2d(xd, window, stride)
    assert torch.equal(out.double(), y) and torch.equal(pool(acc), out)
    error = ints(*y.shape)
    y.backward(error.double())
    assert torch.equal(pool.route(error, places, acc.shape).double(), xd.grad)


def test_max_points_and_ties() -> None:
    acc = torch.tensor([[[3, 7, 7], [5, 5, 1]]], dtype=torch.int32)
    pool = Pool()
    out, places = pool.with_places(acc)
    assert out.tolist() == [[7, 5]] and places.tolist() == [[1, 0]]  # the first of equal ones
    routed = pool.route(torch.tensor([[2, -3]], dtype=torch.int8), places, acc.shape)
    assert routed.tolist() == [[[0, 2, 0], [-3, 0, 0]]]


@pytest.mark.parametrize("exponents", [(0, 0), (3, -4), (-9, 6), (0, 40)])
def test_aligned_sum(exponents: tuple[int, int]) -> None:
    parts = [
        (torch.randint(-(2**31) + 1, 2**31, (50,)).to(torch.int32), torch.tensor(e).int())
        for e in exponents
    ]
    exact = sum(g.double() * 2.0 ** float(e) for g, e in parts)
    found = aligned_sum(parts).double()
    assert found.abs().max() < 2**30
    unit = 2.0 ** torch.log2(exact.abs().max() / found.abs().max()).round()
    assert (found * unit - exact).abs().max() <= 2 * unit  # cut off toward zero, twice


def test_aligned_sum_of_one_is_itself() -> None:
    g = torch.tensor([1, -(2**31) + 1], dtype=torch.int32)
    assert aligned_sum([(g, torch.tensor(3))]) is g


def gradients(model: ElasticZOInt8, x: Int8Tensor, y: Tensor, source: str) -> dict[str, Tensor]:
    logits = model(x)
    model.backward(logits, y, source)
    return {name: g.double() for name, g in model.gradients.items()}


def exact_gradients(
    net: nn.Sequential, model: ElasticZOInt8, x: Int8Tensor, y: Tensor
) -> dict[str, Tensor]:
    """float64's gradient of the cross-entropy at the int8 weights, without requantisation."""
    twin = net.double()
    with torch.no_grad():
        for name, p in twin.named_parameters():
            layer = model.network.layers[name.removesuffix(".weight")]
            p.copy_(layer.weight.double() * 2.0 ** int(layer.exponent))
    F.cross_entropy(twin(x.dequantize()), y, reduction="sum").backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def softened(net: nn.Sequential) -> nn.Sequential:
    fixed_weights(net)
    with torch.no_grad():
        net[-1].weight.mul_(2.0**-4)
    return net


@pytest.mark.parametrize("net", [small_net, point_net])
@pytest.mark.parametrize("tail", [1, 2, "all"])
@pytest.mark.parametrize("source", ["plus", "minus", "mean"])
def test_direction_of_the_gradients(net: Any, tail: Any, source: str) -> None:
    """Whole backward against float64. With r_max = 1 and nearly no noise both halves are near the
    weights; 8 bits of error and activations leave a few per cent."""
    shape = (24, 1, 8, 8) if net is small_net else (24, 3, 6)
    x, y = batch(shape, 4)
    model = ElasticZOInt8(softened(net()), tail=tail, r_max=1, p_zero=0.99)
    found = gradients(model, x, y, source)
    exact = exact_gradients(softened(net()), model, x, y)
    assert list(found) == [name for name, _ in model.named_tail_parameters()]
    for name, g in found.items():
        assert g.shape == exact[name].shape
        assert cosine(g, exact[name]) > 0.9, name


@pytest.mark.parametrize("queries", [1, 2])
def test_last_layer_s_gradient_is_exact(queries: int) -> None:
    """`G = err^T x` of the int8 error, half by half, at one exponent."""
    model = ElasticZOInt8(
        softened(small_net()), tail=1, r_max=31, p_zero=0.0, queries=queries, pairing="sequential"
    )
    x, y = batch((6, 1, 8, 8), 4)
    logits = model(x)
    error, exponent = integer_softmax_error(
        logits.q, logits.exponent, y, key=model.session.key, tensor=3
    )
    kept = [tape.kept["6"].x for tape in model._tapes]
    exact = sum(
        (error[h].double().T @ kept[h].q.double()) * 2.0 ** int(exponent[h] + kept[h].exponent[0])
        for h in range(2 * queries)
    )
    model.backward(logits, y, "mean")
    (g,) = model.gradients.values()
    ratio = exact.abs().max() / g.abs().max()
    unit = 2.0 ** torch.log2(ratio).round()
    assert torch.equal(g.double() * unit, exact)


@pytest.mark.parametrize("rounding", ["nearest", "pseudo", "stochastic"])
@pytest.mark.parametrize("b_bp", [0, 3, 7])
def test_update(b_bp: int, rounding: str) -> None:
    model = ElasticZOInt8(softened(small_net()), tail=1)
    x, y = batch((6, 1, 8, 8), 4)
    model.backward(model(x), y)
    (g,) = model.gradients.values()
    ((_, w),) = model.named_tail_parameters()
    before, s = w.clone().double(), int(int8_range(g)) - b_bp
    model.tail_optimizer(b_bp=b_bp, rounding=rounding).step()
    change = before - w.double()
    assert s > 0 and change.abs().max() <= 2**b_bp
    inside = w.abs() < 127
    limit = 0.5 if rounding == "nearest" else 1.0
    assert ((change - g.double() / 2.0**s).abs()[inside] <= limit).all()
    assert bool(change.any())


def test_a_gradient_of_zero_moves_nothing() -> None:
    model = ElasticZOInt8(small_net(), tail=1)
    bp = model.tail_optimizer(b_bp=3)
    ((name, w),) = model.named_tail_parameters()
    before = w.clone()
    model.gradients[name] = torch.zeros(w.shape, dtype=torch.int32)
    bp.step()
    assert torch.equal(w, before)


def test_frozen_layer_inside_the_tail() -> None:
    net = softened(small_net())
    net[4].weight.requires_grad_(False)
    model = ElasticZOInt8(net, tail="all")
    x, y = batch((6, 1, 8, 8), 4)
    found = gradients(model, x, y, "plus")
    assert list(found) == ["0.weight", "6.weight"] and bool(found["0.weight"].any())


def test_frozen_head_runs_once() -> None:
    """The control: a head that never moves, one pass, or halves that are alike."""
    for tail, halves in (("all", 1), (1, 2)):
        net = softened(small_net())
        for i in (0, 4):
            net[i].weight.requires_grad_(False)
        model = ElasticZOInt8(net, tail=tail)
        x, y = batch((6, 1, 8, 8), 4)
        logits = model(x)
        assert logits.shape == (halves, 6, 4) and model._tapes[0].count == 1
        model.backward(logits, y, "mean")
        model.tail_optimizer(b_bp=3).step()
        zo = Int8ZO(model, b_zo=1)
        zo.step(model.losses(logits, y))
        assert zo.signs.tolist() == [0]


def test_aligned_sum_keeps_the_smallest_unit() -> None:
    """Zeros shifted in below would make pseudo-stochastic rounding go up always."""
    plus, minus = (torch.randint(-5000, 5000, (64,), dtype=torch.int32) for _ in range(2))
    e = torch.tensor(-11, dtype=torch.int32)
    assert torch.equal(aligned_sum([(plus, e), (minus, e)]), plus + minus)
    assert torch.equal(aligned_sum([(plus, e + 3), (minus, e)]), 8 * plus + minus)


@pytest.mark.parametrize("exponent", [-18, -26, 9])
def test_a_half_of_zeros_sets_no_unit(exponent: int) -> None:
    g, zeros = torch.randint(-1680, 1681, (100,), dtype=torch.int32), torch.zeros(100).int()
    own, other = torch.tensor(-10).int(), torch.tensor(exponent).int()
    assert torch.equal(aligned_sum([(g, own), (zeros, other)]), g)
    assert not aligned_sum([(zeros, own), (zeros, other)]).any()


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "padding"), [(1, 1), (1, 2), (3, 4), (2, 3)])
def test_input_error_of_wide_padding(kernel: int, padding: int, stride: int) -> None:
    """Padding beyond the kernel: some outputs see no input at all."""
    settings = {"stride": (stride, stride), "padding": (padding, padding)}
    layer = layer_of(ints(4, 3, kernel, kernel), **settings)
    x = torch.zeros(2, 3, 7, 8, dtype=torch.int8)
    w = layer.weight.double()
    shape = F.conv2d(x.double(), w, stride=stride, padding=padding).shape
    error = ints(*shape)
    found, _ = input_error(layer, error, x, "reference")
    exact = torch.nn.grad.conv2d_input(
        list(x.shape), w, error.double(), stride=stride, padding=padding
    )
    assert torch.equal(found.double(), exact)
