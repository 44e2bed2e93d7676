"""Conversion: what a float model becomes in int8, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from elasticzo.int8 import ElasticZOInt8, Int8Network, Int8Tensor, quantize
from elasticzo.models import LeNet5
from elasticzo.models.points import MaxPoints
from tests.elasticzo.int8.nets import batch, point_net, small_net


def test_weights_are_niti_s() -> None:
    model = small_net()
    network = Int8Network(model)
    for name, layer in network.layers.items():
        w = model.get_submodule(name).weight.detach().double()
        top = float(w.abs().max())
        assert layer.weight.dtype == torch.int8 and layer.exponent.dtype == torch.int32
        assert torch.equal(layer.weight, (127 * w / top).round().to(torch.int8))
        assert int(layer.exponent) == math.ceil(math.log2(top)) - 7
    assert [layer.tensor for layer in network.layers.values()] == [0, 1, 2]


def test_all_zero_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    nn.init.zeros_(model[0].weight)
    zo = ElasticZOInt8(model, tail=0).eval()
    out = zo(batch((3, 4), 2)[0])
    assert not out.q.any() and int(out.exponent) == -6 - 7


@pytest.mark.parametrize(
    ("values", "exponent", "q"),
    [
        ([2.0, -1.0], -6, [127, -64]),  # a power of 2: 2 * 2^6 = 128 is clipped
        ([2.01, -1.0], -5, [64, -32]),
        ([0.0, 0.0], -7, [0, 0]),
        ([0.75, 0.5], -7, [96, 64]),
    ],
)
def test_quantize(values: list[float], exponent: int, q: list[int]) -> None:
    found = quantize(torch.tensor(values))
    assert int(found.exponent) == exponent and found.q.tolist() == q
    assert found.q.dtype == torch.int8 and found.exponent.dtype == torch.int32
    assert torch.equal(found.dequantize(), found.q.double() * 2.0**exponent)


def test_quantize_refuses() -> None:
    for exponent in (None, -7):
        with pytest.raises(ValueError, match="x must be finite, got 2 NaN and 1 infinite of 4"):
            quantize(torch.tensor([math.nan, 1.0, -math.inf, math.nan]), exponent)
    for bad in (1.5, 65, -65, True, torch.tensor(-7)):
        with pytest.raises(ValueError, match=r"exponent must be an integer in \[-64, 64\], got "):
            quantize(torch.tensor([1.0]), bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the exponent of x must be in \[-64, 64\], got -106"):
        quantize(torch.tensor([1e-30]))
    with pytest.raises(TypeError, match=r"x must be floating or uint8, got torch.int64"):
        quantize(torch.tensor([1]))
    with pytest.raises(TypeError, match="x must be a Tensor, got list"):
        quantize([1.0])  # type: ignore[arg-type]


def test_quantize_at_a_given_exponent() -> None:
    found = quantize(torch.tensor([1.0, -3.0, 0.26, 0.24]), exponent=-1)
    assert found.q.tolist() == [2, -6, 1, 0] and int(found.exponent) == -1
    assert quantize(torch.tensor([200], dtype=torch.uint8), exponent=0).q.tolist() == [127]
    assert quantize(torch.zeros(0), exponent=3).shape == (0,)


def test_fresh_batch_norm_folds_to_nothing() -> None:
    plain = small_net()
    normed = nn.Sequential(OrderedDict(plain.named_children()))
    normed = nn.Sequential(plain[0], nn.BatchNorm2d(3), *plain[1:5], nn.BatchNorm1d(8), *plain[5:])
    a, b = Int8Network(plain), Int8Network(normed)
    for one, other in zip(a.blocks, b.blocks, strict=True):
        assert torch.equal(one.layer.weight, other.layer.weight)
        assert torch.equal(one.layer.exponent, other.layer.exponent)
        assert (one.relu, one.pools, one.flatten) == (other.relu, other.pools, other.flatten)


def test_trained_batch_norm_folds() -> None:
    conv, norm = nn.Conv2d(2, 3, 3, bias=True), nn.BatchNorm2d(3)
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor([0.5, -0.25, 0.1]))
        norm.running_var.copy_(torch.tensor([4.0, 0.5, 1.5]))
        norm.weight.copy_(torch.tensor([1.5, -0.5, 2.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    model = nn.Sequential(conv, norm, nn.Flatten(), nn.Linear(3, 2, bias=False)).eval()
    with pytest.raises(ValueError, match="'0' has a bias, or a BatchNorm that makes one"):
        Int8Network(model)
    with torch.no_grad():  # a bias that cancels what the statistics make
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        conv.bias.copy_(norm.running_mean - norm.bias / factor)
    with warnings.catch_warnings(action="error"):
        layer = Int8Network(model, drop_biases=True).layers["0"]
    folded = (conv.weight * factor[:, None, None, None]).detach().double()
    exact = (127 * folded / folded.abs().max()).round()
    assert (layer.weight - exact).abs().max() <= 1  # the test folds in float32
    x = torch.randn(4, 2, 3, 3)
    bare = nn.functional.conv2d(x.double(), folded)
    assert torch.allclose(norm(conv(x)).double(), bare, atol=1e-5)


def normed_net() -> nn.Sequential:
    """`a` has a BatchNorm behind it, `b` a bias of its own."""
    return nn.Sequential(
        OrderedDict(a=nn.Linear(4, 2, bias=False), norm=nn.BatchNorm1d(2), b=nn.Linear(2, 2))
    )


@pytest.mark.parametrize(
    ("statistics", "bias", "named"),
    [
        ((0.0, 1.0), 0.0, []),  # fresh
        ((0.48, 4.0), 0.0, []),  # 0.24 of a standard deviation of 2
        ((0.52, 4.0), 0.0, ["'a' (0.26)"]),
        ((0.0, 1.0), 0.24, []),
        ((0.0, 1.0), -0.26, ["'b' (0.26)"]),
        ((-2.0, 4.0), 0.5, ["'a' (1.00)", "'b' (0.50)"]),
    ],
)
def test_dropped_biases_that_are_not_small(
    statistics: tuple[float, float], bias: float, named: list[str]
) -> None:
    model = normed_net()
    with torch.no_grad():
        model.norm.running_mean.fill_(statistics[0])
        model.norm.running_var.fill_(statistics[1])
        model.norm.weight.copy_(torch.tensor([3.0, -3.0]))  # scales bias and output alike
        model.b.weight.copy_(torch.tensor([[0.6, 0.8], [-0.8, 0.6]]))  # rows of norm 1
        model.b.bias.fill_(bias)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ElasticZOInt8(model, tail=0, drop_biases=True)
    texts = [str(w.message) for w in found if w.category is UserWarning]
    assert len(texts) == bool(named)
    for text in texts:
        assert f"among them) of {', '.join(named)} shifts these layers" in text


def test_a_layer_of_nothing_but_its_bias() -> None:
    model = normed_net()
    nn.init.zeros_(model.b.weight)
    nn.init.ones_(model.b.bias)
    with pytest.warns(UserWarning, match=r"of 'b' \(inf\) shifts"):
        Int8Network(model, drop_biases=True)
    with pytest.raises(TypeError, match="drop_biases must be True or False, got 'no'"):
        Int8Network(model, drop_biases="no")  # type: ignore[arg-type]


def test_lenet_s_chain() -> None:
    network = Int8Network(LeNet5())
    assert list(network.layers) == ["conv1", "conv2", "fc1", "fc2", "fc3"]
    assert [b.relu for b in network.blocks] == [True] * 4 + [False]
    assert [len(b.pools) for b in network.blocks] == [1, 1, 0, 0, 0]
    assert [b.flatten for b in network.blocks] == [False, True, False, False, False]


class Odd(nn.Module):
    pass


class Residual(nn.Sequential):
    def forward(self, x: Any) -> Any:
        return x + super().forward(x)


REFUSED = [
    (nn.Sequential(nn.Linear(2, 2, bias=False), nn.Sigmoid()), TypeError, "'1' is a Sigmoid; an"),
    (nn.Sequential(Residual(nn.Linear(2, 2))), TypeError, "'0' is a Residual"),
    (Odd(), TypeError, "'the model' is a Odd"),
    (3, TypeError, "model must be an nn.Module, got int"),
    (nn.Sequential(nn.ReLU()), ValueError, "the model has no Linear, Conv1d or Conv2d"),
    (nn.Sequential(nn.Linear(2, 2)), ValueError, "'0' has a bias"),
    (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2)), ValueError, r"'1' \(BatchNorm1d\) must follow"),
    (
        nn.Sequential(nn.Conv2d(2, 2, 3, groups=2, bias=False)),
        ValueError,
        "'0' must have groups=1, .*, got groups=2",
    ),
    (
        nn.Sequential(nn.Conv2d(2, 2, 3, bias=False), nn.MaxPool2d(3, padding=1)),
        ValueError,
        "'1' must be a MaxPool2d with padding=0",
    ),
    (
        nn.Sequential(nn.Linear(2, 2, bias=False), nn.Flatten(2)),
        ValueError,
        "'1' must flatten all but the batch",
    ),
    (
        nn.Sequential(nn.Linear(2, 2, bias=False), nn.Flatten(), MaxPoints()),
        ValueError,
        r"'2' \(MaxPoints\) must come before Flatten",
    ),
]


@pytest.mark.parametrize(("model", "error", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_refuses(model: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Int8Network(model)


def test_refuses_a_layer_used_twice() -> None:
    layer = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match="'1' is used twice"):
        Int8Network(nn.Sequential(layer, layer))


def test_weights_that_are_not_finite() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="weights must be finite, got 1 NaN and 0 infinite of 4"):
        Int8Network(model)


def test_cut_and_names() -> None:
    names = ["conv1", "conv2", "fc1", "fc2", "fc3"]
    for tail, count in ((0, 0), (1, 1), (["fc2", "fc3"], 2), ("all", 5)):
        model = ElasticZOInt8(LeNet5(), tail=tail)
        head = [name for name, _ in model.named_head_parameters()]
        assert head == [f"{n}.weight" for n in names[: 5 - count]]
        assert [n for n, _ in model.named_tail_parameters()] == [
            f"{n}.weight" for n in names[5 - count :]
        ]
        assert model.halves == (1 if tail == "all" else 2)
    with pytest.raises(ValueError, match=r"tail must come after the whole head: 'conv1.weight'"):
        ElasticZOInt8(LeNet5(), tail=["conv1"])
    with pytest.raises(ValueError, match="unknown module 'fc9'"):
        ElasticZOInt8(LeNet5(), tail=["fc9"])


def test_frozen_weights_stay() -> None:
    net = LeNet5()
    net.conv1.weight.requires_grad_(False)
    model = ElasticZOInt8(net, tail=1, p_zero=0.0)
    assert next(n for n, _ in model.named_head_parameters()) == "conv2.weight"


def test_a_layer_may_have_any_name() -> None:
    net = nn.Sequential(OrderedDict(blocks=nn.Linear(2, 2, bias=False)))
    assert list(ElasticZOInt8(net, tail=0).state_dict()) == ["blocks.weight", "blocks.exponent"]
    nested = nn.Sequential(OrderedDict(a=net, b=nn.Linear(2, 2, bias=False)))
    model = ElasticZOInt8(nested, tail=["b"])
    assert "a.blocks.weight" in model.state_dict()


def test_copies_and_states() -> None:
    model = ElasticZOInt8(small_net(), tail=1).eval()
    x, _ = batch((5, 1, 8, 8), 4)
    expected = model(x)
    other = ElasticZOInt8(small_net(), tail=1).eval()
    other.load_state_dict(model.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        out = copied(x)
        assert torch.equal(out.q, expected.q) and torch.equal(out.exponent, expected.exponent)
        copied.network.blocks[0].layer.weight.zero_()
        assert not copied.state_dict()["0.weight"].any()
    assert model.state_dict()["0.weight"].any()
    assert model.to(torch.float16).state_dict()["0.weight"].dtype == torch.int8


def test_points() -> None:
    model = ElasticZOInt8(point_net(), tail=1, p_zero=0.0, r_max=3)
    q = torch.randint(-127, 128, (4, 3, 20), dtype=torch.int8)
    x = Int8Tensor(q, torch.tensor(-6, dtype=torch.int32))
    assert model(x).shape == (2, 4, 4)
    shuffled = Int8Tensor(q[:, :, torch.randperm(20)], x.exponent)
    model.eval()
    assert torch.equal(model(x).q, model(shuffled).q)
