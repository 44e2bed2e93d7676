"""Batch norm of every half against float64, on every backend; the kernels' launch and edges."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests._budget import assert_within_budget
from tests.zo_kernels._weights import same_bits
from zo_kernels import paired_batch_norm
from zo_kernels.registry import has_triton

pytestmark = pytest.mark.usefixtures("poison")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")

EPSILON = 1e-5
FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"fp32": FP32, "bf16": BF16}
# [rows of a half, channels, ...]: vectors, 1-3 dimensions, around blocks, one value a channel
SHAPES = {
    "one": (1, 1),
    "vectors": (5, 33),
    "one-value": (1, 3, 1, 1),
    "1d": (3, 5, 7),
    "image": (4, 6, 3, 3),
    "one-channel": (4, 1, 5, 5),
    "blocks": (2, 64, 8, 8),
    "beyond": (3, 65, 3, 43),
    "long-rows": (2, 3, 33, 32),
    "splits": (33, 5, 7, 7),
    "volume": (2, 5, 2, 3, 4),
}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype = FP32, device: Any = "cpu", halves: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """x `[halves * shape[0], ...]`, weight and bias `[halves, C]`."""
    x = 1.5 + 2 * torch.randn(halves * shape[0], *shape[1:], dtype=torch.float64)
    weight, bias = torch.randn(2, halves, shape[1], dtype=torch.float64)
    return x.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


def torchs(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    halves: int,
    dtype: torch.dtype,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's, half by half: y in `dtype`, moments in fp32, or in float64 with y."""
    wide = torch.float64 if dtype == torch.float64 else FP32
    params = [None if t is None else t.cpu().to(wide) for t in (weight, bias, mean, var)]
    ys, moments = [], []
    for h, x_h in enumerate(x.cpu().tensor_split(halves)):
        w_h, b_h = (None if t is None else t[h] for t in params[:2])
        given = (*params[2:], mean is None, 0.0, EPSILON, False)
        ys.append(torch.batch_norm(x_h.to(dtype), w_h, b_h, *given))
        axes = [0, *range(2, x.ndim)]
        moments.append(torch.stack(torch.var_mean(x_h.to(wide), axes, correction=0)))
    y = torch.cat(ys)
    var_h, mean_h = torch.stack(moments, 1)
    if mean is not None:
        mean_h, var_h = (t.expand(halves, -1) for t in params[2:])
    return y.relu() if relu else y, mean_h, var_h


def spread(x: Tensor, halves: int) -> Tensor:
    """Between the largest and the smallest value of a half and channel, `[halves, C]`."""
    values = x.cpu().double().reshape(halves, -1, *x.shape[1:]).transpose(1, 2).flatten(2)
    return values.amax(2) - values.amin(2)


def additions(x: Tensor, halves: int) -> int:
    """One after another on the way of a square to its variance, each of them rounded: in a lane, in
    a tile (a tree on hardware, in turn in the interpreter), over splits."""
    module = importlib.import_module("zo_kernels.triton.plan")
    plan = module.plan_of(x if module.channels_last(x) else x.contiguous(), halves)
    return plan.per_split + plan.tile_rows + plan.splits


def check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, backend: str, **kwargs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    halves = kwargs.setdefault("halves", 2)
    before = x.clone()
    found = paired_batch_norm(x, weight, bias, epsilon=EPSILON, backend=backend, **kwargs)
    assert found[0].dtype == x.dtype and found[0].shape == x.shape
    exact = torchs(x, weight, bias, dtype=torch.float64, **kwargs)
    low = torchs(x, weight, bias, dtype=x.dtype, **kwargs)
    # Moments are of x less another of its values, a difference that is rounded; then the mean is.
    of_mean = 2.0**-24 * spread(x, halves)
    steepest = (exact[2] + EPSILON).rsqrt()
    if weight is not None:
        steepest = steepest * weight.cpu().double().abs()
    of_y = ((of_mean + 2.0**-24 * exact[1].abs()) * steepest).max().item()
    assert_within_budget(found[0], low[0], exact[0], of_y)
    assert_within_budget(found[1], low[1], exact[1], of_mean.max().item())
    of_var = 2.0**-24 * additions(x, halves) * exact[2].max().item()
    assert_within_budget(found[2], low[2], exact[2], of_var)
    assert same_bits(x, before)
    return found


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_twin(shape: Any, dtype: torch.dtype, last: bool, backend: str, device: Any) -> None:
    x, weight, bias = inputs(shape, dtype, device)
    if last and len(shape) < 4:
        pytest.skip("one format")
    if last:
        x = x.contiguous(memory_format=LAST[x.ndim])
    y, _, _ = check(x, weight, bias, backend)
    assert y.stride() == x.stride()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("running", [False, True], ids=["batch", "running"])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
