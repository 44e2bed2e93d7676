"""Integer cross-entropy: its arithmetic against Python's integers, its value against float64."""

from __future__ import annotations

from decimal import Decimal
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.zo_kernels._int8_weights import int32
from tests.zo_kernels._integer_model import SCALE, exp2, log2, scaled
from zo_kernels import integer_cross_entropy, integer_projected_sign
from zo_kernels.reference import integer
from zo_kernels.registry import has_triton
from zo_kernels.triton.integer import exp2 as device_exp2
from zo_kernels.triton.integer import log2 as device_log2
from zo_kernels.triton.integer import scaled as device_scaled
from zo_kernels.triton.shim import jit, tl

pytestmark = pytest.mark.usefixtures("poison")
needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")
BITS = (0, 1, 4, 8, 12, 15, 16)
EXPONENTS = (-40, -25, -24, -15, -8, -5, -3, 0, 3, 8, 9, 50)


def case(
    halves: int, batch: int, classes: int, device: Any, spread: int = 127
) -> tuple[Tensor, Tensor]:
    logits = torch.randint(-spread, spread + 1, (halves, batch, classes), dtype=torch.int8)
    return logits.to(device), torch.randint(classes, (batch,), device=device)


def exact(logits: Tensor, exponent: int, target: Tensor) -> Tensor:
    """Losses `[B]` in bits, float64, of one half; the exponent clamped."""
    p = float(SCALE) * logits.cpu().double() * 2.0 ** max(-24, min(8, exponent))
    at = target.cpu()[:, None]
    below = p.amax(1, keepdim=True) - p
    return below.gather(1, at).squeeze(1) + torch.exp2(-below).sum(1).log2()


@jit
def _arithmetic_kernel(
    n_ptr, exponent_ptr, d_ptr, y_ptr, s_ptr, l_ptr, n, F: tl.constexpr, BLOCK: tl.constexpr
):
    o = tl.arange(0, BLOCK)
    b_d = device_scaled(tl.load(n_ptr + o, mask=o < n, other=0), tl.load(exponent_ptr), F)
    tl.store(d_ptr + o, b_d, mask=o < n)
    tl.store(y_ptr + o, device_exp2(b_d, F).to(tl.int64), mask=o < n)
    b_s = tl.load(s_ptr + o, mask=o < n, other=1 << 30)
    tl.store(l_ptr + o, device_log2(b_s, F), mask=o < n)


SUMS = sorted({(1 << k) + d for k in range(30, 61) for d in (-1, 0, 1, 12345)} - {(1 << 30) - 1})


@pytest.mark.parametrize("fraction_bits", BITS)
def test_arithmetic(fraction_bits: int, device: Any) -> None:
    """Every difference of logits, every power, logarithms of sums around all powers of two."""
    f = fraction_bits
    below = torch.arange(256, device=device)
    sums = torch.tensor((SUMS * 3)[:256], device=device)
    for exponent in EXPONENTS[1::2]:
        d = integer.scaled(below, int32(exponent, device), f)
        y = integer.exp2(d, f)
        assert d.tolist() == [scaled(n, exponent, f) for n in range(256)]
        assert y.tolist() == [exp2(v, f) for v in d.tolist()]
        if has_triton():
            results = [torch.empty_like(below) for _ in range(3)]
            args = (below.to(torch.int32), int32(exponent, device), *results[:2], sums, results[2])
            _arithmetic_kernel[(1,)](*args, 256, F=f, BLOCK=256)
            want = (d, y, integer.log2(sums, f))
            assert all(map(torch.equal, results, want))


@pytest.mark.parametrize("fraction_bits", BITS)
def test_powers_and_logarithms_are_accurate(fraction_bits: int) -> None:
    """Powers to 2^-25 of their value and a unit; logarithms to half a unit of 2^-F and 2^-26."""
    f = fraction_bits
    d = torch.cat([torch.arange(1 << min(f, 12)), torch.randint(40 << f, (500,))])
    exact_powers = torch.exp2(30 - d.double() / 2**f)
    error = (integer.exp2(d, f).double() - exact_powers).abs()
    assert (error <= exact_powers * 2.0**-25 + 1).all()
    sums = torch.tensor(SUMS + torch.randint(1 << 30, 1 << 34, (200,)).tolist())
    budget = Decimal(1) / 2 ** (f + 1) + Decimal(1) / 2**26
    for total, value in zip(sums.tolist(), integer.log2(sums, f).tolist(), strict=True):
        assert abs(Decimal(value) / 2**f - log2(total)) <= budget


