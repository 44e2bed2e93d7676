"""Normals against float64 of the same uniforms: every radius, every angle, and their products.

A uniform has 2^23 values, so the radius and the angle are checked on all of them (numba, which
shares its formulas with the kernel) or on a grid with both ends and all seams (Triton's).

Measured maxima: radius 3.6e-7 (numba, all values) and 4.6e-7 (interpreter), sine and cosine
9.4e-8; of 2^24 numba normals 6.1e-7. Bound: a normal is the product and `r <= 5.77`, so 4.6e-7 +
5.77 * 9.4e-8 and the rounding of the product, 2.4e-7, stay below 1.5e-6.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.zo_kernels._noise_model import uniform
from zo_kernels.reference.noise import normals as normals_torch
from zo_kernels.registry import has_triton
from zo_kernels.triton.philox import radius, sincos_turns
from zo_kernels.triton.shim import jit, tl

pytestmark = pytest.mark.usefixtures("poison")

VALUES = 1 << 23
RADIUS_ERROR = 5e-7
ANGLE_ERROR = 1e-7
GPU_SQRT = 5.77 * 2.0**-23  # sqrt.approx.f32: within 2^-23 of its value


def all_words() -> np.ndarray:
    return np.arange(VALUES, dtype=np.uint32) << np.uint32(9)


def seams() -> np.ndarray:
    """Both ends, each power of two, each quadrant's borders, sqrt(1/2) 2^-k, and an even grid."""
    centres = [0, VALUES - 1, *(1 << k for k in range(23)), *(i << 20 for i in range(9))]
    centres += [round(VALUES * 2.0 ** (-k - 0.5)) for k in range(20)]
    near = np.add.outer(centres, np.arange(-40, 41)).ravel()
    grid = np.linspace(0, VALUES - 1, 1 << 16).round().astype(np.int64)
    k = np.unique(np.concatenate([near[(near >= 0) & (near < VALUES)], grid]))
    return k.astype(np.uint32) << np.uint32(9)


def exact(words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u = uniform(words.astype(np.uint64))
    angle = 2 * math.pi * u
    return np.sqrt(-2 * np.log(u)), np.sin(angle), np.cos(angle)


def max_error(got: np.ndarray, want: np.ndarray) -> float:
    assert got.dtype == np.float32
    return float(np.abs(got.astype(np.float64) - want).max())


def check(
    words: np.ndarray, r: np.ndarray, sin: np.ndarray, cos: np.ndarray, sqrt: float = 0.0
) -> None:
    want_r, want_sin, want_cos = exact(words)
    assert max_error(r, want_r) <= RADIUS_ERROR + sqrt
    assert max_error(sin, want_sin) <= ANGLE_ERROR
    assert max_error(cos, want_cos) <= ANGLE_ERROR


def test_numba_on_every_value() -> None:
    pytest.importorskip("numba")
    from numba import njit

    from zo_kernels.cpu import kernels as cpu

    @njit(fastmath={"contract"})  # as the sweeps are compiled
    def evaluate(words: Any, r: Any, sin: Any, cos: Any) -> None:
        for i in range(words.size):
            r[i] = cpu.radius(words[i])
            sin[i], cos[i] = cpu.sincos_turns(words[i])

    words = all_words()
    out = [np.empty(VALUES, np.float32) for _ in range(3)]
    evaluate(words, *out)
    check(words, *out)


@jit
def _parts_kernel(word_ptr, r_ptr, sin_ptr, cos_ptr, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_word = tl.load(word_ptr + o, mask=o < n, other=0).to(tl.uint32, bitcast=True)
    sin, cos = sincos_turns(b_word)
    tl.store(r_ptr + o, radius(b_word), mask=o < n)
    tl.store(sin_ptr + o, sin, mask=o < n)
    tl.store(cos_ptr + o, cos, mask=o < n)


@pytest.mark.skipif(not has_triton(), reason="needs triton")
def test_triton_on_the_seams_and_on_every_value_with_a_gpu(device: torch.device) -> None:
    words = all_words() if device.type == "cuda" else seams()
    w = torch.from_numpy(words.view(np.int32)).to(device)
    out = [torch.full(w.shape, math.nan, device=device) for _ in range(3)]
    block = 1024 if device.type == "cuda" else 1 << 17
    _parts_kernel[(-(-w.numel() // block),)](w, *out, w.numel(), BLOCK=block)
    r, sin, cos = (t.cpu().numpy() for t in out)
    check(words, r, sin, cos, sqrt=GPU_SQRT if device.type == "cuda" else 0.0)


def test_reference_on_the_seams() -> None:
    """Float64 here; `sample` rounds it once."""
    words = seams()
    w = torch.from_numpy(words.astype(np.int64))
    zero = torch.zeros_like(w)  # u = 2^-24: the largest radius
    z = normals_torch(w, zero, zero, w).numpy()
    r, sin, cos = exact(words)
    turn = 2 * math.pi * 2.0**-24
    largest = math.sqrt(-2 * math.log(2.0**-24))
    for lane, want in enumerate(
        (r * math.cos(turn), r * math.sin(turn), largest * cos, largest * sin)
    ):
        assert np.abs(z[:, lane] - want).max() <= 1e-14


def test_the_largest_normal_is_finite() -> None:
    """u = 2^-24 at the one end, 1 - 2^-24 at the other: no logarithm of 0, no zero radius."""
    words = np.array([0, 0xFFFFFFFF], dtype=np.uint32)
    r, _, _ = exact(words)
    assert 5.76 < r[0] < 5.77 and 0 < r[1] < 4e-4
