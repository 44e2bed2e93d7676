"""Bad values and wrong use answer with what was expected and what came."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from elasticzo.int8 import ElasticZOInt8, Int8Tensor, Int8ZO
from tests.elasticzo.int8.nets import batch, fixed_weights, small_net

SETTINGS: list[tuple[dict[str, Any], str]] = [
    *(
        ({"r_max": bad}, rf"r_max must be an integer in \[1, 127\], got {bad}")
        for bad in (0, 128, 3.5, 15.0, True)
    ),
    *(
        ({"p_zero": bad}, rf"p_zero must be a number in \[0, 1\), got {bad!r}")
        for bad in (1.0, -0.1, float("nan"), False, "0.5")
    ),
    *(
        ({"queries": bad}, rf"queries must be an integer in \[1, 2\^24\), got {bad}")
        for bad in (0, 1.0, True)
    ),
    *(
        ({"seed": bad}, rf"seed must be an integer in \[0, 2\^63\), got {bad}")
        for bad in (-1, 0.5, True)
    ),
    *(
        ({"fraction_bits": bad}, rf"fraction_bits must be an integer in \[0, 16\], got {bad}")
        for bad in (17, 8.0, True)
    ),
    ({"loss": "mse"}, r"loss must be one of \('integer', 'float'\), got 'mse'"),
    ({"backend": "cuda"}, "backend must be one of .*, got 'cuda'"),
    ({"pairing": "both"}, "pairing must be one of .*, got 'both'"),
    ({"scale": {"6.*": 1.0}}, r"scale pattern '6.\*' matches no head parameter"),
    ({"scale": {"0.*": -1.0}}, r"scale of '0.\*' must be finite and >= 0, got -1.0"),
    ({"scale": {"0.*": "1"}}, r"scale of '0.\*' must be finite and >= 0, got '1'"),
    ({"tail": ["1", "3"]}, r"tail=\['1', '3'\] names no module with param.*: 0, 4, 6"),
    ({"tail": 9}, r"must be in 0\.\.3 for this model, got 9"),
]


def small(**settings: Any) -> ElasticZOInt8:
    return ElasticZOInt8(fixed_weights(small_net()), **{"tail": 1} | settings)


@pytest.mark.parametrize(("settings", "message"), SETTINGS, ids=[str(s) for s, _ in SETTINGS])
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**settings)


def test_noise_that_changes_is_checked_as_at_the_start() -> None:
    model = small(r_max=1, p_zero=0.0)
    with pytest.raises(ValueError, match=r"r_max must be an integer in \[1, 127\], got True"):
        model.set_noise(r_max=True)
    with pytest.raises(ValueError, match=r"p_zero must be a number in \[0, 1\), got 1.5"):
        model.set_noise(p_zero=1.5)
    assert (model.r_max, model.p_zero) == (1, 0.0)


def test_a_tail_of_batch_norm_alone() -> None:
    """It has parameters, but none that are left in integers."""
    net = nn.Sequential(
        OrderedDict(a=nn.Linear(2, 2, bias=False), norm=nn.BatchNorm1d(2), act=nn.ReLU())
    )
    with pytest.raises(ValueError, match=r"tail=\('norm',\) names no layer of the .*; layers: a; "):
        ElasticZOInt8(net, tail=["norm"])
    assert [n for n, _ in ElasticZOInt8(net, ["a", "norm"]).named_tail_parameters()] == ["a.weight"]


def one(value: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


Q = torch.ones(2, 1, 8, 8, dtype=torch.int8)
INPUTS: list[tuple[Any, type[Exception], str]] = [
    (Q, TypeError, r"x must be an Int8Tensor \(see quantize\), got Tensor"),
    (Int8Tensor(Q.float(), one(0)), TypeError, "int8 q and an int32 exponent, got torch.float32"),
    (Int8Tensor(Q, one(0, torch.int64)), TypeError, "got torch.int8 and torch.int64"),
    (Int8Tensor(Q, one(0).reshape(1)), ValueError, r"exponent of x must be 0-d, got shape \[1\]"),
    (Int8Tensor(Q, one(65)), ValueError, r"the exponent of x must be in \[-64, 64\], got 65"),
    (Int8Tensor(Q, one(-65)), ValueError, r"the exponent of x must be in \[-64, 64\], got -65"),
    (Int8Tensor(Q[:0], one(0)), ValueError, r"x must have shape \[B, ...\], B > 0, got \[0"),
    (Int8Tensor(Q - 129, one(0)), ValueError, r"q of x must be in \[-127, 127\], got -128"),
    (Int8Tensor(Q.to("meta"), one(0)), ValueError, "x must be on cpu, got meta and cpu"),
]


@pytest.mark.parametrize(("x", "error", "message"), INPUTS, ids=[m for *_, m in INPUTS])
def test_inputs(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small()(x)


def test_products_that_int32_cannot_hold() -> None:
    model = ElasticZOInt8(nn.Sequential(nn.Linear(133_153, 1, bias=False)), tail=0)
    x = Int8Tensor(torch.zeros(1, 133_153, dtype=torch.int8), one(-7))
    with pytest.raises(ValueError, match="133"):
        model(x)


@pytest.mark.parametrize("loss", ["integer", "float"])
@pytest.mark.parametrize("label", [-1, 4])
def test_labels_out_of_range(label: int, loss: str) -> None:
    model = small(loss=loss)
    x, y = batch((3, 1, 8, 8), 4)
    y[1] = label
    logits = model(x)
    with pytest.raises(ValueError, match=rf"target must be in \[0, 4\), got {label}"):
        model.losses(logits, y)
    with pytest.raises(ValueError, match=rf"target must be in \[0, 4\), got {label}"):
        model.backward(logits, y)


@pytest.mark.parametrize("tail", [0, 1, 2, "all"])
def test_a_batch_of_one(tail: Any) -> None:
    model = small(tail=tail)
    x, y = batch((1, 1, 8, 8), 4)
    zo = Int8ZO(model, b_zo=1)
    logits = model(x)
    model.backward(logits, y)
    model.tail_optimizer(b_bp=2).step()
    zo.step(model.losses(logits, y))
    assert model.step_index == 1


@pytest.mark.parametrize("tail", [0, 1, "all"])
def test_all_zero_inputs_and_weights(tail: Any) -> None:
    """Nothing to learn from: no error, no weight beyond its range."""
    net = small_net()
    for p in net.parameters():
        nn.init.zeros_(p)
    model = ElasticZOInt8(net, tail=tail)
    x = Int8Tensor(torch.zeros(3, 1, 8, 8, dtype=torch.int8), one(-7))
    y = torch.tensor([0, 1, 2])
    zo, bp = Int8ZO(model, b_zo=1), model.tail_optimizer(b_bp=2)
    logits = model(x)
    assert not logits.q.any()
    losses = model.losses(logits, y)
    assert losses.tolist() == [3 * 2 * 2**12] * model.halves  # log2 of 4 classes
    model.backward(logits, y)
    bp.step()
    zo.step(losses)
    assert not any(v.any() for n, v in model.state_dict().items() if n.endswith("weight"))


def test_saturated_logits() -> None:
    """Exponents far beyond the loss's range: one class takes all, signs and updates stay valid."""
    net = fixed_weights(small_net())
    with torch.no_grad():
        net[-1].weight.mul_(2.0**40)
    model = ElasticZOInt8(net, tail=1)
    x, y = batch((4, 1, 8, 8), 4)
    logits = model(x)
    assert int(logits.exponent.min()) > 8
    losses = model.losses(logits, y)
    assert int(losses.min()) >= 0
    model.backward(logits, y)
    model.tail_optimizer(b_bp=3).step()
    Int8ZO(model, b_zo=1).step(losses)
    for name, value in model.state_dict().items():
        if name.endswith("weight"):
            assert int(value.long().abs().max()) <= 127


