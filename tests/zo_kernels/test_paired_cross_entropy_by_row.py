"""Cross-entropy of every row, `reduction="none"`: against float64, on every backend."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.zo_kernels._weights import same_bits
from tests.zo_kernels.test_paired_cross_entropy import (
    BF16,
    DTYPES,
    FP32,
    INF,
    NAN,
    SHAPES,
    check,
    inputs,
    needs_triton,
    torchs,
)
from zo_kernels import paired_cross_entropy, paired_cross_entropy_backward

pytestmark = pytest.mark.usefixtures("poison")
BY_ROW: dict[str, Any] = {"reduction": "none"}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_twin(shape: Any, dtype: torch.dtype, smoothing: float, backend: str, device: Any) -> None:
    check(*inputs(shape, dtype, device), backend, label_smoothing=smoothing, **BY_ROW)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ignored", [-100, 2, 10**10])
def test_queries_and_ignored_rows(
    ignored: int, smoothing: float, backend: str, device: Any
) -> None:
    logits, target = inputs((13, 6), device=device, halves=4)
    target[::3] = ignored
    given = {"label_smoothing": smoothing, "ignore_index": ignored, **BY_ROW}
    check(logits, target, backend, **given)
    logits[:, ::3] = NAN  # whatever stands there
    losses, lse = paired_cross_entropy(logits, target, backend=backend, **given)
    assert not losses[:, ::3].any() and losses.isfinite().all()
    grad = torch.ones_like(losses)
    grad[:, ::3] = NAN
    dx = paired_cross_entropy_backward(logits, target, lse, grad, backend=backend, **given)
    assert not dx[:, ::3].any() and dx.isfinite().all()


def test_the_mean_is_that_of_the_rows(backend: str, device: Any) -> None:
    """Rounded once more, and no row is another one: in fp64 the sum hides its order."""
    logits, target = inputs((777, 10), device=device)
    target[::5] = -100
    rows, lse = paired_cross_entropy(logits, target, backend=backend, **BY_ROW)
    means, other = paired_cross_entropy(logits, target, backend=backend)
    count = (target != -100).sum()
    torch.testing.assert_close(means, (rows.double().sum(1) / count).float(), rtol=2e-7, atol=0)
    assert same_bits(lse, other)
    grad = torch.randn(2, device=device)
    spread = (grad / count)[:, None].expand_as(rows)
    dx = paired_cross_entropy_backward(logits, target, lse, grad, backend=backend)
    by_row = paired_cross_entropy_backward(logits, target, lse, spread, backend=backend, **BY_ROW)
    assert same_bits(dx, by_row)


@needs_triton
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "classes"), [(FP32, 3000), (BF16, 1025)], ids=str)
def test_many_classes(
    classes: int,
    dtype: torch.dtype,
    smoothing: float,
    device: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows taken in turns of 512 columns, two rows a program, of which there are three."""
    module = importlib.import_module("zo_kernels.triton.cross_entropy")
    monkeypatch.setattr(module, "MAX_COLS", 512)
    monkeypatch.setattr(module, "TILE", 1024)
    check(*inputs((3, classes), dtype, device), "triton", label_smoothing=smoothing, **BY_ROW)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_extreme_logits(smoothing: float, backend: str, device: Any) -> None:
    logits, target = inputs((9, 30), device=device)
    extra = 2.0**-23 * 1e4 * 5  # a probability carries the error of the rounded log-sum-exp
    check(logits + 1e4, target, backend, extra, label_smoothing=smoothing, **BY_ROW)
    rows = [
        [-INF, 1.0, 2.0],
        [0.0, -INF, 2.0],
        [INF, 1.0, 2.0],
        [NAN, 1.0, 2.0],
        [3e38, 3e38, -3e38],
    ]
    logits, target = (
        torch.tensor([rows], device=device),
        torch.ones(5, dtype=torch.int64, device=device),
    )
    given = {"label_smoothing": smoothing, **BY_ROW}
    losses, _ = paired_cross_entropy(logits, target, backend=backend, **given)
    want = torchs(logits, target, FP32, **given)
    torch.testing.assert_close(losses.cpu(), want, equal_nan=True)


