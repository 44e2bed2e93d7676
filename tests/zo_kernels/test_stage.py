"""`stage_` against `update_` followed by `perturbed_weights`, bit for bit, on every backend."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.zo_kernels._weights import ALL, FEW, IN_PLACE, VIEWS, f64, same_bits
from zo_kernels import perturbed_weights, stage_, update_
from zo_kernels.registry import has_triton

pytestmark = pytest.mark.usefixtures("poison")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
NOISES = ("normal", "rademacher")
SEED, STEP, EPS = 2**40 + 7, 2**31 + 9, 0.5


def key_of(step: int, device: Any) -> Tensor:
    return torch.tensor([SEED, step], device=device)


def halves_of(params: list[Tensor], count: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Room for the halves of all weights, one behind the other in one memory a dtype."""
    outs: list[Tensor] = []
    for kind in [dtype] if dtype else dict.fromkeys(w.dtype for w in params):
        members = [w for w in params if dtype or w.dtype == kind]
        memory = torch.full((sum(count * w.numel() for w in members),), float("nan"), dtype=kind)
        memory, at = memory.to(params[0].device), 0
        for w in members:
            strides = torch.empty_like(w, device="meta").stride()
            out = memory.as_strided((count, *w.shape), (w.numel(), *strides), at)
            at += count * w.numel()
            outs.append((w, out))
    return [next(out for v, out in outs if v is w) for w in params]


def names(params: list[Tensor]) -> dict[str, Any]:
    count = len(params)
    return {
        "tensors": [2**31 + i for i in range(count)],
        "scales": [0.5 + i for i in range(count)],
    }


def update_of(params: list[Tensor], skip: float = 0.0) -> dict[str, Any]:
    device = params[0].device
    return {
        "before": key_of(STEP - 1, device),
        "coeff": f64([0.5, -2.0], device),
        "lr": f64([0.1, 0.25], device),
        "weight_decay": f64([0.0, 0.5], device),
        "skip": torch.tensor(skip, device=device),
        "groups": [i % 2 for i in range(len(params))],
    }


def staged(params: list[Tensor], backend: str, count: int = 2, **kwargs: Any) -> list[Tensor]:
    dtype = kwargs.pop("dtype", None)
    outs = halves_of(params, count, dtype)
    device = params[0].device
    args = {"start": 0, "stop": count, "backend": backend, **names(params)} | kwargs
    stage_(outs, params, key_of(STEP, device), f64(EPS, device), **args)
    return outs


def apart(params: list[Tensor], backend: str, count: int = 2, **kwargs: Any) -> list[Tensor]:
    """The same by the plain ops: an update of everything, then weight by weight."""
    device, noise = params[0].device, kwargs.get("noise", "normal")
    named = names(params) | {k: v for k, v in kwargs.items() if k in ("tensors", "scales")}
    if "before" in kwargs:
        args = [kwargs[k] for k in ("before", "coeff", "lr", "weight_decay", "skip")]
        given = named | {"groups": kwargs["groups"], "noise": noise, "backend": backend}
        update_(params, *args, **given)
    start = kwargs.get("start", 0)
    return [
        perturbed_weights(
            *(w, key_of(STEP, device), f64(EPS, device)),
            **{"tensor": tensor, "scale": scale, "noise": noise, "dtype": kwargs.get("dtype")},
            **{"start": start, "stop": kwargs.get("stop", start + count), "backend": backend},
        )
        for w, tensor, scale in zip(params, named["tensors"], named["scales"], strict=True)
    ]


def check(params: list[Tensor], backend: str, **kwargs: Any) -> None:
    others = [w.detach().clone(memory_format=torch.preserve_format) for w in params]
    for w, other in zip(params, others, strict=True):
        other.copy_(w)
    halves, wanted = staged(params, backend, **kwargs), apart(others, backend, **kwargs)
    assert all(same_bits(a, b) for a, b in zip(halves, wanted, strict=True))
    assert all(same_bits(a, b) for a, b in zip(params, others, strict=True))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_many_weights_of_every_layout(
    dtype: torch.dtype, noise: str, backend: str, device: Any
) -> None:
    check([make(dtype, device) for make in ALL.values()], backend, noise=noise)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_pending_update_comes_first(dtype: torch.dtype, backend: str, device: Any) -> None:
    noise = "rademacher" if dtype == torch.bfloat16 else "normal"
    params = [make(dtype, device) for make in IN_PLACE.values()]
    before = [w.clone() for w in params]
    check(params, backend, noise=noise, **update_of(params))
    moved = [not torch.equal(a, b) for a, b in zip(params, before, strict=True) if a.numel()]
    assert all(moved)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_skipped_update_leaves_every_bit(dtype: torch.dtype, backend: str, device: Any) -> None:
    params = [make(dtype, device) for make in FEW.values()]
    params[1][0, 0] = -0.0
    params[1][0, 1] = float("nan")
    before = [w.clone() for w in params]
    check(params, backend, **update_of(params, skip=1.0))
    assert all(same_bits(a, b) for a, b in zip(params, before, strict=True))


@pytest.mark.parametrize("make", VIEWS.values(), ids=VIEWS)
def test_one_weight_alone(make: Any, backend: str, device: Any) -> None:
    for pending in (False, True):
        params = [make(torch.float32, device)]
        check(params, backend, **(update_of(params) if pending else {}))