def test_order_of_calls() -> None:
    model = small()
    x, y = batch((3, 1, 8, 8), 4)
    zo, bp = Int8ZO(model, b_zo=1), model.tail_optimizer(b_bp=3)
    with pytest.raises(RuntimeError, match=r"zo.step without a training forward"):
        zo.step(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"bp.step without model.backward"):
        bp.step()
    old = model(x)
    logits = model(x)
    with pytest.raises(ValueError, match="logits must be those of the last training forward"):
        model.backward(old, y)
    with pytest.raises(RuntimeError, match="cannot change between a forward"):
        model.set_noise(r_max=3)
    model.backward(logits, y)
    with pytest.raises(RuntimeError, match="backward was called before"):
        model.backward(logits, y)
    losses = model.losses(logits, y)
    zo.step(losses)
    with pytest.raises(RuntimeError, match=r"zo.step ends a step: it comes last"):
        bp.step()
    with pytest.raises(ValueError, match="logits must be those of the last training forward"):
        model.backward(logits, y)


def test_steps_refuse() -> None:
    model = small()
    x, y = batch((3, 1, 8, 8), 4)
    zo = Int8ZO(model, b_zo=1)
    logits = model(x)
    with pytest.raises(ValueError, match=r"losses must have shape \[2\], got \[3\]"):
        zo.step(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="losses must be a Tensor, got list"):
        zo.step([1, 2])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"source must be one of .*, got 'clean'"):
        model.backward(logits, y, "clean")
    for bad in (-1, 32, 1.0, True):
        with pytest.raises(ValueError, match=rf"b_zo must be an integer in \[0, 31\], got {bad}"):
            Int8ZO(model, b_zo=bad)  # type: ignore[arg-type]
    for bad in (-9, 8, True):
        with pytest.raises(ValueError, match=rf"b_bp must be an integer in \[-8, 7\], got {bad}"):
            model.tail_optimizer(b_bp=bad)
    with pytest.raises(ValueError, match=r"rounding must be one of .*, got 'up'"):
        model.tail_optimizer(b_bp=1, rounding="up")
    with pytest.raises(ValueError, match=r"rounding must be one of .*, got 'up'"):
        Int8ZO(model, b_zo=1, rounding="up")
    with pytest.raises(TypeError, match="model must be an ElasticZOInt8, got Sequential"):
        Int8ZO(small_net(), b_zo=1)  # type: ignore[arg-type]


