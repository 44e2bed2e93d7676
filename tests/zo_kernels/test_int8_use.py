"""The integer ops: registration, signatures, messages, and that no float takes part."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zo_kernels
from tests.zo_kernels._int8_weights import int8_weight, int32, key_on
from zo_kernels import (
    int8_perturbed_weights,
    int8_range,
    int8_requantize,
    int8_update_,
    integer_cross_entropy,
    integer_projected_sign,
    integer_softmax_error,
)

pytestmark = pytest.mark.usefixtures("poison")
OPS = (
    "int8_perturbed_weights",
    "int8_range",
    "int8_requantize",
    "int8_update_",
    "integer_cross_entropy",
    "integer_projected_sign",
    "integer_softmax_error",
)


def op(name: str) -> Any:
    return getattr(torch.ops.zo_kernels, name).default


def logits_on(device: Any) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randint(-127, 128, (2, 5, 10), dtype=torch.int8, device=device)
    return logits, int32([-5, -4], device), torch.arange(5, device=device)


@pytest.mark.parametrize("name", ["3x129", "channels-last", "sliced-kernel"])
def test_opcheck_weights(name: str, backend: str, device: Any) -> None:
    w, key = int8_weight(name, device), key_on(device)
    args = (w, key, 2, 1, 4, 0.25, 9, backend)
    torch.library.opcheck(op("int8_perturbed_weights"), args)
    g = int32([1, -1], device)
    args = ([w, w.clone()], key, g, [2, 3], 0.25, 9, 3, "stochastic", backend)
    torch.library.opcheck(op("int8_update_"), args)


@pytest.mark.parametrize("view", ["contiguous", "channels-last", "sliced"])
def test_opcheck_accumulators(view: str, backend: str, device: Any) -> None:
    acc = torch.randint(-9999, 9999, (4, 3, 5, 4), dtype=torch.int32, device=device)
    if view == "channels-last":
        acc = acc.to(memory_format=torch.channels_last)
    elif view == "sliced":
        acc = acc[:, :, ::2]
    key = key_on(device)
    for halves, exponent in ((None, int32(3, device)), (2, int32([3, 4], device))):
        torch.library.opcheck(op("int8_range"), (acc, halves, backend))
        bits = int8_range(acc, halves=halves)
        for rounding, given in (("nearest", None), ("stochastic", bits)):
            exponents = (exponent, int32(1, device))
            args = (acc, given, *exponents, halves, rounding, key, 3, 1, True, backend)
            torch.library.opcheck(op("int8_requantize"), args)


def test_opcheck_losses(backend: str, device: Any) -> None:
    args = logits_on(device)
    torch.library.opcheck(op("integer_cross_entropy"), (*args, 12, backend))
    noise = ("stochastic", key_on(device), 3, 1)
    torch.library.opcheck(op("integer_softmax_error"), (*args, 12, *noise, backend))
    losses = torch.tensor([3, 4, 5, 1], device=device)
    torch.library.opcheck(op("integer_projected_sign"), (losses, backend))


def a_step(backend: str) -> Callable[..., tuple[Tensor, ...]]:
    """Perturb, multiply, requantise, loss, sign, error, update: all ops of an integer step."""

    def step(x: Tensor, w: Tensor, key: Tensor, exponent: Tensor, target: Tensor) -> Any:
        noise = {"p_zero": 0.25, "r_max": 9, "backend": backend}
        halves = int8_perturbed_weights(w, key, tensor=1, **noise)
        acc = (x.to(torch.int32)[None, :, None] * halves.to(torch.int32)[:, None]).sum(3)
        acc = acc.to(torch.int32).flatten(0, 1)
        rounds = {"rounding": "stochastic", "key": key, "backend": backend}
        y, e = int8_requantize(acc, None, exponent, halves=2, relu=True, **rounds)
        logits = y.unflatten(0, (2, x.shape[0]))
        losses = integer_cross_entropy(logits, e, target, backend=backend)
        error, _ = integer_softmax_error(logits[:1], e[:1], target, **rounds)
        g = integer_projected_sign(losses, backend=backend)
        int8_update_([w], key, g, tensors=[1], b_zo=3, rounding="pseudo", **noise)
        return losses, error, g, y

    return step


def arguments(device: Any) -> list[Tensor]:
    torch.manual_seed(5)
    x = torch.randint(-127, 128, (6, 17), dtype=torch.int8, device=device)
    w = torch.randint(-127, 128, (9, 17), dtype=torch.int8, device=device)
    return [x, w, key_on(device), int32(-20, device), torch.arange(6, device=device)]


def test_compiles_in_one_graph(backend: str, device: Any) -> None:
    """Values and the changed weight equal eager's, for several steps without recompiling."""
    torch._dynamo.reset()
    step = a_step(backend)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, graph = arguments(device), arguments(device)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            assert all(map(torch.equal, step(*eager), compiled(*graph)))
            assert torch.equal(eager[1], graph[1])
            for args in (eager, graph):
                args[2] = args[2] + torch.tensor([0, 1], device=device)
    assert not torch.equal(eager[1], arguments(device)[1])