@pytest.mark.parametrize(("start", "stop"), [(1, 2), (1, 4), (2, 3), (3, 6)])
def test_ranges_of_halves(start: int, stop: int, backend: str, device: Any) -> None:
    params = [make(torch.float32, device) for make in FEW.values()]
    check(params, backend, count=stop - start, start=start, stop=stop)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_output_dtype(dtype: torch.dtype, backend: str, device: Any) -> None:
    params = [make(torch.float32, device) for make in FEW.values()]
    check(params, backend, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("cols", [33, 128])
def test_slices_of_rows(
    cols: int, noise: str, dtype: torch.dtype, backend: str, device: Any
) -> None:
    """A weight in parts is the weight as a whole, the update's rounding included."""
    w = torch.randn(70, cols, dtype=torch.float64).to(device, dtype)
    parts, pending = w.clone(), update_of([w])
    (whole,) = staged([w], backend, noise=noise, **pending)
    for first, last in ((0, 5), (5, 64), (64, 70)):
        given = {"first_row": first, "noise": noise, **pending}
        (halves,) = staged([parts[first:last]], backend, **given)
        assert same_bits(halves, whole[:, first:last])
    assert same_bits(parts, w)


def test_large_weights_on_threads(backend: str, device: Any) -> None:
    if backend != "numba":
        pytest.skip("threads are the CPU twin's")
    w = torch.randn(600, 1030)
    check([w, torch.randn(3)], backend, **update_of([w, w]))
    (whole,) = staged([w.clone()], backend)
    (part,) = staged([w[7:].clone()], backend, first_row=7)
    assert same_bits(part, whole[:, 7:])


@needs_triton
def test_launches(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all weights of a dtype; block sizes and 64-bit offsets do not show."""
    module = import_module("zo_kernels.triton.stage")
    table = import_module("zo_kernels.triton.table")
    kernel, launches = module._stage_kernel, []

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, "_stage_kernel", Counted())

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        table._TABLES.clear()
        params = [m(torch.bfloat16, device) for n, m in FEW.items() if n != "sliced-kernel"]
        return staged(params, "triton", **update_of(params)) + params

    first = run()
    assert len(launches) == 1
    for name, value in (("INT32_MAX", 0), ("BLOCK", 256), ("BLOCK", 2048)):
        monkeypatch.setattr(table, name, value)
        assert all(same_bits(a, b) for a, b in zip(first, run(), strict=True)), (name, value)


@needs_triton
def test_tables_in_use_can_be_held(device: Any) -> None:
    table = import_module("zo_kernels.triton.table")
    w = torch.randn(3, 4, device=device)
    with table.hold_tables() as held:
        staged([w], "triton")
    staged([w], "triton")
    assert len(held) == 1 and held[0].fields[0, 0] == w.data_ptr()


def call(**kwargs: Any) -> Any:
    w = torch.zeros(3, 4)
    args: dict[str, Any] = {"outs": [torch.zeros(2, 3, 4)], "params": [w], "tensors": [0]}
    args |= {"key": torch.tensor([1, 2]), "eps": f64(0.1, "cpu"), "scales": [1.0]} | kwargs
    return stage_(**args)


PENDING = update_of([torch.zeros(3, 4)])
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "lengths": ({"tensors": []}, ValueError, "must have one length, got 1, 1, 0, 1"),
    "halves": ({"start": 2}, ValueError, "halves need 0 <= start < stop, got start=2, stop=2"),
    "first-row": ({"first_row": -1}, ValueError, "first_row must be >= 0, got -1"),
    "shape": (
        {"outs": [torch.zeros(1, 3, 4)]},
        ValueError,
        "outs[0] must have shape [2, 3, 4], got [1, 3, 4]",
    ),
    "dtype": ({"outs": [torch.zeros(2, 3, 4).int()]}, TypeError, "outs[0] must be torch.float32"),
    "weight": ({"params": [torch.zeros(3, 4).half()]}, TypeError, "params[0] must be"),
    "expanded": (
        {"outs": [torch.zeros(2, 3, 1).expand(2, 3, 4)]},
        ValueError,
        "outs[0] is changed in place and must not be expanded",
    ),
    "tensor": ({"tensors": [-1]}, ValueError, "tensor index must be in [0, 2^32), got -1"),
    "noise": ({"noise": "uniform"}, ValueError, "noise must be one of"),
    "part-of-an-update": (
        {"before": torch.tensor([1, 2])},
        ValueError,
        "a pending update needs before, coeff, lr, weight_decay, skip and a group for each weight, "
        "got [[2], None, None, None, None] and 0 groups for 1 weights",
    ),
    "group": (PENDING | {"groups": [2]}, ValueError, "groups[0] must be in [0, 2), got 2"),
    "skip": (PENDING | {"skip": torch.zeros(1)}, ValueError, "skip must have shape [], got [1]"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    given, error, message = ERRORS[name]
    with pytest.raises(error) as caught:
        call(**given)
    assert message in str(caught.value)


def test_a_weight_that_requires_grad_takes_no_update() -> None:
    with pytest.raises(RuntimeError, match="changed in place and requires grad"):
        call(params=[torch.zeros(3, 4, requires_grad=True)], **PENDING)


def test_opcheck(backend: str, device: Any) -> None:
    params = [make(torch.float32, device) for make in FEW.values()]
    outs, named = halves_of(params, 2), names(params)
    key, eps = key_of(STEP, device), f64(EPS, device)
    given = update_of(params)
    rest = [given[k] for k in ("before", "coeff", "lr", "weight_decay", "skip", "groups")]
    args = (named["tensors"], named["scales"], 0, 2, 0, "normal", *rest, "sgd", [], None, backend)
    op = torch.ops.zo_kernels.stage_.default
    torch.library.opcheck(op, (outs, params, key, eps, *args))
