"""Layer norm of every half against float64, on every backend; the kernels' launch and edges."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests._budget import assert_within_budget
from tests.zo_kernels._weights import same_bits
from zo_kernels import paired_layer_norm
from zo_kernels.registry import has_triton

pytestmark = pytest.mark.usefixtures("poison")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")

EPSILON = 1e-5
FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"fp32": FP32, "bf16": BF16}
# [rows of a half, ..., columns]: 1, odd, around blocks, several rows and one row a program
SHAPES = {
    "one": (1, 1),
    "one-row": (1, 33),
    "one-column": (5, 1),
    "tokens": (3, 5, 16),
    "block": (4, 1024),
    "beyond": (5, 1025),
    "below": (3, 4095),
    "many-rows": (131, 31),
}


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype = FP32, device: Any = "cpu", halves: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """x `[halves * shape[0], ..., D]`, weight and bias `[halves, D]`."""
    x = 1.5 + 2 * torch.randn(halves * shape[0], *shape[1:], dtype=torch.float64)
    weight, bias = torch.randn(2, halves, shape[-1], dtype=torch.float64)
    return x.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


def torchs(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, halves: int, dtype: torch.dtype
) -> Tensor:
    """Torch's, half by half, in `dtype` with parameters in fp32, or all in float64."""
    wide = torch.float64 if dtype == torch.float64 else FP32
    params = [None if t is None else t.cpu().to(wide) for t in (weight, bias)]
    ys = []
    for h, x_h in enumerate(x.cpu().to(dtype).tensor_split(halves)):
        given = (None if t is None else t[h] for t in params)
        ys.append(F.layer_norm(x_h, x.shape[-1:], *given, EPSILON))
    return torch.cat(ys)


def check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, backend: str, **kwargs: Any
) -> Tensor:
    halves, relu = kwargs.pop("halves", 2), kwargs.get("relu", False)
    before = x.clone()
    given = {"halves": halves, "epsilon": EPSILON, "backend": backend} | kwargs
    y = paired_layer_norm(x, weight, bias, **given)
    assert y.dtype == x.dtype and y.is_contiguous()
    exact, low = (torchs(x, weight, bias, halves, d) for d in (torch.float64, x.dtype))
    if relu:
        exact, low = exact.relu(), low.relu()
    assert_within_budget(y, low, exact)
    assert same_bits(x, before)
    return y


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_twin(shape: Any, dtype: torch.dtype, backend: str, device: Any) -> None:
    check(*inputs(shape, dtype, device), backend)


@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
def test_queries_relu_and_missing_parameters(affine: str, backend: str, device: Any) -> None:
    x, weight, bias = inputs((3, 2, 37), device=device, halves=4)
    w = weight if affine in ("both", "weight") else None
    b = bias if affine in ("both", "bias") else None
    for relu in (False, True):
        check(x, w, b, backend, halves=4, relu=relu)


def test_dtypes_may_differ(backend: str, device: Any) -> None:
    x, weight, bias = inputs((3, 37), BF16, device)
    check(x, weight.float(), bias, backend)
    check(x.float(), weight, bias.float(), backend)


@pytest.mark.parametrize("shape", [(9, 100), (2, 3001)], ids=str)
@pytest.mark.parametrize("kind", ["offset", "outlier-first", "drift"])
def test_ill_conditioned(kind: str, shape: Any, backend: str, device: Any) -> None:
    """A mean of 10^4 standard deviations; a first value, from which moments are taken, far from
    all others; two halves of a row that lie apart."""
    x, weight, bias = inputs(shape, device=device)
    x += 1e4
    if kind == "outlier-first":
        x[:, 0] = -3e4
    elif kind == "drift":
        x[:, shape[1] // 2 :] -= 2e4
    check(x, weight, bias, backend)


def test_the_mean_loses_no_digits(device: Any) -> None:
    """The kernel never rounds a large mean: torch in fp32 is a thousand times as wrong."""
    pytest.importorskip("triton")
    x, weight, bias = inputs((9, 100), device=device)
    x += 1e4
    exact, low = (torchs(x, weight, bias, 2, d) for d in (torch.float64, FP32))
    y = paired_layer_norm(x, weight, bias, halves=2, epsilon=EPSILON, backend="triton").cpu()
    errors = [(t.double() - exact).abs().max().item() for t in (y, low)]
    assert errors[0] <= 8 * 2.0**-24 * exact.abs().max().item() and errors[1] > 100 * errors[0]


def test_rows_are_separate(backend: str, device: Any) -> None:
    x, weight, bias = inputs((3, 40), device=device)
    given = {"halves": 2, "epsilon": EPSILON, "backend": backend}
    clean = paired_layer_norm(x, weight, bias, **given)
    x[1, 0], x[3, 5], x[4, 39] = float("nan"), float("inf"), float("nan")
    for relu in (False, True):
        y = paired_layer_norm(x, weight, bias, relu=relu, **given)
        assert y[[1, 3, 4]].isnan().all()
        want = clean[[0, 2, 5]]
        assert same_bits(y[[0, 2, 5]], want.relu() if relu else want)


def test_constant_rows(backend: str, device: Any) -> None:
    x, weight, bias = inputs((2, 40), device=device)
    x = torch.full_like(x, 3.25)
    assert torch.equal(check(x, weight, bias, backend), bias.repeat_interleave(2, 0))


def test_other_strides_are_copied(backend: str, device: Any) -> None:
    x, weight, bias = inputs((6, 3, 40), device=device)
    check(x[::2, :, ::2], weight[:, ::2], bias[:, ::2], backend)
    check(x.transpose(0, 1).contiguous().transpose(0, 1), weight, bias, backend)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 5)], ids=str)
