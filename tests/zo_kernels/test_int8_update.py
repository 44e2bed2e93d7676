"""`int8_update_` against Python's integers, on every backend and layout."""

from __future__ import annotations

from collections import OrderedDict
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.zo_kernels._int8_weights import int8_weight, int32, key_on
from tests.zo_kernels._integer_model import ROUNDINGS, bits, clip, rounded
from tests.zo_kernels._noise_model import model
from tests.zo_kernels._weights import FEW, IN_PLACE, LAYOUTS, storage
from tests.zo_kernels.test_layout import Recorder
from zo_kernels import int8_update_
from zo_kernels.registry import has_triton

pytestmark = pytest.mark.usefixtures("poison")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")

TENSOR = 2**31 + 5
SIGNS = [1, -1, 0, -1]
SETTINGS = {"p_zero": 0.25, "r_max": 100, "b_zo": 5}


def update(params: list[Tensor], backend: str, g: Any = SIGNS, **kwargs: Any) -> None:
    device = params[0].device
    args: dict[str, Any] = {
        "tensors": [TENSOR + i for i in range(len(params))],
        "backend": backend,
    }
    int8_update_(params, key_on(device), int32(g, device), **args | SETTINGS | kwargs)


def updated(
    w: Tensor, rounding: str, g: Any = SIGNS, tensor: int = TENSOR, **kwargs: Any
) -> Tensor:
    """The new weight, element by element in Python's integers."""
    settings = SETTINGS | kwargs
    noise = {"noise": "sparse_int8", "p_zero": settings["p_zero"], "r_max": settings["r_max"]}
    seed, step = key_on("cpu").tolist()
    total = torch.zeros(w.shape, dtype=torch.int64)
    for q, sign in enumerate(g):
        total += sign * model(w.shape, seed, step, tensor=tensor, query=q, **noise)
    words = model(w.shape, seed, step, tensor=tensor, noise="bits", purpose="rounding")
    s = max(0, bits(len(g) * settings["r_max"]) - settings["b_zo"])
    triples = zip(*(t.reshape(-1).tolist() for t in (w.cpu(), total, words)), strict=True)
    new = [clip(x - rounded(t, s, rounding, word)) for x, t, word in triples]
    return torch.tensor(new, dtype=torch.int8).reshape(w.shape)


CASES = [(name, "stochastic") for name in IN_PLACE] + [
    (name, r) for name in FEW for r in ROUNDINGS[:2]
]


@pytest.mark.parametrize(("name", "rounding"), CASES)
def test_twin(name: str, rounding: str, backend: str, device: Any) -> None:
    w = int8_weight(name, device)
    before, around = w.clone(), storage(w).clone()
    update([w], backend, rounding=rounding)
    assert torch.equal(w.cpu(), updated(before, rounding))
    w.copy_(before)
    assert torch.equal(storage(w), around), "memory around the weight was written"


@pytest.mark.parametrize("g", [[1], [-1], [0], [1, 1, 1], [0, -1]], ids=str)
def test_signs(g: list[int], backend: str, device: Any) -> None:
    w = int8_weight("conv2d", device)
    before = w.clone()
    update([w], backend, g=g)
    assert torch.equal(w.cpu(), updated(before, "nearest", g))
    if g == [0]:
        assert torch.equal(w, before)


@pytest.mark.parametrize("b_zo", [0, 1, 3, 7, 8, 31])
@pytest.mark.parametrize(("r_max", "p_zero"), [(1, 0.0), (1, 0.9), (31, 0.5), (127, 0.0)])
def test_settings(r_max: int, p_zero: float, b_zo: int, backend: str, device: Any) -> None:
    settings = {"r_max": r_max, "p_zero": p_zero, "b_zo": b_zo}
    for rounding in ROUNDINGS:
        w = int8_weight("3x129", device)
        before = w.clone()
        update([w], backend, rounding=rounding, **settings)
        assert torch.equal(w.cpu(), updated(before, rounding, **settings))


def test_update_has_at_most_b_zo_bits(backend: str, device: Any) -> None:
    """|shift(sum)| <= 2^b_zo, and with all signs alike it is reached."""
    w = torch.zeros(16, 500, dtype=torch.int8, device=device)
    for b_zo in (1, 3, 5):
        w.zero_()
        update([w], backend, g=[1], b_zo=b_zo, r_max=64, p_zero=0.0)
        assert int(w.abs().max()) == 2**b_zo


def test_several_weights_in_one_call(backend: str, device: Any) -> None:
    params = [int8_weight(name, device) for name in LAYOUTS]
    before = [w.clone() for w in params]
    tensors = [7 * i % len(params) for i in range(len(params))]
    update(params, backend, tensors=tensors, rounding="stochastic")
    for w, old, tensor in zip(params, before, tensors, strict=True):
        assert torch.equal(w.cpu(), updated(old, "stochastic", tensor=tensor))


def test_nothing_to_update(backend: str, device: Any) -> None:
    args = {"tensors": [], "backend": backend}
    key, g = key_on(device), int32([1], device)
    int8_update_([], key, g, **args)
    empty = torch.empty(0, 7, dtype=torch.int8, device=device)
    update([empty], backend)
    assert torch.equal(key, key_on(device)) and g.tolist() == [1] and empty.shape == (0, 7)


def test_weights_outside_the_range_return_into_it(backend: str, device: Any) -> None:
    w = torch.full((5,), -128, dtype=torch.int8, device=device)
    update([w], backend, g=[0])
    assert w.eq(-127).all()


@needs_triton
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_launch_does_not_show(rounding: str, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block sizes, and 64-bit offsets where 32 would do; one launch for all."""
    table = import_module("zo_kernels.triton.table")
    start = [int8_weight(name, device) for name in ("0d", "3x129", "channels-last")]
    first = [w.clone() for w in start]
    update(first, "triton", rounding=rounding)
    for limit, block in ((0, 1024), (2**31 - 1, 256), (0, 2048)):
        monkeypatch.setattr(table, "INT32_MAX", limit)
        monkeypatch.setattr(table, "BLOCK", block)
        monkeypatch.setattr(table, "_TABLES", OrderedDict())
        params = [w.clone() for w in start]
        update(params, "triton", rounding=rounding)
        assert all(map(torch.equal, params, first))


@needs_triton
def test_one_launch(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, kernel = import_module("zo_kernels.triton.int8_weights"), Recorder()
    monkeypatch.setattr(module, "_int8_update_kernel", kernel)
    update([int8_weight(name, device) for name in FEW], "triton")
    assert kernel.grid[0] >= len(FEW) and kernel.kwargs["INT64"] is False


def test_counts_as_a_change(backend: str, device: Any) -> None:
    w = int8_weight("conv2d", device)
    version = w._version
    update([w], backend)
    assert w._version > version