@pytest.mark.parametrize("bad", [-1, 6, -(2**40), 2**40])
def test_a_target_outside_the_classes_makes_its_row_nan(
    bad: int, backend: str, device: Any
) -> None:
    logits, target = inputs((5, 6), device=device)
    target[3] = bad
    losses, lse = paired_cross_entropy(logits, target, backend=backend, **BY_ROW)
    good = [0, 1, 2, 4]
    assert losses[:, 3].isnan().all() and losses[:, good].isfinite().all()
    grad = torch.ones_like(losses)
    dx = paired_cross_entropy_backward(logits, target, lse, grad, backend=backend, **BY_ROW)
    assert dx[:, 3].isnan().all() and dx[:, good].isfinite().all()


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_count(rows: int, backend: str, device: Any) -> None:
    logits, target = inputs((rows, 6), device=device)
    target[:] = -100
    losses, lse = paired_cross_entropy(logits, target, backend=backend, **BY_ROW)
    assert losses.shape == lse.shape == (2, rows) and not losses.any()
    grad = torch.ones_like(losses)
    dx = paired_cross_entropy_backward(logits, target, lse, grad, backend=backend, **BY_ROW)
    assert dx.shape == logits.shape and not dx.any()


def test_strides(backend: str, device: Any) -> None:
    logits, target = inputs((6, 40), device=device)
    check(logits[:, ::2, 3:20], target[::2] % 17, backend, **BY_ROW)
    check(logits[..., ::2], target % 20, backend, **BY_ROW)
    check(logits[:1].expand(3, -1, -1), target, backend, **BY_ROW)
    _, lse = paired_cross_entropy(logits, target, backend=backend, **BY_ROW)
    grad = torch.randn(6, 2, device=device)
    dx, dense = (
        paired_cross_entropy_backward(logits, target, lse, g, backend=backend, **BY_ROW)
        for g in (grad.mT, grad.mT.contiguous())
    )
    assert same_bits(dx, dense)


@needs_triton
def test_tiles(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("zo_kernels.triton.cross_entropy")
    logits, target = inputs((40, 10), device=device)
    target[5] = -100
    for tile, columns in ((64, 4096), (4096, 4), (16, 16)):
        monkeypatch.setattr(module, "TILE", tile)
        monkeypatch.setattr(module, "MAX_COLS", columns)
        check(logits, target, "triton", label_smoothing=0.1, **BY_ROW)


@needs_triton
def test_a_half_may_begin_beyond_int32(device: Any, tmp_path: Path) -> None:
    """Half 2 begins at element 2^31."""
    distance = 1 << 30
    if device.type == "cuda":
        if torch.cuda.mem_get_info()[0] < 8 << 30:
            pytest.skip("needs 8 GiB")
        memory = torch.empty(2 * distance + 64, dtype=BF16, device=device)
    else:  # a sparse file: only the pages written exist
        file = np.memmap(tmp_path / "logits", np.int16, "w+", shape=(2 * distance + 64,))
        memory = torch.from_numpy(file).view(BF16)
    far = memory.as_strided((3, 3, 10), (distance, 10, 1))
    logits, target = inputs((3, 10), BF16, device, 3)
    far.copy_(logits)
    found, lse = paired_cross_entropy(far, target, backend="triton", **BY_ROW)
    want, _ = paired_cross_entropy(logits, target, backend="triton", **BY_ROW)
    assert same_bits(found, want)
    dx, near = (
        paired_cross_entropy_backward(x, target, lse, want, backend="triton", **BY_ROW)
        for x in (far, logits)
    )
    assert same_bits(dx, near)


def test_opcheck(backend: str, device: Any) -> None:
    logits, target = inputs((3, 7), device=device)
    ops = torch.ops.zo_kernels
    rest = (0.1, -100, "none", backend)
    torch.library.opcheck(ops.paired_cross_entropy.default, (logits, target, *rest))
    lse, grad = logits[..., 0].clone(), torch.ones(2, 3, device=device)
    args = (logits.mT.contiguous().mT, target, lse, grad, *rest)
    torch.library.opcheck(ops.paired_cross_entropy_backward.default, args)


def test_compiles_in_one_graph(backend: str, device: Any) -> None:
    torch._dynamo.reset()
    logits, target = inputs((3, 7), device=device)
    given = {"backend": backend, **BY_ROW}

    def loss(x: Tensor, target: Tensor) -> Any:
        losses, lse = paired_cross_entropy(x * 2, target, **given)
        return losses, paired_cross_entropy_backward(x * 2, target, lse, losses, **given)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, target), loss(logits, target))