def test_queries_relu_and_missing_parameters(
    affine: str, running: bool, last: bool, backend: str, device: Any
) -> None:
    x, weight, bias = inputs((3, 6, 4, 4), device=device, halves=4)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    given: dict[str, Any] = {"halves": 4}
    if running:
        given |= {"mean": torch.randn(6, device=device), "var": torch.rand(6, device=device) + 1}
    w, b = weight if affine in ("both", "weight") else None, None
    if affine in ("both", "bias"):
        b = bias
    for relu in (False, True):
        _, mean, var = check(x, w, b, backend, relu=relu, **given)
        assert mean.shape == var.shape == (4, 6) and mean.dtype == var.dtype == FP32


def test_dtypes_may_differ(backend: str, device: Any) -> None:
    x, weight, bias = inputs((3, 6, 4, 4), BF16, device)
    mean, var = torch.randn(6, device=device), torch.rand(6, device=device) + 1
    check(x, weight.float(), bias, backend)
    check(x.float(), weight, bias.float(), backend)
    check(x.float(), weight, bias, backend, mean=mean.to(BF16), var=var.to(BF16))
    check(x, weight.float(), bias.float(), backend, mean=mean, var=var)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("kind", ["offset", "outlier-first", "drift"])
def test_ill_conditioned(kind: str, last: bool, backend: str, device: Any) -> None:
    """A mean of 10^4 standard deviations; a first value, from which moments are taken, far from
    all others; halves of a channel that lie apart."""
    x, weight, bias = inputs((40, 5, 4, 4), device=device)
    x += 1e4
    if kind == "outlier-first":
        x[0], x[40] = 0, -3e4
    elif kind == "drift":
        x[20:60] -= 2e4
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    check(x, weight, bias, backend)


def test_one_value_a_channel_has_no_variance(backend: str, device: Any) -> None:
    x, weight, bias = inputs((1, 7, 1, 1), device=device)
    y, mean, var = check(x, weight, bias, backend)
    assert torch.equal(mean, x.reshape(2, 7)) and not var.any()
    if backend != "numba":  # torch scales before it subtracts
        assert torch.equal(y.reshape(2, 7), bias)


def test_halves_and_channels_are_separate(backend: str, device: Any) -> None:
    """What is not finite stays in its half and channel, ReLU or not."""
    x, weight, bias = inputs((3, 5, 4, 4), device=device)
    clean = paired_batch_norm(x, weight, bias, halves=2, epsilon=EPSILON, backend=backend)
    x[4, 2, 1, 1], x[0, 3] = float("nan"), float("inf")
    for relu in (False, True):
        given = {"halves": 2, "epsilon": EPSILON, "relu": relu, "backend": backend}
        y, _, var = paired_batch_norm(x, weight, bias, **given)
        assert y[3:, 2].isnan().all() and y[:3, 3].isnan().all()
        assert var[1, 2].isnan() and var[0, 3].isnan()
        for rows, channels in ((slice(0, 3), [0, 1, 2, 4]), (slice(3, 6), [0, 1, 3, 4])):
            want = clean[0][rows, channels]
            assert same_bits(y[rows, channels], want.relu() if relu else want)


def test_other_strides_are_copied(backend: str, device: Any) -> None:
    x, weight, bias = inputs((3, 10, 4, 4), device=device)
    sliced = x[:, ::2]
    y, _, _ = check(sliced, weight[:, ::2], bias[:, ::2], backend)
    assert y.is_contiguous()
    rows = x.flatten(2).mT.contiguous().mT  # [B, C, L], channels innermost
    y, _, _ = check(rows, weight, bias, backend)
    assert y.stride() == rows.stride()


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (0, 3), (2, 0, 3, 3), (2, 3, 0, 4)], ids=str)
def test_empty(shape: Any, backend: str, device: Any) -> None:
    x, weight, bias = inputs(shape, device=device)
    ones = torch.ones(shape[1], device=device)
    given = {"halves": 2, "epsilon": EPSILON, "backend": backend}
    y, mean, _ = paired_batch_norm(x, weight, bias, mean=ones, var=ones, **given)
    assert y.shape == x.shape and mean.shape == (2, shape[1])
    if shape[1] == 0:
        _, mean, var = paired_batch_norm(x, weight, bias, **given)
        assert mean.shape == var.shape == (2, 0)