def test_a_step_is_the_same_on_all_backends(backend: str, device: Any) -> None:
    mine, reference = arguments(device), arguments("cpu")
    for _ in range(5):
        found = a_step(backend)(*mine)
        want = a_step("reference")(*reference)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, want, strict=True))
        assert torch.equal(mine[1].cpu(), reference[1])
        mine[2][1] += 1
        reference[2][1] += 1


class NoFloats(TorchDispatchMode):
    """Fails on any tensor of a floating dtype that an operator takes or makes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs, out)):
            if isinstance(t, Tensor):
                assert not t.is_floating_point(), f"{func} uses {t.dtype}"
        return out


def test_no_float_takes_part(backend: str, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called as eager mode calls them: under a dispatch mode the ops would be opaque."""
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
    if backend == "triton":  # a table of weights carries their scales, which no integer op reads
        table = importlib.import_module("zo_kernels._table")
        step, args = a_step(backend), arguments(device)
        step(*args)
        assert table._TABLES
    else:
        step, args = a_step(backend), arguments(device)
    with NoFloats():
        step(*args)


@pytest.mark.parametrize("twins", ["zo_kernels.reference", "zo_kernels.cpu"])
@pytest.mark.parametrize("name", OPS)
def test_signatures(name: str, twins: str) -> None:
    if twins == "zo_kernels.cpu":
        pytest.importorskip("numba")
    public = inspect.signature(getattr(zo_kernels, name))
    twin = inspect.signature(getattr(importlib.import_module(twins), name))
    parameters = [p for p in public.parameters.values() if p.name != "backend"]
    assert public.parameters["backend"].default == "auto"
    assert public.replace(parameters=parameters) == twin
    schema = op(name)._schema
    assert [a.name for a in schema.arguments] == [*public.parameters]
    assert schema.is_mutable is name.endswith("_")
    doc = inspect.getdoc(getattr(zo_kernels, name)) or ""
    assert not [parameter for parameter in public.parameters if parameter not in doc]
    assert name in zo_kernels.__all__


KEY = key_on("cpu")
ACC, BYTES = torch.zeros(4, 7, dtype=torch.int32), torch.zeros(4, 7, dtype=torch.int8)
ZERO, TWO = int32(0, "cpu"), int32([0, 0], "cpu")
LOGITS, EXPONENT, TARGET = logits_on("cpu")
SIGNS = int32([1, -1], "cpu")


def update(**kwargs: Any) -> None:
    args: dict[str, Any] = {"params": [BYTES.clone()], "key": KEY, "g": SIGNS, "tensors": [0]}
    int8_update_(**args | kwargs)


def requantize(**kwargs: Any) -> None:
    int8_requantize(**{"acc": ACC, "bits": None, "exponent": ZERO} | kwargs)


def loss(**kwargs: Any) -> None:
    integer_cross_entropy(**{"logits": LOGITS, "exponent": EXPONENT, "target": TARGET} | kwargs)


def error(**kwargs: Any) -> None:
    args = {"logits": LOGITS, "exponent": EXPONENT, "target": TARGET, "key": KEY}
    integer_softmax_error(**args | kwargs)


def perturb(**kwargs: Any) -> None:
    int8_perturbed_weights(**{"w": BYTES, "key": KEY, "tensor": 0} | kwargs)


