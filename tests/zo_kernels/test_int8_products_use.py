"""The integer products: registration, signatures, messages, and that no float takes part."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.zo_kernels._int8_operands import int8
from tests.zo_kernels._int8_weights import int32, key_on
from tests.zo_kernels.test_int8_use import NoFloats, op
from zo_kernels import (
    int8_matmul,
    int8_paired_conv1d,
    int8_paired_conv2d,
    int8_paired_linear,
    int8_requantize,
)
from zo_kernels.ops.checks import MAX_DEPTH

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("noisy", [True, False], ids=["noise", "plain"])
def test_opcheck_linear(noisy: bool, shared: bool, backend: str, device: Any) -> None:
    x, w = int8(6, 17, device=device), int8(5, 17, device=device)
    key, tensor = (key_on(device), 3) if noisy else (None, None)
    args = (x, w, key, tensor, 1, 4, shared, 0.25, 9, True, backend)
    torch.library.opcheck(op("int8_paired_linear"), args)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("pool", [False, True], ids=["whole", "pool"])
def test_opcheck_conv2d(pool: bool, last: bool, backend: str, device: Any) -> None:
    """The fake's strides are the real ones in both memory formats."""
    x, w = int8(6, 3, 5, 6, device=device), int8(4, 3, 3, 2, device=device)
    x = x.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    span = (x, w, key_on(device), 3, 1, 4, pool)
    args = (*span, [2, 1], [1, 0], [1, 2], 0.25, 9, True, pool, backend)
    torch.library.opcheck(op("int8_paired_conv2d"), args)


def test_opcheck_matmul(backend: str, device: Any) -> None:
    a, b = int8(7, 5, device=device).mT, int8(7, 9, device=device)
    torch.library.opcheck(op("int8_matmul"), (a, b, backend))


def layers(backend: str) -> Callable[..., tuple[Tensor, ...]]:
    """Two layers of both halves, and the integer backward pass of the second one."""

    def run(x: Tensor, w1: Tensor, w2: Tensor, key: Tensor, exponent: Tensor) -> Any:
        noise = {"p_zero": 0.25, "r_max": 9, "backend": backend}
        acc, bits = int8_paired_conv2d(x, w1, key, tensor=0, shared=True, pool=True, **noise)
        q, e = int8_requantize(acc, bits, exponent, halves=2, relu=True, backend=backend)
        rows = q.flatten(1)
        acc, bits = int8_paired_linear(rows, w2, key, tensor=1, **noise)
        err, e = int8_requantize(acc, bits, e, halves=2, backend=backend)
        plus, half = err[: x.shape[0]], rows[: x.shape[0]]
        back, _ = int8_matmul(plus, w2, backend=backend)
        gradient, _ = int8_matmul(plus.mT, half, backend=backend)
        return q, err, e, back, gradient

    return run


def arguments(device: Any) -> list[Tensor]:
    torch.manual_seed(5)
    shapes = ((4, 3, 6, 7), (5, 3, 3, 3), (6, 20))
    operands = [int8(*shape, device=device) for shape in shapes]
    return [*operands, key_on(device), int32([-20, -20], device)]


def test_compiles_in_one_graph(backend: str, device: Any) -> None:
    """Values equal eager's, for several steps without recompiling."""
    torch._dynamo.reset()
    compiled = torch.compile(layers(backend), fullgraph=True, backend="aot_eager")
    args = arguments(device)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert all(map(torch.equal, layers(backend)(*args), compiled(*args)))
            args[3] = args[3] + torch.tensor([0, 1], device=device)


def test_layers_are_the_same_on_all_backends(backend: str, device: Any) -> None:
    found, want = layers(backend)(*arguments(device)), layers("reference")(*arguments("cpu"))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, want, strict=True))


