"""The integer ops: registration, signatures, and that no float takes part."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
        table = importlib.import_module("zo_kernels.triton.table")
        step, args = a_step(backend), arguments(device)
        step(*args)
        assert table._TABLES
    else:
        step, args = a_step(backend), arguments(device)
    with NoFloats():
        step(*args)
