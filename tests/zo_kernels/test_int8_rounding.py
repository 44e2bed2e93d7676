"""The roundings of a right shift, exhaustively on small numbers and at the edges of int32.

Rule: a shift by s acts on the magnitude. `t` is its whole part, `p` the s dropped bits; the result
is t, or t + 1 where
- nearest: `p / 2^s >= 1/2`,
- pseudo: the upper half of p, as a number, is larger than the lower half; for odd s the lower half
  is a bit shorter and gets a 0 behind it, for s = 1 it is 0,
- stochastic: p is larger than the s low bits of a word of noise.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.zo_kernels._integer_model import ROUNDINGS, bits, clip, factor, rounded, rounds_up
from zo_kernels import int8_range, int8_requantize, sample
from zo_kernels.int8 import FACTORS, sparse_constants, update_shift
from zo_kernels.int8 import ROUNDINGS as NUMBERS
from zo_kernels.reference import integer
from zo_kernels.registry import has_triton, interpreted
from zo_kernels.triton.integer import bit_length, round_shift
from zo_kernels.triton.shim import jit, tl

pytestmark = pytest.mark.usefixtures("poison")
LIMIT = 1 << 13
EDGES = sorted(
    {sign * (2**k + d) for k in range(31) for d in (-1, 0, 1) for sign in (1, -1)}
    | {2**31 - 1, -(2**31) + 1, -(2**31)}
)


@jit
def _round_kernel(x_ptr, s_ptr, word_ptr, out_ptr, n, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x_ptr + o, mask=o < n, other=0)
    b_s = tl.load(s_ptr + o, mask=o < n, other=0).to(tl.uint32)
    b_word = tl.load(word_ptr + o, mask=o < n, other=0).to(tl.uint32)
    tl.store(out_ptr + o, round_shift(b_x, b_s, b_word, ROUNDING), mask=o < n)


def by_triton(x: Tensor, s: Tensor, rounding: str, words: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    block = 1 << 17 if interpreted() else 1024
    grid = (-(-x.numel() // block),)
    numbers = (x.to(torch.int32), s.to(torch.int32), words.contiguous(), out, x.numel())
    _round_kernel[grid](*numbers, ROUNDING=NUMBERS[rounding], BLOCK=block)
    return out


def by_reference(x: Tensor, s: Tensor, rounding: str, words: Tensor) -> Tensor:
    return integer.round_shift(x, s, rounding, words)


@cache
def _numba_loop() -> Any:
    from numba import njit

    from zo_kernels.cpu.int8_kernels import round_shift

    @njit
    def loop(x: Any, s: Any, words: Any, out: Any, rounding: int) -> None:
        for i in range(x.shape[0]):
            shift, word = np.uint32(s[i]), np.uint32(words[i])
            out[i] = round_shift(x[i], shift, word, rounding)

    return loop


def by_numba(x: Tensor, s: Tensor, rounding: str, words: Tensor) -> Tensor:
    pytest.importorskip("numba")
    out = torch.empty(x.shape, dtype=torch.int32)
    arrays = (x.to(torch.int32).cpu(), s.cpu(), words.cpu(), out)
    _numba_loop()(*(a.numpy() for a in arrays), NUMBERS[rounding])
    return out


SHIFTS = [
    pytest.param(by_reference, id="reference"),
    pytest.param(by_numba, id="numba"),
    pytest.param(
        by_triton,
        id="triton",
        marks=pytest.mark.skipif(not has_triton(), reason="needs triton"),
    ),
]


def word(i: int) -> int:
    """Some word of noise for case i."""
    return (i * 2654435761 + 12345) % 2**32


@cache
def all_cases(rounding: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, s, words and results: every |x| <= 2^13 and every edge of int32, for every s."""
    numbers = [*range(-LIMIT, LIMIT + 1), *(x for x in EDGES if abs(x) > LIMIT)]
    rows = []
    for s in range(32):
        for x in numbers:
            w = word(abs(x) + 77 * s)
            rows.append((x, s, w))
    results: dict[tuple[int, int, int], int] = {}
    want = []
    for x, s, w in rows:
        at = (abs(x), s, w)
        if at not in results:
            results[at] = rounded(abs(x), s, rounding, w)
        want.append(results[at] if x >= 0 else -results[at])
    table = torch.tensor(rows, dtype=torch.int64)
    return table[:, 0], table[:, 1], table[:, 2], torch.tensor(want)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("shift", SHIFTS)
def test_every_small_number_and_every_edge(shift: Any, rounding: str, device: Any) -> None:
    x, s, words, want = all_cases(rounding)
    got = shift(x.to(device), s.to(device), rounding, words.to(device))
    assert torch.equal(got.cpu().long(), want)
    for i in range(0, len(x), 9973):  # the table's signs are the model's
        assert int(want[i]) == rounded(int(x[i]), int(s[i]), rounding, int(words[i]))


@pytest.mark.parametrize("shift", SHIFTS)
def test_stochastic_goes_up_for_the_fraction_of_all_words(shift: Any, device: Any) -> None:
    """Over all 2^s low bits of a word, exactly p of 2^s go up: no bias, whatever the high bits."""
    for s in range(1, 8):
        magnitude = torch.arange(1 << (s + 1)).repeat_interleave(1 << s)
        words = torch.arange(1 << s).repeat(1 << (s + 1)) + (0xABCDEF << s) % (1 << 32 - s)
        for sign in (1, -1):
            x = (sign * magnitude).to(device)
            got = shift(x, torch.full_like(x, s), "stochastic", words.to(device)).cpu().long()
            sums = got.view(-1, 1 << s).sum(1)
            assert torch.equal(sums, sign * torch.arange(1 << (s + 1)))


