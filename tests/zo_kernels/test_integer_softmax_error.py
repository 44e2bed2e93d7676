"""`integer_softmax_error` against float64 and against Python's integers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.zo_kernels._int8_weights import int32, key_on
from tests.zo_kernels._integer_model import ROUNDINGS, clip, exp2, rounded, scaled
from tests.zo_kernels._noise_model import model
from tests.zo_kernels.test_integer_cross_entropy import case
from zo_kernels import integer_softmax_error
from zo_kernels.registry import has_triton

pytestmark = pytest.mark.usefixtures("poison")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")

TENSOR, QUERY = 2**31 + 5, 3
SETTINGS = {"tensor": TENSOR, "query": QUERY}


def by_hand(
    logits: Tensor, exponent: Any, target: Tensor, f: int, rounding: str
) -> list[list[list[int]]]:
    """In Python's integers: powers, a division, a rounding."""
    seed, step = key_on("cpu").tolist()
    where = {"noise": "bits", "purpose": "rounding"} | SETTINGS
    words = model(logits.shape[1:], seed, step, **where).tolist()
    halves = []
    for rows, e in zip(logits.tolist(), exponent, strict=True):
        errors = []
        for q, label, noise in zip(rows, target.tolist(), words, strict=True):
            y = [exp2(scaled(max(q) - x, e, f), f) for x in q]
            wide = [v * 2**23 // sum(y) - 2**23 * (j == label) for j, v in enumerate(y)]
            errors.append(
                [clip(rounded(x, 16, rounding, w)) for x, w in zip(wide, noise, strict=True)]
            )
        halves.append(errors)
    return halves


SHAPES = [(1, 1, 0), (1, 10, 12), (3, 2, 16), (7, 17, 4), (2, 1030, 8)]


@pytest.mark.parametrize(
    ("batch", "classes", "f", "rounding"),
    [(*shape, "stochastic") for shape in SHAPES] + [(33, 10, 12, r) for r in ROUNDINGS],
)
def test_twin(batch: int, classes: int, f: int, rounding: str, backend: str, device: Any) -> None:
    exponents = (-24, -7, -5, -3, 0, 8) if classes < 100 else (-5, 30)
    logits, target = case(len(exponents), batch, classes, device)
    args = {"rounding": rounding, "key": key_on(device), "backend": backend} | SETTINGS
    error, total = integer_softmax_error(
        logits, int32(exponents, device), target, fraction_bits=f, **args
    )
    assert error.dtype == torch.int8 and total.dtype == torch.int32
    assert total.tolist() == [-7] * len(exponents) and error.is_contiguous()
    assert error.tolist() == by_hand(logits, exponents, target, f, rounding)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("f", [4, 12])
def test_against_float64(f: int, rounding: str, backend: str, device: Any) -> None:
    """Half a step (a step, stochastic) of 2^-7; the powers' share, ln 2 units of 2^-F of a value
    in [0, 1]; and the clipping of 128 to 127."""
    exponents = (-8, -6, -5, -4, -3, -1)
    logits, target = case(len(exponents), 50, 10, device)
    args = {"rounding": rounding, "key": key_on(device), "backend": backend}
    error, _ = integer_softmax_error(
        logits, int32(exponents, device), target, fraction_bits=f, **args
    )
    for half, e in enumerate(exponents):
        x = logits[half].cpu().double() * 2.0**e
        want = (x.softmax(1) - F.one_hot(target.cpu(), 10)).clamp(-127 / 128, 127 / 128)
        step = 2.0**-8 if rounding == "nearest" else 2.0**-7
        budget = step + 0.7 / 2**f + 2e-5
        assert ((error[half].cpu() / 128 - want).abs() <= budget).all()


def test_stochastic_keeps_small_errors_on_average(backend: str, device: Any) -> None:
    """Probabilities far below a step of 2^-7, over n draws: the mean within 5 sigma.

    sigma^2 = f (1 - f) / n of a step, f the fraction of it; nearest would give 0.
    """
    batch, steps = 256, 4
    logits = torch.tensor([30, -60, -75, -90], dtype=torch.int8, device=device)
    logits = logits.expand(1, batch, 4).contiguous()
    target = torch.zeros(batch, dtype=torch.int64, device=device)
    total = torch.zeros(4, dtype=torch.int64, device=device)
    for step in range(steps):
        args = {"key": key_on(device, step), "backend": backend}
        error, _ = integer_softmax_error(logits, int32([-4], device), target, **args)
        total += error.sum((0, 1))
    n = batch * steps
    want = (logits[0, 0].cpu().double() / 16).softmax(0) * 128
    assert 0.01 < float(want[1]) < 0.5
    for j in range(1, 4):
        f = float(want[j])
        budget = 5 * (f * (1 - f) / n) ** 0.5 + 0.001 * f
        assert abs(float(total[j]) / n - f) <= budget


def test_halves_share_their_noise(backend: str, device: Any) -> None:
    logits, target = case(1, 20, 10, device)
    args = {"key": key_on(device), "backend": backend}
    twice = logits.expand(2, -1, -1)
    error, _ = integer_softmax_error(twice, int32([-4, -4], device), target, **args)
    alone, _ = integer_softmax_error(logits, int32([-4], device), target, **args)
    assert torch.equal(error[0], error[1]) and torch.equal(error[:1], alone)


def test_empty(backend: str, device: Any) -> None:
    logits = torch.empty((2, 0, 10), dtype=torch.int8, device=device)
    target = torch.zeros(0, dtype=torch.int64, device=device)
    args = {"rounding": "nearest", "backend": backend}
    error, total = integer_softmax_error(logits, int32([0, 0], device), target, **args)
    assert error.shape == logits.shape and total.tolist() == [-7, -7]


@needs_triton
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_launch_does_not_show(rounding: str, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("zo_kernels.triton.int8_loss")
    logits, target = case(2, 9, 37, device)
    exponent = int32([-5, -6], device)
    args = {"rounding": rounding, "key": key_on(device), "backend": "triton"}
    first, _ = integer_softmax_error(logits, exponent, target, **args)
    for tile, cols, rows, limit in ((256, 16, 4, 0), (128, 64, 2, 2**31 - 1)):
        monkeypatch.setattr(module, "TILE", tile)
        monkeypatch.setattr(module, "MAX_COLS", cols)
        monkeypatch.setattr(module, "MAX_ROWS", rows)
        monkeypatch.setattr(module, "INT32_MAX", limit)
        again, _ = integer_softmax_error(logits, exponent, target, **args)
        assert torch.equal(first, again)


def test_a_label_outside_is_an_error_on_the_cpu() -> None:
    logits, target = case(1, 5, 10, "cpu")
    target[3] = 10
    for backend in ("reference", "numba"):
        if backend == "numba":
            pytest.importorskip("numba")
        args = {"rounding": "nearest", "backend": backend}
        with pytest.raises(ValueError, match=r"^target must be in \[0, 10\), got 10$"):
            integer_softmax_error(logits, int32([-5], "cpu"), target, **args)
