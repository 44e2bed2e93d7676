"""`paired_linear`: registration, signatures and messages."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.zo_kernels._weights import f64
from tests.zo_kernels.test_paired_linear import (
    BF16,
    EPS,
    inputs,
    key_on,
    run,
)
from zo_kernels.registry import has_triton, interpreted

pytestmark = pytest.mark.usefixtures("poison")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("compute", [None, BF16], ids=["same", "bf16"])
def test_opcheck(shared: bool, compute: Any, backend: str, device: Any) -> None:
    x, w, bias = inputs((3, 5, 7), 3, device=device)
    op = torch.ops.zo_kernels.paired_linear.default
    key, eps = key_on(device), f64(EPS, device)
    rest = ("normal", 0.5, 1.0, "ieee", compute, True, backend)
    torch.library.opcheck(op, (x, w, bias, key, eps, 1, 2, 1, 4, shared, *rest))
    torch.library.opcheck(op, (x, w, None, key, eps, 1, None, 1, 4, shared, *rest))


def test_compiles_in_one_graph(backend: str, device: Any) -> None:
    torch._dynamo.reset()
    x, w, bias = inputs((3, 5, 7), 2, device=device)

    def layer(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        return run(x, w, bias, backend, relu=True) * 2

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w, bias), layer(x, w, bias))


X, W, B = torch.zeros(4, 7), torch.zeros(5, 7), torch.zeros(5)
NEAR: dict[str, tuple[Any, type[Exception], str]] = {
    "w-dtype": (
        {"w": W.double()},
        TypeError,
        "w must be torch.float32 or torch.bfloat16, got torch.float64",
    ),
    "x-dtype": (
        {"x": X.half()},
        TypeError,
        "x must be torch.float32 or torch.bfloat16, got torch.float16",
    ),
    "w-dims": ({"w": B}, ValueError, "w must have two dimensions, got shape [5]"),
    "x-dims": ({"x": B}, ValueError, "x must have two dimensions, got shape [5]"),
    "x-columns": ({"x": W.t()}, ValueError, "x must have shape [7, 7], got [7, 5]"),
    "x-rows": (
        {"stop": 3},
        ValueError,
        "x must have equally many rows for 3 halves, got 4",
    ),
    "x-device": ({"x": X.to("meta")}, ValueError, "x must be on cpu, got meta"),
    "x-grad": (
        {"x": X.clone().requires_grad_()},
        RuntimeError,
        "x requires grad, and paired_linear has no backward: use torch.no_grad()",
    ),
    "bias-shape": ({"bias": B[:4]}, ValueError, "bias must have shape [5], got [4]"),
    "bias-index": (
        {"bias_tensor": None},
        ValueError,
        "bias_tensor must be the index of the bias in the model, got None",
    ),
    "bias-negative": (
        {"bias_tensor": -1},
        ValueError,
        "tensor index must be in [0, 2^32), got -1",
    ),
    "halves": (
        {"start": 2},
        ValueError,
        "halves need 0 <= start < stop, got start=2, stop=2",
    ),
    "noise": (
        {"noise": "bits"},
        ValueError,
        "noise must be one of ('normal', 'rademacher'), got 'bits'",
    ),
    "precision": (
        {"precision": "high"},
        ValueError,
        "precision must be one of ('ieee', 'tf32', 'tf32x3'), got 'high'",
    ),
    "compute": (
        {"compute_dtype": torch.float16},
        TypeError,
        "compute_dtype must be one of (torch.float32, torch.bfloat16), got torch.float16",
    ),
    "query": (
        {"x": X[:0], "start": 2**25, "stop": 2**25 + 1},
        ValueError,
        "query must be in [0, 2^24), got 16777216",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), NEAR.values(), ids=NEAR)
def test_message(change: dict[str, Any], error: type[Exception], message: str) -> None:
    args = {"x": X, "w": W, "bias": B, "backend": "reference"} | change
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        run(**args)


@needs_triton
def test_tf32x3_is_refused_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    if not interpreted():
        pytest.skip("the interpreter stands for the device")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(
        ValueError, match=r"^precision 'tf32x3' needs an NVIDIA GPU; an AMD one has"
    ):
        run(X, W, B, "triton", precision="tf32x3")
