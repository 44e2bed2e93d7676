"""Cross-entropy of every half, and its gradient, against float64, on every backend."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests._budget import assert_within_budget
from tests.zo_kernels._weights import same_bits
from zo_kernels import paired_cross_entropy, paired_cross_entropy_backward
from zo_kernels.registry import has_triton

pytestmark = pytest.mark.usefixtures("poison")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")

NAN, INF = float("nan"), float("inf")
FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"fp32": FP32, "bf16": BF16}
# (rows of a half, classes): 1, odd, around blocks, several rows and one row a program
SHAPES = {
    "one": (1, 1),
    "two": (1, 2),
    "digits": (33, 10),
    "block": (17, 128),
    "beyond": (5, 1025),
    "many-rows": (1100, 3),
}


def inputs(
    shape: tuple[int, int], dtype: torch.dtype = FP32, device: Any = "cpu", halves: int = 2
) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(halves, *shape, dtype=torch.float64)
    target = torch.randint(shape[1], (shape[0],), device=device)
    return logits.to(device, dtype), target


def torchs(logits: Tensor, target: Tensor, dtype: torch.dtype, **kwargs: Any) -> Tensor:
    losses = [F.cross_entropy(x, target.cpu(), **kwargs) for x in logits.cpu().to(dtype)]
    return torch.stack(losses)


def gradient(
    logits: Tensor, target: Tensor, grad: Tensor, dtype: torch.dtype, **kwargs: Any
) -> Tensor:
    x = logits.detach().cpu().to(dtype).requires_grad_()
    (dx,) = torch.autograd.grad(torchs(x, target, dtype, **kwargs), x, grad.cpu().to(dtype))
    return dx


def check(logits: Tensor, target: Tensor, backend: str, extra: float = 0.0, **kwargs: Any) -> None:
    """Both directions. `extra` is what the gradient may add: to what each of its three terms, of at
    most grad / count (by row: grad), adds as it is rounded."""
    each = kwargs.get("reduction") == "none"
    shape = logits.shape[:2] if each else logits.shape[:1]
    losses, lse = paired_cross_entropy(logits, target, backend=backend, **kwargs)
    assert losses.dtype == lse.dtype == FP32 and losses.shape == shape
    exact, low = (torchs(logits, target, d, **kwargs) for d in (torch.float64, FP32))
    assert_within_budget(losses, low, exact)
    exact, low = (logits.cpu().to(d).logsumexp(-1) for d in (torch.float64, FP32))
    assert_within_budget(lse, low, exact)
    grad = torch.randn(shape, device=logits.device)
    dx = paired_cross_entropy_backward(logits, target, lse, grad, backend=backend, **kwargs)
    assert dx.dtype == logits.dtype and dx.is_contiguous()
    exact, low = (gradient(logits, target, grad, d, **kwargs) for d in (torch.float64, FP32))
    counted = 1 if each else (target != kwargs.get("ignore_index", -100)).sum().item()
    extra += 3 * 2.0**-24 * grad.abs().max().item() / counted
    assert_within_budget(dx, low.to(dx.dtype), exact, extra)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_twin(shape: Any, dtype: torch.dtype, smoothing: float, backend: str, device: Any) -> None:
    check(*inputs(shape, dtype, device), backend, label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ignored", [-100, 2, 10**10])
def test_queries_and_ignored_rows(
    ignored: int, smoothing: float, backend: str, device: Any
) -> None:
    logits, target = inputs((13, 6), device=device, halves=4)
    target[::3] = ignored
    given = {"label_smoothing": smoothing, "ignore_index": ignored}
    check(logits, target, backend, **given)
    logits[:, ::3] = NAN  # whatever stands there
    losses, lse = paired_cross_entropy(logits, target, backend=backend, **given)
    assert losses.isfinite().all() and lse[:, ::3].isnan().all()
    dx = paired_cross_entropy_backward(logits, target, lse, losses, backend=backend, **given)
    assert not dx[:, ::3].any() and dx.isfinite().all()


@needs_triton
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "classes"), [(FP32, 5000), (BF16, 1025), (FP32, 1023)], ids=str)
def test_many_classes(
    classes: int,
    dtype: torch.dtype,
    smoothing: float,
    device: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows taken in turns of 512 columns, one or two rows a program."""
    module = importlib.import_module("zo_kernels.triton.cross_entropy")
    monkeypatch.setattr(module, "MAX_COLS", 512)
    monkeypatch.setattr(module, "TILE", 1024)
    logits, target = inputs((3, classes), dtype, device)
    check(logits, target, "triton", label_smoothing=smoothing)
    logits[0, 0, :512], logits[1, 2, 512:] = -INF, -INF  # a whole turn
    target.copy_(torch.tensor([600, 7, 500]))
    want = torchs(logits, target, torch.float64, label_smoothing=smoothing)
    losses, _ = paired_cross_entropy(logits, target, backend="triton", label_smoothing=smoothing)
    torch.testing.assert_close(losses.cpu().double(), want, rtol=1e-5, atol=0)
    logits[0, 0, 5], logits[1, 0, 100] = INF, NAN
    assert paired_cross_entropy(logits, target, backend="triton")[0].isnan().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["extreme", "offset", "equal"])
