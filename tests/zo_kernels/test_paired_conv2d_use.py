"""`paired_conv2d` and `paired_conv1d`: registration, signatures, messages; the one in the other."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests._budget import assert_within_budget
from tests.zo_kernels._noise_model import model
from tests.zo_kernels._weights import f64
from tests.zo_kernels.test_paired_conv2d import inputs, noise_error, run
from tests.zo_kernels.test_paired_linear import (
    BF16,
    BIAS_SCALE,
    BIAS_TENSOR,
    EPS,
    NOISES,
    SCALE,
    SEED,
    STEP,
    TENSOR,
    key_on,
)
from zo_kernels import paired_conv1d, perturbed_weights
from zo_kernels.registry import has_triton, interpreted

pytestmark = pytest.mark.usefixtures("poison")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")
SIZES = (2, 3, 4, (5, 6), (3, 2))


@pytest.mark.parametrize(
    ("shared", "compute", "last"),
    [(False, None, True), (True, BF16, False), (True, None, True)],
    ids=["channels-last", "shared-bf16", "shared-channels-last"],
)
def test_opcheck(shared: bool, compute: Any, last: bool, backend: str, device: Any) -> None:
    """The fake's strides are the real ones in both memory formats."""
    x, w, bias = inputs(SIZES, 3, device=device)
    x = x.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    op = torch.ops.zo_kernels.paired_conv2d.default
    key, eps = key_on(device), f64(EPS, device)
    rest = ([2, 1], [1, 0], [1, 2], "normal", 0.5, 1.0, "ieee", compute, True)
    torch.library.opcheck(op, (x, w, bias, key, eps, 1, 2, 1, 4, shared, *rest, False, backend))
    torch.library.opcheck(op, (x, w, None, key, eps, 1, None, 1, 4, shared, *rest, True, backend))


def run1d(x: Tensor, w: Tensor, bias: Tensor | None, backend: str, **kwargs: Any) -> Tensor:
    args = {"tensor": TENSOR, "bias_tensor": BIAS_TENSOR, "scale": SCALE}
    args |= {"bias_scale": BIAS_SCALE, "backend": backend} | kwargs
    return paired_conv1d(x, w, bias, key_on(w.device), f64(EPS, w.device), **args)


def test_compiles_in_one_graph(backend: str, device: Any) -> None:
    torch._dynamo.reset()
    x, w, bias = inputs(SIZES, 2, device=device)

    def layers(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
        y = run(x, w, bias, backend, relu=True, padding=1, stride=(1, 2), pool=True)
        return run1d(x[:, :, 0], w[:, :, 0], bias, backend).sum() + y * 2

    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w, bias), layers(x, w, bias))