def test_no_float_takes_part(backend: str, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called as eager mode calls them: under a dispatch mode the ops would be opaque."""
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
    args = arguments(device)
    with NoFloats():
        found = layers(backend)(*args)
    assert {t.dtype for t in found} <= {torch.int8, torch.int32}


KEY, X, W = key_on("cpu"), torch.zeros(4, 7, dtype=torch.int8), torch.zeros(5, 7, dtype=torch.int8)
IMAGES = torch.zeros(4, 3, 5, 5, dtype=torch.int8)
KERNELS = torch.zeros(6, 3, 3, 3, dtype=torch.int8)
DEEP = torch.empty((1, MAX_DEPTH + 1), dtype=torch.int8, device="meta")
TOO_DEEP = f"a sum may have at most {MAX_DEPTH} products in int32, got {MAX_DEPTH + 1}"
MANY = torch.empty((2**32 + 1, 1), dtype=torch.int8, device="meta")


def linear(**kwargs: Any) -> None:
    int8_paired_linear(**{"x": X, "w": W, "key": KEY, "tensor": 0} | kwargs)


def conv(**kwargs: Any) -> None:
    int8_paired_conv2d(**{"x": IMAGES, "w": KERNELS, "key": KEY, "tensor": 0} | kwargs)


def conv1d(**kwargs: Any) -> None:
    int8_paired_conv1d(**{"x": IMAGES[0], "w": KERNELS[0], "key": KEY, "tensor": 0} | kwargs)


def matmul(**kwargs: Any) -> None:
    int8_matmul(**{"a": X, "b": X.mT} | kwargs)


NEAR: dict[str, tuple[Callable[..., None], dict[str, Any], type[Exception], str]] = {
    "w-dtype": (linear, {"w": W.int()}, TypeError, "w must be torch.int8, got torch.int32"),
    "x-dtype": (linear, {"x": X.float()}, TypeError, "x must be torch.int8, got torch.float32"),
    "x-device": (linear, {"x": X.to("meta")}, ValueError, "x must be on cpu, got meta"),
    "w-dims": (linear, {"w": W[0]}, ValueError, "w must have two dimensions, got shape [7]"),
    "x-dims": (linear, {"x": X[0]}, ValueError, "x must have two dimensions, got shape [7]"),
    "x-shape": (linear, {"x": X[:, 1:]}, ValueError, "x must have shape [4, 7], got [4, 6]"),
    "depth": (
        linear,
        {"x": DEEP, "w": DEEP, "key": None},
        ValueError,
        TOO_DEEP,
    ),
    "halves": (
        linear,
        {"start": 2},
        ValueError,
        "halves need 0 <= start < stop, got start=2, stop=2",
    ),
    "rows": (
        linear,
        {"stop": 3},
        ValueError,
        "x must have equally many rows for 3 halves, got 4",
    ),
    "p-zero": (linear, {"p_zero": 1.0}, ValueError, "p_zero must be in [0, 1), got 1.0"),
    "r-max": (linear, {"r_max": 0}, ValueError, "r_max must be in [1, 127], got 0"),
    "key": (linear, {"key": KEY[:1]}, ValueError, "key must have shape [2], got [1]"),
    "tensor": (
        linear,
        {"tensor": None},
        ValueError,
        "tensor must be the index of w in the model, got None",
    ),
    "tensor-range": (
        linear,
        {"tensor": -1},
        ValueError,
        "tensor index must be in [0, 2^32), got -1",
    ),
    "query": (
        linear,
        {"x": X[:0], "start": 2**25, "stop": 2**25 + 1},
        ValueError,
        "query must be in [0, 2^24), got 16777216",
    ),
    "groups": (
        linear,
        {"x": MANY[:2], "w": MANY, "key": KEY.to("meta")},
        ValueError,
        "a tensor may have at most 2^32 groups of noise, got 4294967297 for shape [4294967297, 1]",
    ),
    "conv-dims": (
        conv,
        {"w": W},
        ValueError,
        "w must have four dimensions, got shape [5, 7]",
    ),
    "conv-groups": (
        conv,
        {"w": KERNELS[:, :1]},
        ValueError,
        "w must have the 3 input channels of x (groups are not supported), got shape [6, 1, 3, 3]",
    ),
    "conv-empty": (
        conv,
        {"x": IMAGES[:, :0], "w": KERNELS[:, :0]},
        ValueError,
        "only the batch may be empty, got shapes [4, 0, 5, 5] of x and [6, 0, 3, 3] of w",
    ),
    "conv-depth": (
        conv,
        {
            "x": DEEP.reshape(1, -1, 1, 1),
            "w": DEEP.reshape(1, -1, 1, 1),
            "key": None,
        },
        ValueError,
        TOO_DEEP,
    ),
    "conv-rows": (
        conv,
        {"stop": 3},
        ValueError,
        "x must have equally many rows for 3 halves, got 4",
    ),
    "conv-small": (
        conv,
        {"dilation": 3},
        ValueError,
        "the convolution must give at least 1 x 1 outputs, got -1 x -1 "
        "from shapes [4, 3, 5, 5] of x and [6, 3, 3, 3] of w",
    ),
    "conv-stride": (
        conv,
        {"stride": 0},
        ValueError,
        "stride must be an integer >= 1 or two of them, got 0",
    ),
    "conv1d-dims": (
        conv1d,
        {"x": IMAGES},
        ValueError,
        "x must have three dimensions, got shape [4, 3, 5, 5]",
    ),
    "a-dtype": (matmul, {"a": X.long()}, TypeError, "a must be torch.int8, got torch.int64"),
    "b-dtype": (matmul, {"b": X.long()}, TypeError, "b must be torch.int8, got torch.int64"),
    "b-device": (matmul, {"b": X.to("meta")}, ValueError, "b must be on cpu, got meta"),
    "a-dims": (matmul, {"a": X[0]}, ValueError, "a must have two dimensions, got shape [7]"),
    "b-dims": (matmul, {"b": X[0]}, ValueError, "b must have two dimensions, got shape [7]"),
    "b-shape": (matmul, {"b": X}, ValueError, "b must have shape [7, 7], got [4, 7]"),
    "matmul-depth": (matmul, {"a": DEEP, "b": DEEP.mT}, ValueError, TOO_DEEP),
}


@pytest.mark.parametrize(("call", "change", "raised", "message"), NEAR.values(), ids=NEAR)
def test_message(
    call: Callable[..., None], change: dict[str, Any], raised: type[Exception], message: str
) -> None:
    with pytest.raises(raised, match=f"^{re.escape(message)}$"):
        call(**change)
