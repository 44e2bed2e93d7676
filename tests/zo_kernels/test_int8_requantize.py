"""`int8_range` and `int8_requantize` against Python's integers, on every backend and layout."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.zo_kernels._int8_weights import accumulator, int32, key_on
from tests.zo_kernels._integer_model import ROUNDINGS, bits, clip, rounded
from tests.zo_kernels._noise_model import model
from tests.zo_kernels._weights import ALL, FEW
from tests.zo_kernels.test_layout import Recorder
from zo_kernels import int8_range, int8_requantize
from zo_kernels.registry import has_triton

pytestmark = pytest.mark.usefixtures("poison")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")

TENSOR, QUERY = 2**31 + 5, 3
SETTINGS = {"tensor": TENSOR, "query": QUERY}


def words_of(shape: Any) -> Tensor:
    seed, step = key_on("cpu").tolist()
    where = {"tensor": TENSOR, "query": QUERY, "noise": "bits", "purpose": "rounding"}
    return model(shape, seed, step, **where)


def exact(acc: Tensor, rounding: str, halves: int = 1, relu: bool = False) -> tuple[Any, Any]:
    """(q, shifts) by the model; all halves share the words of one."""
    parts = acc.cpu().long().reshape(halves, -1)
    words = words_of(acc.shape if halves == 1 else (acc.shape[0] // halves, *acc.shape[1:]))
    rows, shifts = [], []
    for part in parts.tolist():
        s = max(bits(max(map(abs, part), default=0)) - 7, 0)
        pairs = zip(part, words.reshape(-1).tolist(), strict=True)
        q = [clip(rounded(x, s, rounding, w)) for x, w in pairs]
        rows.append([max(x, 0) for x in q] if relu else q)
        shifts.append(s)
    return torch.tensor(rows, dtype=torch.int8).reshape(acc.shape), shifts


CASES = [(name, "stochastic") for name in ALL] + [(name, r) for name in FEW for r in ROUNDINGS[:2]]


@pytest.mark.parametrize(("name", "rounding"), CASES)
def test_twin(name: str, rounding: str, backend: str, device: Any) -> None:
    acc = accumulator(name, device)
    before = acc.clone()
    key, exponent = key_on(device), int32(-5, device)
    args = {"rounding": rounding, "key": key, "backend": backend} | SETTINGS
    q, e = int8_requantize(acc, None, exponent, weight_exponent=int32([3], device), **args)
    want, (s,) = exact(acc, rounding)
    assert q.dtype == torch.int8 and e.dtype == torch.int32 and e.shape == ()
    assert torch.equal(q.cpu(), want) and int(e) == s - 2
    assert q.stride() == torch.empty_like(acc).stride() and torch.equal(acc, before)
    found = int8_range(acc, backend=backend)
    assert found.shape == () and int(found) == bits(int(acc.abs().max()) if acc.numel() else 0)


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("halves", [1, 2, 6])
def test_halves_have_their_own_exponents(
    halves: int, rounding: str, relu: bool, backend: str, device: Any
) -> None:
    acc = torch.randint(-(2**20), 2**20, (6, 5, 7), dtype=torch.int32, device=device)
    acc[0] >>= 9
    acc[4:] >>= 4
    acc[5] = 0
    exponents = int32(range(halves), device)
    args = {"rounding": rounding, "key": key_on(device), "halves": halves, "backend": backend}
    q, e = int8_requantize(acc, None, exponents, relu=relu, **args, **SETTINGS)
    want, shifts = exact(acc, rounding, halves, relu)
    assert torch.equal(q.cpu(), want)
    assert e.tolist() == [s + i for i, s in enumerate(shifts)]
    measured = int8_range(acc, halves=halves, backend=backend)
    again, _ = int8_requantize(acc, measured, exponents, relu=relu, **args, **SETTINGS)
    assert measured.shape == (halves,) and torch.equal(again, q)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_stacked_is_sequential(rounding: str, backend: str, device: Any) -> None:
    """Halves share their noise: each alone gives what it gives in the stack."""
    acc = torch.randint(-(2**18), 2**18, (6, 3, 4), dtype=torch.int32, device=device)
    args = {"rounding": rounding, "key": key_on(device), "backend": backend} | SETTINGS
    exponent = int32(0, device)
    q, e = int8_requantize(acc, None, exponent, halves=2, **args)
    for half in range(2):
        alone, e_alone = int8_requantize(acc[3 * half : 3 * half + 3], None, exponent, **args)
        assert torch.equal(alone, q[3 * half : 3 * half + 3]) and e_alone == e[half]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("view", ["channels-last", "sliced", "transposed"])
def test_memory_format_does_not_show(view: str, rounding: str, backend: str, device: Any) -> None:
    acc = torch.randint(-(2**18), 2**18, (4, 3, 5, 6), dtype=torch.int32, device=device)
    views = {
        "channels-last": lambda t: t.to(memory_format=torch.channels_last),
        "sliced": lambda t: torch.stack([t, t], 4)[..., 0][:, :, ::2, :5],
        "transposed": lambda t: t.transpose(2, 3),
    }
    x = views[view](acc)
    args = {"rounding": rounding, "key": key_on(device), "halves": 2, "backend": backend}
    q, e = int8_requantize(x, None, int32(0, device), **args, **SETTINGS)
    plain, e_plain = int8_requantize(x.contiguous(), None, int32(0, device), **args, **SETTINGS)
    assert torch.equal(q, plain) and torch.equal(e, e_plain)
    assert q.stride() == torch.empty_like(x).stride()


def test_too_few_bits_saturate(backend: str, device: Any) -> None:
    acc = int32([-(2**31), -(2**15), -300, -128, 127, 128, 300, 2**31 - 1], device)
    for given, s in ((0, 0), (7, 0), (8, 1), (31, 24), (45, 31), (99, 31)):
        args = {"backend": backend}
        q, e = int8_requantize(acc, int32(given, device), int32(1, device), **args)
        assert q.tolist() == [clip(rounded(x, s, "nearest")) for x in acc.tolist()]
        assert int(e) == 1 + s


@pytest.mark.parametrize("shape", [(0,), (0, 3), (4, 0)], ids=str)
def test_empty(shape: tuple[int, ...], backend: str, device: Any) -> None:
    acc = torch.empty(shape, dtype=torch.int32, device=device)
    assert int(int8_range(acc, backend=backend)) == 0
    halves = 2
    assert int8_range(acc, halves=halves, backend=backend).tolist() == [0, 0]
    weight = int32([2], device)
    args = {"weight_exponent": weight, "halves": halves, "backend": backend}
    q, e = int8_requantize(acc, None, int32([3, 4], device), **args)
    assert q.shape == acc.shape and e.tolist() == [5, 6]
    q, e = int8_requantize(acc, int32(9, device), int32(3, device), backend=backend)
    assert e.shape == () and int(e) == 5


def test_zeros_and_ones(backend: str, device: Any) -> None:
    """A tensor of zeros needs no bits and keeps its exponent."""
    for value in (0, 1, -1):
        acc = torch.full((5, 3), value, dtype=torch.int32, device=device)
        assert int(int8_range(acc, backend=backend)) == 0
        q, e = int8_requantize(acc, None, int32(-9, device), backend=backend)
        assert q.eq(value).all() and int(e) == -9


@needs_triton
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", FEW)
def test_launch_does_not_show(
    name: str, rounding: str, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block sizes, and 64-bit offsets where 32 would do."""
    acc = accumulator(name, device)
    args = {"rounding": rounding, "key": key_on(device), "backend": "triton"} | SETTINGS
    q, e = int8_requantize(acc, None, int32(0, device), **args)
    module = import_module("zo_kernels.triton.int8_range")
    for limit, block in ((0, 2048), (2**31 - 1, 64), (2**31 - 1, 512), (0, 4096)):
        monkeypatch.setattr(module, "INT32_MAX", limit)
        for name in ("BLOCK", "RANGE_BLOCK"):
            monkeypatch.setattr(module, name, block)
        again, e_again = int8_requantize(acc, None, int32(0, device), **args)
        assert torch.equal(q, again) and torch.equal(e, e_again)