GEOMETRIES: dict[str, dict[str, int]] = {
    "plain": {},
    "everything": {"stride": 2, "padding": 3, "dilation": 2},
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("shape", [(4, 3, 3), (3, 32, 2)], ids=str)
@pytest.mark.parametrize("noise", NOISES)
def test_1d(noise: str, shape: Any, geometry: Any, backend: str, device: Any) -> None:
    """Against F.conv1d of float64, and of the weights that staging writes, which are 3-d."""
    x, w = torch.randn(2 * 2, shape[1], 9, device=device), torch.randn(shape, device=device)
    bias = torch.randn(shape[0], device=device)
    y = run1d(x, w, bias, backend, noise=noise, relu=True, **geometry)
    exact, low = [], []
    for half, rows in enumerate(x.tensor_split(2)):
        sign, given = EPS * (-1) ** half, {"noise": noise}
        z = SCALE * model(w.shape, SEED, STEP, tensor=TENSOR, **given).to(device)
        z_bias = BIAS_SCALE * model(bias.shape, SEED, STEP, tensor=BIAS_TENSOR, **given).to(device)
        args = rows.double(), w.double() + sign * z, bias.double() + sign * z_bias
        exact.append(F.conv1d(*args, **geometry).relu())
        args = (key_on(device), f64(EPS, device))
        given |= {"start": half, "stop": half + 1, "backend": backend}
        (w_half,) = perturbed_weights(w, *args, tensor=TENSOR, scale=SCALE, **given)
        (b_half,) = perturbed_weights(bias, *args, tensor=BIAS_TENSOR, scale=BIAS_SCALE, **given)
        low.append(F.conv1d(rows, w_half, b_half, **geometry).relu())
    flat = {name: (0 if name == "padding" else 1, value) for name, value in geometry.items()}
    extra = noise_error(x.unsqueeze(2), w.unsqueeze(2), noise, **flat)
    assert_within_budget(y, torch.cat(low), torch.cat(exact), extra=extra)


def test_1d_keeps_the_memory_format(backend: str, device: Any) -> None:
    x, w = torch.randn(4, 9, 3, device=device).mT, torch.randn(5, 3, 2, device=device)
    y = run1d(x, w, None, backend)
    assert y.mT.is_contiguous() and y.shape == (4, 5, 8)
    contiguous = run1d(x.contiguous(), w, None, backend)
    assert contiguous.is_contiguous()
    torch.testing.assert_close(y, contiguous, rtol=0, atol=1e-5)


X, W, B = torch.zeros(4, 3, 5, 5), torch.zeros(6, 3, 3, 3), torch.zeros(6)
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
    "w-dims": ({"w": W[0]}, ValueError, "w must have four dimensions, got shape [3, 3, 3]"),
    "x-dims": ({"x": B}, ValueError, "x must have four dimensions, got shape [6]"),
    "groups": (
        {"w": W[:, :1]},
        ValueError,
        "w must have the 3 input channels of x (groups are not supported), got shape [6, 1, 3, 3]",
    ),
    "empty": (
        {"x": X[:, :0], "w": W[:, :0]},
        ValueError,
        "only the batch may be empty, got shapes [4, 0, 5, 5] of x and [6, 0, 3, 3] of w",
    ),
    "x-rows": ({"stop": 3}, ValueError, "x must have equally many rows for 3 halves, got 4"),
    "x-device": ({"x": X.to("meta")}, ValueError, "x must be on cpu, got meta"),
    "x-grad": (
        {"x": X.clone().requires_grad_()},
        RuntimeError,
        "x requires grad, and paired_conv2d has no backward: use torch.no_grad()",
    ),
    "too-small": (
        {"dilation": 3},
        ValueError,
        "the convolution must give at least 1 x 1 outputs, got -1 x -1 "
        "from shapes [4, 3, 5, 5] of x and [6, 3, 3, 3] of w",
    ),
    "too-small-to-pool": (
        {"stride": (1, 3), "pool": True},
        ValueError,
        "the convolution must give at least 2 x 2 outputs, got 3 x 1 "
        "from shapes [4, 3, 5, 5] of x and [6, 3, 3, 3] of w",
    ),
    "stride": (
        {"stride": 0},
        ValueError,
        "stride must be an integer >= 1 or two of them, got 0",
    ),
    "padding": (
        {"padding": "same"},
        ValueError,
        "padding must be an integer >= 0 or two of them, got 'same'",
    ),
    "dilation": (
        {"dilation": (1, 1, 1)},
        ValueError,
        "dilation must be an integer >= 1 or two of them, got (1, 1, 1)",
    ),
    "bias-shape": ({"bias": B[:4]}, ValueError, "bias must have shape [6], got [4]"),
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
    "halves": ({"start": 2}, ValueError, "halves need 0 <= start < stop, got start=2, stop=2"),
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


NEAR_1D: dict[str, tuple[Any, type[Exception], str]] = {
    "x-type": ({"x": [1.0]}, TypeError, "x must be a Tensor, got list"),
    "x-dims": ({"x": X}, ValueError, "x must have three dimensions, got shape [4, 3, 5, 5]"),
    "w-dims": ({"w": B}, ValueError, "w must have three dimensions, got shape [6]"),
    "stride": (
        {"stride": (1, 2)},
        ValueError,
        "stride must be an integer >= 1 or two of them, got (1, (1, 2))",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), NEAR_1D.values(), ids=NEAR_1D)
def test_message_1d(change: dict[str, Any], error: type[Exception], message: str) -> None:
    args = {"x": X[:, :, 0], "w": W[:, :, 0], "bias": B, "backend": "reference"} | change
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        run1d(**args)


@needs_triton
def test_tf32x3_is_refused_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    if not interpreted():
        pytest.skip("the interpreter stands for the device")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(
        ValueError, match=r"^precision 'tf32x3' needs an NVIDIA GPU; an AMD one has"
    ):
        run(X, W, B, "triton", precision="tf32x3")