@needs_triton
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_tiles(last: bool, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """64-bit offsets where 32 would do change no bit; tiles and splits stay in the budget."""
    module = importlib.import_module("zo_kernels.triton.plan")
    x, weight, bias = inputs((9, 6, 5, 5), device=device)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(module, "TILE", 128)
    monkeypatch.setattr(module, "TILES_PER_SPLIT", 2)
    first = check(x, weight, bias, "triton")
    assert module.plan_of(x, 2).splits > 1
    with monkeypatch.context() as patch:
        patch.setattr(module, "INT32_MAX", 0)
        again = paired_batch_norm(x, weight, bias, halves=2, epsilon=EPSILON, backend="triton")
        assert all(map(same_bits, first, again))
    for name, value in (("MAX_SPLITS", 3), ("PROGRAMS", 1), ("MAX_CHANNELS", 4)):
        monkeypatch.setattr(module, name, value)
        check(x, weight, bias, "triton")
    assert module.plan_of(x, 2).splits == 1


@needs_triton
@pytest.mark.parametrize("shape", [(1, 1), (64, 16, 56, 56), (7, 3, 7, 7), (4096, 10)], ids=str)
def test_plans_cover_x(shape: Any) -> None:
    module = importlib.import_module("zo_kernels.triton.plan")
    for memory_format in {torch.contiguous_format, LAST.get(len(shape), torch.contiguous_format)}:
        x = torch.empty(2 * shape[0], *shape[1:], device="meta").to(memory_format=memory_format)
        plan = module.plan_of(x, 2)
        tiles = plan.blocks[0] * plan.outer
        assert 2 * plan.outer * plan.rows * plan.channels == x.numel()
        assert plan.tile_rows * plan.tile_channels <= module.TILE and not plan.wide
        assert (plan.splits - 1) * plan.per_split < tiles <= plan.splits * plan.per_split
    assert plan._replace(last=True, channels=2**31 // plan.tile_rows).wide
    assert plan._replace(last=False, rows=2**31 // plan.tile_channels).wide


@pytest.mark.parametrize("running", [False, True], ids=["batch", "running"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_opcheck(last: bool, running: bool, backend: str, device: Any) -> None:
    x, weight, bias = inputs((3, 5, 2, 2), device=device)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    moments = (torch.ones(5, device=device),) * 2 if running else (None, None)
    op = torch.ops.zo_kernels.paired_batch_norm.default
    torch.library.opcheck(op, (x, weight, bias, 2, EPSILON, *moments, True, backend))
    torch.library.opcheck(op, (x[:, ::2], None, None, 2, EPSILON, None, None, True, backend))


def test_compiles_in_one_graph(backend: str, device: Any) -> None:
    torch._dynamo.reset()
    x, weight, bias = inputs((3, 5, 2, 2), device=device)

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        given = {"halves": 2, "epsilon": EPSILON, "backend": backend}
        y, mean, var = paired_batch_norm(x, weight, bias, **given)
        return paired_batch_norm(y * 2, weight, bias, mean=mean[0], var=var[1], **given)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), layer(x, weight, bias))


X, W, C = torch.zeros(4, 3, 2), torch.zeros(2, 3), torch.zeros(3)
NEAR: dict[str, tuple[Any, type[Exception], str]] = {
    "dtype": (
        {"x": X.double()},
        TypeError,
        "x must be torch.float32 or torch.bfloat16, got torch.float64",
    ),
    "dims": ({"x": C}, ValueError, "x must have at least two dimensions, got shape [3]"),
    "halves": ({"halves": 0}, ValueError, "halves must be at least 1, got 0"),
    "rows": ({"halves": 3}, ValueError, "x must have equally many rows for 3 halves, got 4"),
    "empty": (
        {"x": X[:0]},
        ValueError,
        "x must have at least one value a channel, got shape [0, 3, 2]",
    ),
    "weight": ({"weight": C}, ValueError, "weight must have shape [2, 3], got [3]"),
    "bias-device": ({"bias": W.to("meta")}, ValueError, "bias must be on cpu, got meta"),
    "together": ({"mean": C}, ValueError, "mean and var must be given together"),
    "mean": ({"mean": W, "var": C}, ValueError, "mean must have shape [3], got [2, 3]"),
    "var-dtype": (
        {"mean": C, "var": C.double()},
        TypeError,
        "var must be torch.float32 or torch.bfloat16, got torch.float64",
    ),
    "epsilon": (
        {"epsilon": -1e-5},
        ValueError,
        "epsilon must be finite and not negative, got -1e-05",
    ),
    "grad": (
        {"weight": W.clone().requires_grad_()},
        RuntimeError,
        "weight requires grad, and paired_batch_norm has no backward: use torch.no_grad()",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), NEAR.values(), ids=NEAR)
def test_message(change: dict[str, Any], error: type[Exception], message: str) -> None:
    args = {"x": X, "weight": W, "bias": W, "halves": 2, "epsilon": EPSILON} | change
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        paired_batch_norm(backend="reference", **args)