def test_empty(shape: Any, backend: str, device: Any) -> None:
    x, weight, bias = inputs(shape, device=device)
    given = {"halves": 2, "epsilon": EPSILON, "backend": backend}
    assert paired_layer_norm(x, weight, bias, **given).shape == x.shape


@needs_triton
@pytest.mark.parametrize("cols", [63, 64, 65, 200])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_long_rows(
    cols: int, dtype: torch.dtype, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel that reads rows twice, with blocks of 64."""
    module = importlib.import_module("zo_kernels.triton.layer_norm")
    monkeypatch.setattr(module, "MAX_COLS", 32)
    monkeypatch.setattr(module, "LONG_BLOCK", 64)
    assert module.is_long(cols)
    x, weight, bias = inputs((3, cols), dtype, device)
    check(x, weight, bias, "triton")
    check(x, weight, None, "triton", relu=True)
    check(x, None, None, "triton", halves=1)
    given = {"halves": 2, "epsilon": EPSILON, "backend": "triton"}
    x[1, 0], x[2, cols - 1] = float("nan"), float("inf")
    bad = paired_layer_norm(x, weight, bias, **given).isnan()
    assert bad[1:3].all() and not bad[[0, 3, 4, 5]].any()
    if dtype == FP32:
        check(inputs((3, cols), device=device)[0] + 1e4, weight, bias, "triton")


@needs_triton
@pytest.mark.parametrize("tile", [32, 128, 2048])
def test_tiles(tile: int, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows a program change no bit."""
    module = importlib.import_module("zo_kernels.triton.layer_norm")
    x, weight, bias = inputs((11, 30), device=device)
    first = check(x, weight, bias, "triton")
    monkeypatch.setattr(module, "TILE", tile)
    assert same_bits(first, check(x, weight, bias, "triton"))


def test_odd_rows_are_long_sooner() -> None:
    module = importlib.import_module("zo_kernels.triton.layer_norm")
    assert [module.is_long(n) for n in (8191, 8193, 16383, 16384, 16386)] == [0, 1, 1, 0, 1]
    for cols in (1, 33, 8191, 8193, 16384, 16386, 10**6):
        rows, width, warps = module.tile_for(10**6, cols)
        assert module.is_long(cols) or width >= cols
        assert rows == max(1, module.TILE // width) and width * rows <= 1024 * warps


def test_opcheck(backend: str, device: Any) -> None:
    x, weight, bias = inputs((3, 2, 5), device=device)
    op = torch.ops.zo_kernels.paired_layer_norm.default
    torch.library.opcheck(op, (x, weight, bias, 2, EPSILON, True, backend))
    torch.library.opcheck(op, (x.transpose(1, 2), None, None, 2, EPSILON, False, backend))


def test_compiles_in_one_graph(backend: str, device: Any) -> None:
    torch._dynamo.reset()
    x, weight, bias = inputs((3, 2, 5), device=device)

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = paired_layer_norm(x, weight, bias, halves=2, epsilon=EPSILON, backend=backend)
        return y * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), layer(x, weight, bias))


X, W = torch.zeros(4, 2, 3), torch.zeros(2, 3)
NEAR: dict[str, tuple[Any, type[Exception], str]] = {
    "dtype": (
        {"x": X.double()},
        TypeError,
        "x must be torch.float32 or torch.bfloat16, got torch.float64",
    ),
    "dims": ({"x": W[0]}, ValueError, "x must have at least two dimensions, got shape [3]"),
    "halves": ({"halves": 0}, ValueError, "halves must be at least 1, got 0"),
    "rows": ({"halves": 3}, ValueError, "x must have equally many rows for 3 halves, got 4"),
    "weight": ({"weight": W[0]}, ValueError, "weight must have shape [2, 3], got [3]"),
    "weight-dtype": (
        {"weight": W.double()},
        TypeError,
        "weight must be torch.float32 or torch.bfloat16, got torch.float64",
    ),
    "bias-device": ({"bias": W.to("meta")}, ValueError, "bias must be on cpu, got meta"),
    "epsilon": (
        {"epsilon": float("nan")},
        ValueError,
        "epsilon must be finite and not negative, got nan",
    ),
    "grad": (
        {"x": X.clone().requires_grad_()},
        RuntimeError,
        "x requires grad, and paired_layer_norm has no backward: use torch.no_grad()",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), NEAR.values(), ids=NEAR)
def test_message(change: dict[str, Any], error: type[Exception], message: str) -> None:
    args = {"x": X, "weight": W, "bias": W, "halves": 2, "epsilon": EPSILON} | change
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        paired_layer_norm(backend="reference", **args)