def bias(s: int, rounding: str) -> Fraction:
    """Mean of (result - m / 2^s) over all dropped bits, of a magnitude."""
    ups = sum(rounds_up(p, s, rounding) for p in range(2**s))
    return Fraction(ups, 2**s) - Fraction(2**s - 1, 2 * 2**s)


@pytest.mark.parametrize("s", range(1, 15))
def test_biases_are_those_of_the_docstrings(s: int) -> None:
    assert bias(s, "nearest") == Fraction(1, 2 ** (s + 1))
    n = 2 ** (s // 2)
    odd, even = Fraction(1, 2 ** (s + 1)), -Fraction(n - 1, 2 * n * n)
    assert bias(s, "pseudo") == (odd if s % 2 else even)


def test_only_nearest_is_monotone() -> None:
    """So a maximum over points or pixels may be taken before a nearest shift only."""
    for s in range(1, 9):
        results = [rounded(x, s, "nearest") for x in range(-600, 600)]
        assert results == sorted(results)
    assert rounded(2, 2, "pseudo") == 1 and rounded(3, 2, "pseudo") == 0


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_powers_of_two_fit_in_int8(
    rounding: str, backend: str, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2^k - 1, 2^k, 2^k + 1 of both signs, each a tensor of its own: range, exponent, clipping."""
    for name in ("BLOCK", "RANGE_BLOCK"):  # a program for each number
        monkeypatch.setattr(import_module("zo_kernels.triton.int8_range"), name, 128)
    # The interpreter is slow, and the roundings themselves are tested above.
    edges = EDGES if backend != "triton" or rounding == "nearest" else EDGES[1::4]
    acc = torch.tensor(edges, dtype=torch.int64).to(torch.int32).to(device)
    count = len(edges)
    key = torch.tensor([3, 4], device=device)
    zero = torch.zeros((), dtype=torch.int32, device=device)
    settings = {"halves": count, "rounding": rounding, "key": key, "backend": backend}
    q, exponent = int8_requantize(acc, None, zero, **settings)
    found = int8_range(acc, halves=count, backend=backend)
    if rounding == "stochastic":  # each half is one element: they share their word
        where = {"tensor": 0, "noise": "bits", "purpose": "rounding", "backend": "reference"}
        noise = int(sample((1,), key.cpu(), **where))
    else:
        noise = 0
    for i, x in enumerate(edges):
        s = max(bits(abs(x)) - 7, 0)
        assert int(found[i]) == bits(abs(x)), x
        assert int(exponent[i]) == s, x
        assert int(q[i]) == clip(rounded(x, s, rounding, noise)), x
    assert int(q.abs().max()) == 127


def test_every_small_number_is_requantised(device: Any) -> None:
    """Every |x| <= 2^13 as a tensor of its own, on the backends that make it quickly."""
    numbers = range(-LIMIT, LIMIT + 1)
    acc = torch.arange(-LIMIT, LIMIT + 1, dtype=torch.int32)
    zero = torch.zeros((), dtype=torch.int32)
    for backend in ("reference", "numba"):
        if backend == "numba":
            pytest.importorskip("numba")
        for rounding in ("nearest", "pseudo"):
            settings = {"halves": len(numbers), "rounding": rounding, "backend": backend}
            q, exponent = int8_requantize(acc, None, zero, **settings)
            shifts = [max(bits(abs(x)) - 7, 0) for x in numbers]
            assert exponent.tolist() == shifts
            pairs = zip(numbers, shifts, strict=True)
            assert q.tolist() == [clip(rounded(x, s, rounding)) for x, s in pairs]


@jit
def _bit_length_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    b_x = tl.load(x_ptr + o, mask=o < n, other=0)
    tl.store(out_ptr + o, bit_length(b_x), mask=o < n)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_bit_length(dtype: torch.dtype, device: Any) -> None:
    size = 31 if dtype == torch.int32 else 63
    numbers = sorted({max(2**k + d, 0) for k in range(size) for d in (-1, 0, 1)} | {2**size - 1})
    x = torch.tensor(numbers, dtype=dtype, device=device)
    want = [n.bit_length() for n in numbers]
    assert integer.bit_length(x.long()).tolist() == want
    if has_triton():
        out = torch.empty_like(x)
        _bit_length_kernel[(1,)](x, out, len(numbers), BLOCK=256)
        assert out.tolist() == want


def test_constants() -> None:
    """The factors of exp2; the product that replaces the noise's division; the update's shift."""
    assert tuple(factor(k) for k in range(1, 17)) == FACTORS
    for p_zero in [i / 65536 for i in (0, 1, 2, 3, 1000, 32767, 32768, 32769, 65534, 65535)] + [
        i / 97 for i in range(97)
    ]:
        for r_max in (1, 2, 3, 63, 64, 126, 127):
            p0, magic, shift = sparse_constants(p_zero, r_max)
            assert -(1 << 31) <= magic < 1 << 31
            divisor = 65536 - p0
            n = np.arange(divisor, dtype=np.uint64) * np.uint64(2 * r_max + 1)
            product = (n * np.uint64(magic & 0xFFFFFFFF)) >> np.uint64(32)
            assert np.array_equal(product >> np.uint64(shift), n // np.uint64(divisor))
    assert [update_shift(1, 127, b) for b in (1, 6, 7, 8)] == [6, 1, 0, 0]
    assert [update_shift(q, 1, 1) for q in (1, 2, 3, 4, 5)] == [0, 0, 1, 1, 2]