def test_states_refuse() -> None:
    model = small()
    state = model.state_dict()
    floats = {k: v.float() if k.endswith("weight") else v for k, v in state.items()}
    with pytest.raises(TypeError, match=r"'0.weight' must be torch.int8, got torch.float32"):
        model.load_state_dict(floats)
    low = {k: v - 128 if k == "0.weight" else v for k, v in state.items()}
    low["0.weight"] = torch.full_like(state["0.weight"], -128)
    with pytest.raises(ValueError, match=r"'0.weight' must be in \[-127, 127\], got -128"):
        model.load_state_dict(low)


SIGNS = r"signs must be 1 int32 values of -1, 0 or 1, got "
STATES: list[tuple[dict[str, Any], str]] = [
    ({"seed": None}, r"must have the entries seed, step, .*; got one without seed$"),
    ({"lr": 0.1}, r"must have the entries seed, .*; got one with 'lr'$"),
    ({"signs": None, "b_zo": None, "lr": 1}, r"got one without b_zo, signs and with 'lr'$"),
    ({"step": -1}, r"step must be an integer in \[0, 2\^63\), got -1"),
    ({"step": 2.0}, r"step must be an integer in \[0, 2\^63\), got 2.0"),
    ({"seed": 1 << 63}, r"seed must be an integer in \[0, 2\^63\)"),
    ({"b_zo": 32}, r"b_zo must be an integer in \[0, 31\], got 32"),
    ({"r_max": 0}, r"r_max must be an integer in \[1, 127\], got 0"),
    ({"p_zero": "half"}, r"p_zero must be a number in \[0, 1\), got 'half'"),
    ({"signs": [1]}, SIGNS + r"\[1\]"),
    ({"signs": torch.ones(2, dtype=torch.int32)}, SIGNS + r"torch.int32 \[1, 1\]"),
    ({"signs": torch.ones(1)}, SIGNS + r"torch.float32 \[1.0\]"),
    ({"signs": one(2).reshape(1)}, SIGNS + r"torch.int32 \[2\]"),
    ({"loss": "float", "queries": 3}, "differs: queries was 3, is 1; loss was 'float', is 'int"),
]