@needs_triton
@pytest.mark.parametrize(
    ("shape", "strides", "wide"),
    [((2, 1000), None, False), ((2, 2**30), None, True), ((4, 8), (2**30, 1), True)],
    ids=["small", "large", "gaps"],
)
def test_knows_when_offsets_need_64_bits(
    shape: Any, strides: Any, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, kernel = import_module("zo_kernels.triton.int8_range"), Recorder()
    monkeypatch.setattr(module, "_requantize_kernel", kernel)
    acc = torch.empty(shape, dtype=torch.int32, device="meta")
    acc = acc if strides is None else acc[:1, :1].as_strided(shape, strides)
    out = torch.empty(shape, dtype=torch.int8, device="meta")
    one = torch.empty((), dtype=torch.int32, device="meta")
    module._launch(acc, out, one, (one, None, one), (None, 0, 0), 2, "nearest", False)
    assert kernel.kwargs["INT64"] is wide
    if strides is None:
        kernel = Recorder()
        monkeypatch.setattr(module, "_range_kernel", kernel)
        module.int8_range(acc, halves=2)
        assert kernel.kwargs["INT64"] is wide


@needs_triton
def test_a_half_may_begin_beyond_int32(device: Any, tmp_path: Path) -> None:
    """Half 1 lies 2^31 elements behind half 0."""
    distance = 1 << 31
    if device.type == "cuda":
        if torch.cuda.mem_get_info()[0] < 12 << 30:
            pytest.skip("needs 12 GiB")
        memory = torch.empty(distance + 64, dtype=torch.int32, device=device)
    else:  # a sparse file: only the pages written exist
        file = np.memmap(tmp_path / "halves", np.int32, "w+", shape=(distance + 64,))
        memory = torch.from_numpy(file)
    acc = memory.as_strided((2, 64), (distance, 1))
    acc.copy_(torch.randint(-(2**20), 2**20, (2, 64)))
    args = {"halves": 2, "backend": "triton", "rounding": "pseudo"}
    q, e = int8_requantize(acc, int32([20, 19], device), int32(0, device), **args)
    want = int8_requantize(acc.clone(), int32([20, 19], device), int32(0, device), **args)
    assert torch.equal(q, want[0]) and torch.equal(e, want[1])


def test_stochastic_is_unbiased_over_steps(backend: str, device: Any) -> None:
    """n draws of a fraction f: the mean lies within 5 sigma, sigma^2 = f (1 - f) / n."""
    steps, width = 8, 1024
    acc = torch.tensor([2**11, 515, -515, 8, -3 * 16 - 5], dtype=torch.int32, device=device)
    acc = acc.repeat_interleave(width)
    total = torch.zeros(acc.shape, dtype=torch.int64, device=device)
    for step in range(steps):
        args = {"rounding": "stochastic", "key": key_on(device, step), "backend": backend}
        q, e = int8_requantize(acc, None, int32(0, device), **args)
        assert int(e) == 4
        total += q
    n = steps * width
    for x, mean in zip([515, -515, 8, -53], (total.view(5, width).sum(1) / n)[1:], strict=True):
        f = abs(x) / 16 % 1
        assert abs(float(mean) - x / 16) <= 5 * (f * (1 - f) / n) ** 0.5