BIG = torch.empty((2, 2**24 + 1, 1), dtype=torch.int8, device="meta")
NEAR: dict[str, tuple[Callable[..., None], dict[str, Any], type[Exception], str]] = {
    "acc-dtype": (
        requantize,
        {"acc": BYTES},
        TypeError,
        "acc must be torch.int32, got torch.int8",
    ),
    "halves": (requantize, {"halves": 0}, ValueError, "halves must be at least 1, got 0"),
    "halves-divide": (
        requantize,
        {"halves": 3},
        ValueError,
        "acc must have a dimension 0 that divides by 3 halves, got shape [4, 7]",
    ),
    "exponent-dtype": (
        requantize,
        {"exponent": ZERO.long()},
        TypeError,
        "exponent must be torch.int32, got torch.int64",
    ),
    "exponent-count": (
        requantize,
        {"exponent": TWO},
        ValueError,
        "exponent must have 1 element, got shape [2]",
    ),
    "bits-count": (
        requantize,
        {"bits": TWO, "halves": 4},
        ValueError,
        "bits must have 1 or 4 elements, got shape [2]",
    ),
    "weight-exponent": (
        requantize,
        {"weight_exponent": TWO},
        ValueError,
        "weight_exponent must have 1 element, got shape [2]",
    ),
    "rounding": (
        requantize,
        {"rounding": "up"},
        ValueError,
        "rounding must be one of ('nearest', 'pseudo', 'stochastic'), got 'up'",
    ),
    "no-key": (
        requantize,
        {"rounding": "stochastic"},
        ValueError,
        "rounding 'stochastic' needs a key, got None",
    ),
    "key": (requantize, {"key": KEY[:1]}, ValueError, "key must have shape [2], got [1]"),
    "query": (
        requantize,
        {"query": 2**24},
        ValueError,
        "query must be in [0, 2^24), got 16777216",
    ),
    "groups": (
        requantize,
        {
            "acc": torch.empty((2**32 + 1, 1), dtype=torch.int32, device="meta"),
            "exponent": ZERO.to("meta"),
            "rounding": "stochastic",
            "key": KEY.to("meta"),
        },
        ValueError,
        "a tensor may have at most 2^32 groups of noise, got 4294967297 for shape [4294967297, 1]",
    ),
    "w-dtype": (perturb, {"w": ACC}, TypeError, "w must be torch.int8, got torch.int32"),
    "range": (
        perturb,
        {"start": 2},
        ValueError,
        "halves need 0 <= start < stop, got start=2, stop=2",
    ),
    "p-zero": (perturb, {"p_zero": 1.0}, ValueError, "p_zero must be in [0, 1), got 1.0"),
    "r-max": (perturb, {"r_max": 128}, ValueError, "r_max must be in [1, 127], got 128"),
    "update-r-max": (update, {"r_max": 0}, ValueError, "r_max must be in [1, 127], got 0"),
    "update-count": (
        update,
        {"tensors": [0, 1]},
        ValueError,
        "params and tensors must have one length, got 1, 2",
    ),
    "g-dtype": (
        update,
        {"g": SIGNS.long()},
        TypeError,
        "g must be torch.int32, got torch.int64",
    ),
    "g-none": (
        update,
        {"g": SIGNS[:0]},
        ValueError,
        "g must have at least one query, got none",
    ),
    "b-zo": (update, {"b_zo": 32}, ValueError, "b_zo must be in [0, 31], got 32"),
    "update-rounding": (
        update,
        {"rounding": "up"},
        ValueError,
        "rounding must be one of ('nearest', 'pseudo', 'stochastic'), got 'up'",
    ),
    "update-expanded": (
        update,
        {"params": [BYTES[:1].expand(4, 7)]},
        ValueError,
        "params[0] is changed in place and must not be expanded, got shape [4, 7] "
        "with strides [0, 1]",
    ),
    "update-tensor": (
        update,
        {"tensors": [-1]},
        ValueError,
        "tensor index must be in [0, 2^32), got -1",
    ),
    "logits-dtype": (
        loss,
        {"logits": LOGITS.int()},
        TypeError,
        "logits must be torch.int8, got torch.int32",
    ),
    "logits-dims": (
        loss,
        {"logits": LOGITS[0]},
        ValueError,
        "logits must have shape [H, B, C], C > 0, got [5, 10]",
    ),
    "logits-classes": (
        loss,
        {"logits": LOGITS[:, :, :0]},
        ValueError,
        "logits must have shape [H, B, C], C > 0, got [2, 5, 0]",
    ),
    "loss-exponent": (
        loss,
        {"exponent": ZERO},
        ValueError,
        "exponent must have shape [2], got []",
    ),
    "target": (
        loss,
        {"target": TARGET[:4]},
        ValueError,
        "target must have shape [5], got [4]",
    ),
    "target-dtype": (
        loss,
        {"target": TARGET.int()},
        TypeError,
        "target must be torch.int64, got torch.int32",
    ),
    "fraction-bits": (
        loss,
        {"fraction_bits": 17},
        ValueError,
        "fraction_bits must be in [0, 16], got 17",
    ),
    "batch": (
        loss,
        {
            "logits": BIG,
            "exponent": TWO.to("meta"),
            "target": torch.empty(2**24 + 1, dtype=torch.int64, device="meta"),
        },
        ValueError,
        "the batch may have at most 2^24 samples, got 16777217",
    ),
    "error-key": (
        error,
        {"key": None},
        ValueError,
        "rounding 'stochastic' needs a key, got None",
    ),
    "pairs": (
        integer_projected_sign,  # type: ignore[dict-item]
        {"losses": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        "losses must come in pairs, got 3",
    ),
    "losses-dtype": (
        integer_projected_sign,  # type: ignore[dict-item]
        {"losses": torch.zeros(4)},
        TypeError,
        "losses must be torch.int64, got torch.float32",
    ),
    "range-halves": (
        int8_range,  # type: ignore[dict-item]
        {"acc": ACC[0, 0], "halves": 1},
        ValueError,
        "acc must have a dimension 0 that divides by 1 halves, got shape []",
    ),
}


@pytest.mark.parametrize(("call", "change", "raised", "message"), NEAR.values(), ids=NEAR)
def test_message(
    call: Callable[..., None], change: dict[str, Any], raised: type[Exception], message: str
) -> None:
    with pytest.raises(raised, match=f"^{re.escape(message)}$"):
        call(**change)