@pytest.mark.parametrize(("changes", "message"), STATES, ids=[str(c) for c, _ in STATES])
def test_states_of_the_optimiser_refuse_and_load_nothing(
    changes: dict[str, Any], message: str
) -> None:
    saved = Int8ZO(small(seed=5, r_max=9), b_zo=7).state_dict() | {"step": 4}
    bad = {k: v for k, v in (saved | changes).items() if v is not None}
    zo = Int8ZO(small(), b_zo=1)
    before = zo.state_dict()
    with pytest.raises(ValueError, match=message):
        zo.load_state_dict(bad)
    assert zo.state_dict() == before
    zo.load_state_dict(saved)
    assert zo.state_dict() == saved


def test_empty_states_refuse() -> None:
    model = small()
    zo, bp = Int8ZO(model, b_zo=1), model.tail_optimizer(b_bp=3)
    with pytest.raises(ValueError, match=r"a state of Int8ZO must have .*; got one without seed, "):
        zo.load_state_dict({})
    with pytest.raises(TypeError, match="a state of Int8ZO must be a dictionary, got NoneType"):
        zo.load_state_dict(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"rounding; got one without b_bp, rounding$"):
        bp.load_state_dict({})
    with pytest.raises(ValueError, match=r"b_bp, rounding; got one with 'lr'$"):
        bp.load_state_dict(bp.state_dict() | {"lr": 1})
    with pytest.raises(ValueError, match=r"b_bp must be an integer in \[-8, 7\], got 2.5"):
        bp.load_state_dict({"b_bp": 2.5, "rounding": "pseudo"})
    assert bp.b_bp == 3


def test_parts_of_a_tensor() -> None:
    x, _ = batch((4, 2), 2)
    assert torch.equal(x[1:3].q, x.q[1:3]) and len(x) == 4
    halves = Int8Tensor(torch.ones(2, 3, dtype=torch.int8), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(TypeError, match="cannot be indexed: index q"):
        halves[0]


def test_the_float_loss_checks_labels_too() -> None:
    model = ElasticZOInt8(small_net(), 0, loss="float")
    logits = model(batch((6, 1, 8, 8), 4)[0])
    with pytest.raises(ValueError, match=r"target must have shape \[6\], got \[1\]"):
        model.losses(logits, torch.tensor([0]))
    with pytest.raises(TypeError, match=r"target must be"):
        model.losses(logits, torch.zeros(6, dtype=torch.int32))


def test_shared_weights_are_refused() -> None:
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    with pytest.raises(ValueError, match=r"'1' shares a weight with '0'"):
        ElasticZOInt8(nn.Sequential(first, second), 0)


@pytest.mark.parametrize("exponent", [torch.tensor(2**31 - 1), torch.tensor([-7])], ids=str)
def test_a_state_with_a_wrong_exponent_is_refused(exponent: torch.Tensor) -> None:
    model = ElasticZOInt8(small_net(), 0)
    state = dict(model.state_dict())
    name = next(k for k in state if k.endswith("exponent"))
    with pytest.raises(ValueError, match=r"must be one exponent in \[-64, 64\]"):
        model.load_state_dict(state | {name: exponent.int()})
