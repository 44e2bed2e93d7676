"""`update_` against float64, on every backend and layout; groups, skipping, tables, launches."""

from __future__ import annotations

from collections import OrderedDict
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from tests._budget import NORMAL_ERROR, assert_rounded, assert_within_budget
from tests.zo_kernels._noise_model import model
from tests.zo_kernels._weights import FEW, IN_PLACE, LAYOUTS, VIEWS, f64, same_bits, storage
from zo_kernels import update_
from zo_kernels.registry import has_triton

pytestmark = pytest.mark.usefixtures("poison")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")

SEED, STEP = 2**40 + 7, 2**31 + 9
TENSOR = 2**31 + 5
COEFF, LR, DECAY, SCALE = [0.5, -2.0, 0.75], 0.1, 0.3, 0.7
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
NOISES = ("normal", "rademacher")


def update(params: list[Tensor], backend: str, **kwargs: Any) -> None:
    """`update_` with a value for everything a test does not name."""
    device = params[0].device
    args: dict[str, Any] = {
        "coeff": COEFF,
        "lr": [LR],
        "decay": [DECAY],
        "skip": 0.0,
        "tensors": [TENSOR + i for i in range(len(params))],
        "groups": [0] * len(params),
        "scales": [SCALE] * len(params),
    } | kwargs
    update_(
        params,
        torch.tensor([SEED, STEP], device=device),
        f64(args.pop("coeff"), device),
        f64(args.pop("lr"), device),
        f64(args.pop("decay"), device),
        torch.tensor(args.pop("skip"), dtype=torch.float32, device=device),
        backend=backend,
        **args,
    )


def updated(
    w: Tensor,
    dtype: torch.dtype = torch.float64,
    tensor: int = TENSOR,
    coeff: Any = COEFF,
    lr: float = LR,
    decay: float = DECAY,
    scale: float = SCALE,
    noise: str = "normal",
) -> Tensor:
    """The new weight computed in `dtype`: float64 is exact, fp32 plain torch."""
    w = w.detach().cpu().to(dtype)
    total = torch.zeros_like(w)
    for q, c in enumerate(coeff):
        z = model(w.shape, SEED, STEP, tensor=tensor, query=q, noise=noise)
        total += c * z.to(torch.float32 if dtype == torch.float32 else torch.float64)
    return w - lr * (scale * total + decay * w)


def noise_error(coeff: Any = COEFF, lr: float = LR, scale: float = SCALE) -> float:
    return lr * abs(scale) * sum(map(abs, coeff)) * NORMAL_ERROR


def check(actual: Tensor, before: Tensor, **kwargs: Any) -> None:
    """bf16 is rounded to one of its neighbours, the others within their budget."""
    exact = updated(before, **kwargs)
    if actual.dtype == torch.bfloat16:
        assert_rounded(actual, exact, 1.0, extra=noise_error() + 1e-6)
    else:
        plain = updated(before, torch.float32, **kwargs).to(actual.dtype)
        if actual.dtype == torch.float64 and kwargs.get("noise") == "rademacher":
            plain = exact
        extra = 0.0 if kwargs.get("noise") == "rademacher" else noise_error()
        assert_within_budget(actual, plain, exact, extra)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("make", IN_PLACE.values(), ids=IN_PLACE)
def test_twin(make: Any, dtype: torch.dtype, noise: str, backend: str, device: Any) -> None:
    w = make(dtype, device)
    before, around = w.clone(), storage(w).clone()
    update([w], backend, noise=noise)
    check(w, before, noise=noise)
    after = w.clone()
    w.copy_(before)
    assert same_bits(storage(w), around), "memory around the weight was written"
    if w.numel():
        assert not torch.equal(after, before)


