"""Stochastic rounding of bf16 weights.

Rule: add a uniform 16-bit number (the upper half of a word of purpose "rounding") to the fp32
pattern and drop the lower 16 bits, so that `x` goes to the neighbour farther from zero with
probability (dropped bits) / 2^16. Infinities and NaN are cast as they are.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.zo_kernels._noise_model import model
from tests.zo_kernels._weights import IN_PLACE, bits, f64, same_bits
from zo_kernels import update_
from zo_kernels.reference.rules import round_stochastically
from zo_kernels.registry import has_triton, interpreted
from zo_kernels.triton.shim import jit, tl
from zo_kernels.triton.update import round_to_bf16

pytestmark = pytest.mark.usefixtures("poison")

SEED, STEP, TENSOR = 77, 5, 3
SMALLEST_NORMAL = 2.0**-126
# fp32 patterns: zeros, subnormals, powers of two and their neighbours, all borders of the dropped
# half, the largest finite numbers, both signs.
PATTERNS = [
    sign | pattern
    for sign in (0, 1 << 31)
    for pattern in (
        *(0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x7FFFFF, 0x800000),
        *(0x3F7FFFFF, 0x3F800000, 0x3F800001, 0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F80FFFF),
        *(0x40490FDB, 0x7F7F0000, 0x7F7FFFFF),
    )
]


def rounded_pattern(pattern: int, word: int) -> int:
    """The 16 bits of the result, in integers: the low half of the word takes no part."""
    return ((pattern + (word >> 16)) & 0xFFFFFFFF) >> 16


def all_cases() -> tuple[Tensor, Tensor, np.ndarray]:
    """Every upper half of a word, the lower half at its extremes, for every pattern."""
    upper = np.arange(1 << 16, dtype=np.int64) << 16
    words = np.where(np.arange(1 << 16) % 2 == 0, upper, upper | 0xFFFF)
    patterns = np.array(PATTERNS, dtype=np.int64)
    want = ((patterns[:, None] + (words >> 16)) & 0xFFFFFFFF) >> 16
    x = np.broadcast_to(patterns[:, None], want.shape).astype(np.uint32).view(np.float32)
    w = torch.from_numpy(np.broadcast_to(words, want.shape).copy())
    return torch.from_numpy(x.copy()), w, want.astype(np.uint16).view(np.int16)


@jit
def _round_kernel(x_ptr, word_ptr, out_ptr, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x_ptr + o, mask=o < n, other=0.0)
    b_word = tl.load(word_ptr + o, mask=o < n, other=0).to(tl.uint32)
    tl.store(out_ptr + o, round_to_bf16(b_x, b_word), mask=o < n)


def triton_rounded(x: Tensor, words: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    block = 1 << 16 if interpreted() else 1024
    _round_kernel[(-(-x.numel() // block),)](x, words, out, x.numel(), BLOCK=block)
    return out


ROUND = [
    pytest.param(round_stochastically, id="reference"),
    pytest.param(
        triton_rounded,
        id="triton",
        marks=pytest.mark.skipif(not has_triton(), reason="needs triton"),
    ),
]


@pytest.mark.parametrize("rounded", ROUND)
def test_rule_on_every_16_bit_number(rounded: Any, device: torch.device) -> None:
    x, words, want = all_cases()
    got = bits(rounded(x.to(device), words.to(device))).cpu().numpy()
    # The interpreter's cast to bf16 loses bits of subnormals; hardware's is exact.
    known = x[:, 0].abs() >= SMALLEST_NORMAL if rounded is triton_rounded and interpreted() else ...
    assert np.array_equal(got[known], want[known])
    # The vectorised model is the scalar one.
    for p, w in ((0, 0), (3, 190), (17, 65535), (30, 40000)):
        assert int(want[p, w]) & 0xFFFF == rounded_pattern(PATTERNS[p], int(words[p, w]))


@pytest.mark.parametrize("rounded", ROUND)
def test_infinities_and_nan_stay(rounded: Any, device: torch.device) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan], device=device)
    words = torch.full((3,), 0xFFFFFFFF, dtype=torch.int64, device=device)
    got = rounded(x, words).float().cpu()
    assert torch.equal(got[:2], x[:2].cpu()) and got[2].isnan()


def update(w: Tensor, backend: str, step: int, coeff: float, decay: float, noise: str) -> None:
    device = w.device
    update_(
        [w],
        torch.tensor([SEED, step], device=device),
        f64([coeff], device),
        f64([1.0], device),
        f64([decay], device),
        torch.zeros((), device=device),
        tensors=[TENSOR],
        groups=[0],
        scales=[1.0],
        noise=noise,
        backend=backend,
    )


@pytest.mark.parametrize("make", IN_PLACE.values(), ids=IN_PLACE)
def test_each_element_uses_its_own_word(make: Any, backend: str, device: Any) -> None:
    """`w -= c z` with signs is one exact product and one rounding to fp32: all bits are known."""
    w = make(torch.bfloat16, device)
    before = w.cpu().float()
    update(w, backend, STEP, 0.0123, 0.0, "rademacher")
    z = model(w.shape, SEED, STEP, tensor=TENSOR, noise="rademacher")
    words = model(w.shape, SEED, STEP, tensor=TENSOR, noise="bits", purpose="rounding")
    new = before - torch.tensor(0.0123, dtype=torch.float32) * z
    patterns = bits(new).long() & 0xFFFFFFFF
    want = ((patterns + (words >> 16)) & 0xFFFFFFFF) >> 16
    assert same_bits(w, want.to(torch.int32).to(torch.int16).view(torch.bfloat16))


@pytest.mark.parametrize("value", [1.0, -1.0, 1.5])
def test_unbiased_over_many_steps(
    value: float, backend: str, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`w <- (1 - a) w`, a 16th of a bf16 spacing a step, which rounding to nearest would lose.

    n weights, T steps: the expectation is (1 - a)^T w exactly, the variance of one weight at most
    T (spacing / 2)^2; the mean must lie within 5 sigma.
    """
    n, steps, a = 1 << 13, 32, 2.0**-12
    if interpreted():  # one program a step
        monkeypatch.setattr(import_module("zo_kernels.triton.table"), "BLOCK", n)
    w = torch.full((n,), value, dtype=torch.bfloat16, device=device)
    for step in range(steps):
        update(w, backend, step, 0.0, a, "normal")
    sigma = math.sqrt(steps) * 2.0**-7 / 2 / math.sqrt(n)
    drift = value * ((1 - a) ** steps - 1)
    assert 5 * sigma < abs(drift)  # no update at all would fail
    assert abs(w.double().mean().item() - value - drift) <= 5 * sigma