SHAPES = [(1, 1), (1, 10), (3, 2), (64, 16), (65, 17), (2, 1025)]


@pytest.mark.parametrize(
    ("batch", "classes", "fraction_bits"),
    [(*shape, 12) for shape in SHAPES] + [(33, 10, f) for f in BITS],
)
def test_against_float64(
    batch: int, classes: int, fraction_bits: int, backend: str, device: Any
) -> None:
    """Within 1.5 units of 2^-F a sample, and equal on all backends."""
    exponents = EXPONENTS if classes < 100 else (-5, 8)
    logits, target = case(len(exponents), batch, classes, device)
    exponent = int32(exponents, device)
    args = (logits, exponent, target)
    losses = integer_cross_entropy(*args, fraction_bits=fraction_bits, backend=backend)
    assert losses.dtype == torch.int64 and losses.shape == (len(exponents),)
    reference = integer_cross_entropy(
        *(t.cpu() for t in args), fraction_bits=fraction_bits, backend="reference"
    )
    assert torch.equal(losses.cpu(), reference)
    for half, e in enumerate(exponents):
        want = exact(logits[half], e, target)
        error = float(losses[half]) / 2**fraction_bits - float(want.sum())
        assert abs(error) <= batch * (1.5 / 2**fraction_bits + 2.0**-24) + 1e-12 * want.sum()


def test_without_fraction_bits_all_is_whole(backend: str, device: Any) -> None:
    """F = 0 by hand: differences of p rounded to whole bits, `log2` of whole powers rounded."""
    logits = torch.tensor([[[64, 32, 0, -64], [10, 10, 10, 10]]], dtype=torch.int8, device=device)
    exponent, target = int32([-5], device), torch.tensor([1, 3], device=device)
    # Differences 0, 1.44, 2.89, 5.77 -> 0, 1, 3, 6; log2(1 + 1/2 + 1/8 + 1/64) = 0.71 -> 1.
    # Four alike: log2(4) = 2.
    loss = integer_cross_entropy(logits, exponent, target, fraction_bits=0, backend=backend)
    assert loss.tolist() == [1 + 1 + 2]


def test_extremes(backend: str, device: Any) -> None:
    """Saturated logits at the ends of the exponents: no overflow, and the exact order remains."""
    logits = torch.full((2, 300, 10), -127, dtype=torch.int8, device=device)
    logits[:, :, 3] = 127
    for label, value in ((3, 0), (5, scaled(254, 8, 16))):
        target = torch.full((300,), label, device=device)
        exponents = int32([8, -24], device)
        high, low = integer_cross_entropy(
            logits, exponents, target, fraction_bits=16, backend=backend
        ).tolist()
        assert high == 300 * value
        assert abs(low - 300 * 2**16 * float(log2(10 << 30))) <= 300 * 1.5  # all alike
    clamped = integer_cross_entropy(logits, int32([2**31 - 1, -(2**31)], device), target)
    assert torch.equal(clamped, integer_cross_entropy(logits, int32([8, -24], device), target))


def test_moving_all_logits_changes_nothing(backend: str, device: Any) -> None:
    logits, target = case(2, 40, 10, device, spread=60)
    exponent = int32([-4, -6], device)
    first, moved = (
        integer_cross_entropy(x, exponent, target, backend=backend) for x in (logits, logits + 60)
    )
    assert torch.equal(first, moved)


@pytest.mark.parametrize("shape", [(2, 0, 10), (0, 4, 10)], ids=str)
def test_empty(shape: Any, backend: str, device: Any) -> None:
    logits = torch.empty(shape, dtype=torch.int8, device=device)
    exponent = torch.zeros(shape[0], dtype=torch.int32, device=device)
    target = torch.zeros(shape[1], dtype=torch.int64, device=device)
    losses = integer_cross_entropy(logits, exponent, target, backend=backend)
    assert losses.tolist() == [0] * shape[0]