def test_ill_conditioned(kind: str, smoothing: float, backend: str, device: Any) -> None:
    """Logits of +-10^4; small differences on top of 10^4; none at all."""
    logits, target = inputs((9, 30), device=device)
    if kind == "extreme":
        logits = logits.sign() * 1e4
    elif kind == "offset":
        logits += 1e4
    else:
        logits = torch.full_like(logits, 7.5)
    # A probability carries the error of the rounded log-sum-exp; a row's gradient is at most
    # |grad| / rows, and |grad| < 5.
    extra = 2.0**-23 * logits.abs().max().item() * 5 / 9
    check(logits, target, backend, extra, label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_infinite_logits_act_as_in_torch(smoothing: float, backend: str, device: Any) -> None:
    target = torch.tensor([1], device=device)
    rows = {
        "wrong class": [-INF, 1.0, 2.0],
        "target": [0.0, -INF, 2.0],
        "all but the target": [-INF, 1.0, -INF],
        "all": [-INF, -INF, -INF],
        "plus": [INF, 1.0, 2.0],
        "plus at the target": [0.0, INF, 2.0],
        "both": [-INF, INF, 2.0],
        "nan": [NAN, 1.0, 2.0],
        "huge": [3e38, 3e38, -3e38],
    }
    logits = torch.tensor([*rows.values()], device=device)[:, None]
    losses, lse = paired_cross_entropy(logits, target, label_smoothing=smoothing, backend=backend)
    want = torchs(logits, target, FP32, label_smoothing=smoothing)
    torch.testing.assert_close(losses.cpu(), want, equal_nan=True)
    assert lse[3:8].isnan().all() and lse[[0, 1, 2, 8]].isfinite().all()
    if not smoothing:
        grad = torch.ones_like(losses)
        dx = paired_cross_entropy_backward(logits, target, lse, grad, backend=backend)
        finite = [0, 2]
        want = gradient(logits[finite], target, grad[finite], FP32)
        torch.testing.assert_close(dx[finite].cpu(), want)
        assert dx[3:8].isnan().all()


@pytest.mark.parametrize("bad", [-1, 6, -(2**40), 2**40])
def test_a_target_outside_the_classes_makes_nan(bad: int, backend: str, device: Any) -> None:
    logits, target = inputs((5, 6), device=device)
    target[3] = bad
    losses, lse = paired_cross_entropy(logits, target, backend=backend)
    assert losses.isnan().all() and lse.isfinite().all()
    dx = paired_cross_entropy_backward(
        logits, target, lse, torch.ones(2, device=device), backend=backend
    )
    assert dx[:, 3].isnan().all() and dx[:, [0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_count(rows: int, backend: str, device: Any) -> None:
    logits, target = inputs((rows, 6), device=device)
    target[:] = -100
    losses, lse = paired_cross_entropy(logits, target, backend=backend)
    assert losses.isnan().all() and lse.shape == (2, rows)
    dx = paired_cross_entropy_backward(
        logits, target, lse, torch.ones(2, device=device), backend=backend
    )
    assert dx.shape == logits.shape and not dx.any()


def test_strides(backend: str, device: Any) -> None:
    logits, target = inputs((6, 40), device=device)
    check(logits[:, ::2, 3:20], target[::2] % 17, backend)
    check(logits.transpose(0, 1)[:, :, :40].contiguous().transpose(0, 1), target, backend)
    check(logits[..., ::2], target % 20, backend)
    check(logits[:1].expand(3, -1, -1), target, backend)


@needs_triton
def test_tiles(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("zo_kernels.triton.cross_entropy")
    logits, target = inputs((40, 10), device=device)
    target[5] = -100
    for tile, columns, block in ((64, 4096, 4), (4096, 4, 1024), (16, 16, 32)):
        names = {"TILE": tile, "MAX_COLS": columns, "SUM_BLOCK": block, "COUNT_BLOCK": block}
        for name, value in names.items():
            monkeypatch.setattr(module, name, value)
        check(logits, target, "triton", label_smoothing=0.1)


@needs_triton
def test_a_half_may_begin_beyond_int32(device: Any, tmp_path: Path) -> None:
    """Half 2 begins at element 2^31, or row 2 of it."""
    distance = 1 << 30
    if device.type == "cuda":
        if torch.cuda.mem_get_info()[0] < 8 << 30:
            pytest.skip("needs 8 GiB")
        memory = torch.empty(2 * distance + 64, dtype=BF16, device=device)
    else:  # a sparse file: only the pages written exist
        file = np.memmap(tmp_path / "logits", np.int16, "w+", shape=(2 * distance + 64,))
        memory = torch.from_numpy(file).view(BF16)
    for strides in ((distance, 10, 1), (10, distance, 1)):
        far = memory.as_strided((3, 3, 10), strides)
        logits, target = inputs((3, 10), BF16, device, 3)
        far.copy_(logits)
        found, lse = paired_cross_entropy(far, target, backend="triton")
        want, lse_near = paired_cross_entropy(logits, target, backend="triton")
        assert same_bits(found, want) and same_bits(lse, lse_near)
        dx, dx_near = (
            paired_cross_entropy_backward(x, target, lse, want, backend="triton")
            for x in (far, logits)
        )
        assert same_bits(dx, dx_near)


def test_a_loss_is_the_mean_of_its_rows(backend: str, device: Any) -> None:
    """Rounded once: many equal rows have the loss of one of them."""
    logits, _ = inputs((1, 10), device=device)
    row = logits.expand(2, 3001, 10)
    target = torch.full((3001,), 4, device=device)
    many, _ = paired_cross_entropy(row, target, backend=backend)
    one, _ = paired_cross_entropy(logits, target[:1], backend=backend)
    assert same_bits(many, one)


def test_opcheck(backend: str, device: Any) -> None:
    logits, target = inputs((3, 7), device=device)
    ops = torch.ops.zo_kernels
    rest = (0.1, -100, "mean", backend)
    torch.library.opcheck(ops.paired_cross_entropy.default, (logits, target, *rest))
    lse, grad = logits[..., 0].clone(), torch.ones(2, device=device)
    args = (logits.mT.contiguous().mT, target, lse, grad, *rest)
    torch.library.opcheck(ops.paired_cross_entropy_backward.default, args)


def test_compiles_in_one_graph(backend: str, device: Any) -> None:
    torch._dynamo.reset()
    logits, target = inputs((3, 7), device=device)

    def loss(x: Tensor, target: Tensor) -> Any:
        losses, lse = paired_cross_entropy(x * 2, target, backend=backend)
        return losses, paired_cross_entropy_backward(x * 2, target, lse, losses, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target), loss(logits, target))


X, T, L = torch.zeros(2, 3, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3)
NEAR: dict[str, tuple[Any, type[Exception], str]] = {
    "dtype": (
        {"logits": X.double()},
        TypeError,
        "logits must be torch.float32 or torch.bfloat16, got torch.float64",
    ),
    "dims": ({"logits": L}, ValueError, "logits must have three dimensions, got shape [2, 3]"),
    "classes": (
        {"logits": X[..., :0]},
        ValueError,
        "logits must have at least one class, got shape [2, 3, 0]",
    ),
    "target": ({"target": T[:2]}, ValueError, "target must have shape [3], got [2]"),
    "target-dtype": (
        {"target": T.int()},
        TypeError,
        "target must be torch.int64, got torch.int32",
    ),
    "smoothing": (
        {"label_smoothing": 1.5},
        ValueError,
        "label_smoothing must be in [0, 1], got 1.5",
    ),
    "reduction": (
        {"reduction": "sum"},
        ValueError,
        "reduction must be one of ('mean', 'none'), got 'sum'",
    ),
    "grad-mode": (
        {"logits": X.clone().requires_grad_()},
        RuntimeError,
        "logits requires grad, and paired_cross_entropy has no backward: use torch.no_grad()",
    ),
    "lse": ({"lse": L[:, :2]}, ValueError, "lse must have shape [2, 3], got [2, 2]"),
    "grad": ({"grad": L[0]}, ValueError, "grad must have shape [2], got [3]"),
    "grad-by-row": (
        {"grad": L[:, 0], "reduction": "none"},
        ValueError,
        "grad must have shape [2, 3], got [2]",
    ),
    "grad-dtype": (
        {"grad": L[:, 0].double()},
        TypeError,
        "grad must be torch.float32, got torch.float64",
    ),
}


@pytest.mark.parametrize(("change", "error", "message"), NEAR.values(), ids=NEAR)
def test_message(change: dict[str, Any], error: type[Exception], message: str) -> None:
    backward: dict[str, Any] = {"lse": L, "grad": L[:, 0]}
    args: dict[str, Any] = {"logits": X, "target": T, "backend": "reference"} | change
    if not {*change} & {*backward}:
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            paired_cross_entropy(**args)
    message = message.replace("paired_cross_entropy", "paired_cross_entropy_backward")
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        paired_cross_entropy_backward(**(backward | args))