@pytest.mark.parametrize("queries", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_number_of_queries(dtype: torch.dtype, queries: int, backend: str, device: Any) -> None:
    w = FEW["conv2d"](dtype, device)
    before = w.clone()
    update([w], backend, coeff=COEFF[:queries])
    check(w, before, coeff=COEFF[:queries])


def test_groups_dtypes_and_scales_in_one_call(backend: str, device: Any) -> None:
    makes = list(FEW.values())
    dtypes = [*DTYPES.values()] * 2
    params = [make(dtype, device) for make, dtype in zip(makes, dtypes, strict=True)]
    before = [w.clone() for w in params]
    tensors, groups = [9, 0, 2**32 - 1, 4, 3, 2], [2, 0, 1, 1, 0, 2]
    scales = [0.1, 1.0, -2.0, 0.0, 0.5, 3.0]
    lr, decay = [0.1, 0.05, 0.2], [0.0, 0.3, 0.1]
    update(params, backend, tensors=tensors, groups=groups, scales=scales, lr=lr, decay=decay)
    for i, w in enumerate(params):
        g = groups[i]
        args: Any = {"tensor": tensors[i], "scale": scales[i], "lr": lr[g], "decay": decay[g]}
        exact = updated(before[i], **args)
        extra = noise_error(lr=lr[g], scale=scales[i]) + 2e-6
        assert_rounded(w, exact, 1.0 if w.dtype == torch.bfloat16 else 0.5, extra)


def test_together_is_one_by_one(backend: str, device: Any) -> None:
    """Bit for bit: neighbours in the launch, and their order, do not show."""
    makes = list(LAYOUTS.values())
    together = [make(torch.float32, device) for make in makes]
    single = [w.clone() for w in together]
    tensors = list(range(len(makes)))
    update(together[::-1], backend, tensors=tensors[::-1])
    for w, tensor in zip(single, tensors, strict=True):
        update([w], backend, tensors=[tensor])
    assert all(same_bits(a, b) for a, b in zip(together, single, strict=True))


@pytest.mark.parametrize("name", VIEWS)
def test_memory_format_does_not_show(name: str, backend: str, device: Any) -> None:
    w = VIEWS[name](torch.bfloat16, device)
    flat = w.clone(memory_format=torch.contiguous_format)
    for x in (w, flat):
        update([x], backend)
    assert torch.equal(w, flat)


@pytest.mark.parametrize("skip", [1.0, -1.0, float("nan")])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_skipped_step_leaves_all_bits(
    dtype: torch.dtype, skip: float, backend: str, device: Any
) -> None:
    """-0.0, infinities, and a NaN's payload included, whatever the coefficients are."""
    special = torch.tensor([-0.0, 0.0, float("inf"), float("-inf"), float("nan"), 1e-40, 3.0])
    w = special.repeat(20).to(device, dtype)
    w.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[w.element_size()])[4] |= 3
    before = w.clone()
    update([w], backend, skip=skip, coeff=[float("nan"), float("inf")])
    assert same_bits(w, before)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_zero_rate_changes_no_value(
    dtype: torch.dtype, noise: str, backend: str, device: Any
) -> None:
    """In bf16 too: what bf16 represents is never rounded away."""
    w = FEW["conv2d"](dtype, device)
    before = w.clone()
    update([w], backend, lr=[0.0], noise=noise)
    assert torch.equal(w, before)


def test_the_version_counter_moves(backend: str, device: Any) -> None:
    """Autograd then notices a weight saved for backward and changed since."""
    w = torch.randn(3, 4, device=device)
    version = w._version
    update([w], backend)
    assert w._version > version


def test_no_parameters(backend: str, device: Any) -> None:
    one = torch.ones(1, dtype=torch.float64, device=device)
    key, skip = torch.tensor([1, 2], device=device), torch.zeros((), device=device)
    update_([], key, one, one, one, skip, tensors=[], groups=[], scales=[], backend=backend)
    assert key.tolist() == [1, 2] and float(one) == 1.0 and float(skip) == 0.0


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """zo_kernels.triton.table with an empty cache."""
    module = import_module("zo_kernels.triton.table")
    monkeypatch.setattr(module, "_TABLES", OrderedDict())
    return module


@needs_triton
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_launch_does_not_show(
    dtype: torch.dtype, noise: str, device: Any, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block sizes, and 64-bit offsets where 32 would do."""

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        module._TABLES.clear()
        params = [make(dtype, device) for make in FEW.values()]
        update(params, "triton", noise=noise)
        return params

    first = run()
    for name, value in (("INT32_MAX", 0), ("BLOCK", 256), ("BLOCK", 2048)):
        monkeypatch.setattr(module, name, value)
        assert all(same_bits(a, b) for a, b in zip(first, run(), strict=True)), (name, value)


@needs_triton
def test_one_launch_a_dtype(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("zo_kernels.triton.update")
    kernel, launches = module._update_kernel, []

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, "_update_kernel", Counted())
    params = [make(torch.float32, device) for make in FEW.values()]
    update(params, "triton")
    assert len(launches) == 1
    update([*params, FEW["conv2d"](torch.bfloat16, device)], "triton")
    assert len(launches) == 3


@needs_triton
def test_the_table_follows_its_parameters(device: Any, module: Any) -> None:
    """Kept while nothing moves; made again for new memory, shape, strides or index."""
    w = torch.nn.Parameter(torch.randn(6, 4, 3, 3, device=device), requires_grad=False)

    def step(**kwargs: Any) -> None:
        before = w.detach().clone()
        update([w], "triton", **kwargs)
        check(w, before, tensor=kwargs.get("tensors", [TENSOR])[0])

    step()
    step()
    assert len(module._TABLES) == 1
    w.data = torch.randn(6, 4, 3, 3, device=device)
    step()
    w.data = w.data.to(memory_format=torch.channels_last)
    step()
    w.data = w.data[:4]
    step()
    step(tensors=[1])
    assert len(module._TABLES) == 5


@needs_triton
def test_old_tables_are_dropped(device: Any, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TABLES", 4)
    params = [torch.randn(3, 5, device=device) for _ in range(module.MAX_TABLES + 3)]
    for w in params * 2:
        before = w.clone()
        update([w], "triton")
        check(w, before)
        update([params[0]], "triton")  # in use all the time: stays
    assert len(module._TABLES) == module.MAX_TABLES
    assert any(params[0].data_ptr() == s[0][0][0] for s in module._TABLES)