def test_strides_do_not_show(backend: str, device: Any) -> None:
    logits, target = case(2, 33, 10, device)
    exponent = int32([[-5, 0], [-4, 0]], device)[:, 0]
    want = integer_cross_entropy(logits, exponent.contiguous(), target, backend=backend)
    turned = logits.transpose(1, 2).contiguous().transpose(1, 2)
    every = target.repeat_interleave(2)[::2]
    assert torch.equal(integer_cross_entropy(turned, exponent, every, backend=backend), want)


@needs_triton
def test_launch_does_not_show(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("zo_kernels.triton.int8_loss")
    logits, target = case(2, 9, 37, device)
    exponent = int32([-5, -6], device)
    first = integer_cross_entropy(logits, exponent, target, backend="triton")
    for tile, cols, rows, limit in ((256, 16, 4, 0), (2048, 32, 64, 2**31 - 1), (128, 64, 2, 0)):
        monkeypatch.setattr(module, "TILE", tile)
        monkeypatch.setattr(module, "MAX_COLS", cols)
        monkeypatch.setattr(module, "MAX_ROWS", rows)
        monkeypatch.setattr(module, "INT32_MAX", limit)
        again = integer_cross_entropy(logits, exponent, target, backend="triton")
        assert torch.equal(first, again)


@pytest.mark.parametrize("label", [-1, 10, -(2**62)])
def test_a_label_outside_is_an_error_on_the_cpu(label: int) -> None:
    logits, target = case(2, 5, 10, "cpu")
    target[3] = label
    for backend in ("reference", "numba"):
        if backend == "numba":
            pytest.importorskip("numba")
        with pytest.raises(ValueError, match=rf"^target must be in \[0, 10\), got {label}$"):
            integer_cross_entropy(logits, int32([-5, -5], "cpu"), target, backend=backend)


@needs_triton
def test_a_label_outside_cannot_change_the_sign_on_a_device(device: Any) -> None:
    """It adds 2^38 to each half, and leaves the other samples' losses as they are."""
    logits, target = case(2, 5, 10, device)
    exponent = int32([-5, -5], device)
    good = torch.tensor([0, 1, 2, 4], device=device)
    want = integer_cross_entropy(logits[:, good], exponent, target[good], backend="triton")
    for label in (-1, 10, 2**62):
        target[3] = label
        losses = integer_cross_entropy(logits, exponent, target, backend="triton")
        assert torch.equal(losses, want + 2**38)


def test_sign(backend: str, device: Any) -> None:
    top = 2**63 - 1
    pairs = [(3, 2), (2, 3), (5, 5), (top, -top), (-top, top), (top, top), (0, 1)]
    losses = torch.tensor(pairs, device=device).reshape(-1)
    signs = integer_projected_sign(losses, backend=backend)
    assert signs.dtype == torch.int32 and signs.tolist() == [1, -1, 0, 1, -1, 0, -1]
    many = torch.randint(-9, 9, (2 * 300,), device=device)
    want = (many[::2] - many[1::2]).sign().to(torch.int32)
    assert torch.equal(integer_projected_sign(many, backend=backend), want)
    assert integer_projected_sign(many[:0], backend=backend).shape == (0,)


@pytest.mark.parametrize("exponents", [(-5, -5), (-5, -6), (-4, -6)], ids=str)
def test_sign_of_the_difference_is_float64s(exponents: Any, backend: str, device: Any) -> None:
    """Where float64's losses differ by more than the bound, the sign must be theirs."""
    f, batch = 12, 32
    decided = 0
    for _ in range(10):
        logits, target = case(2, batch, 10, device, spread=60)
        exponent = int32(exponents, device)
        losses = integer_cross_entropy(logits, exponent, target, fraction_bits=f, backend=backend)
        halves = zip(logits, exponents, strict=True)
        plus, minus = (float(exact(half, e, target).sum()) for half, e in halves)
        if abs(plus - minus) > 2 * batch * (1.5 / 2**f + 2.0**-24):
            decided += 1
            sign = int(integer_projected_sign(losses, backend=backend))
            assert sign == (1 if plus > minus else -1)
    assert decided >= 7
