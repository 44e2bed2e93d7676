"""Statistics of the noise at 5 sigma: fixed seeds, so a test that passes passes always.

N = 2^22 = 4.2e6 values a test; an estimate with standard error s must lie within 5 s. Bits are
equal on all backends, so the fastest one stands for all.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from tests.zo_kernels._noise_model import sparse_value
from zo_kernels import sample

ROWS, COLS = 2048, 2048
N = ROWS * COLS
SEED, STEP, TENSOR = 20240601, 17, 3
SIGMAS = 5.0
P_ONE_IN = 5.7e-7  # two-sided tail of a normal beyond 5 sigma


@cache
def draw(
    kind: str = "normal",
    seed: int = SEED,
    step: int = STEP,
    tensor: int = TENSOR,
    query: int = 0,
    purpose: str = "noise",
) -> np.ndarray:
    key = torch.tensor([seed, step])
    z = sample((ROWS, COLS), key, tensor=tensor, query=query, noise=kind, purpose=purpose)
    return z.numpy().astype(np.float32)


# Central moment, its value for N(0, 1), and the variance of one term.
MOMENTS = {
    "mean": (1, 0.0, 1.0),
    "variance": (2, 1.0, 2.0),
    "skewness": (3, 0.0, 15.0),
    "kurtosis": (4, 3.0, 96.0),
    "sixth": (6, 15.0, 10395.0 - 225.0),
}


@pytest.mark.parametrize(("power", "value", "variance"), MOMENTS.values(), ids=MOMENTS)
def test_moments_of_normals(power: int, value: float, variance: float) -> None:
    z = draw().astype(np.float64)
    assert abs((z**power).mean() - value) <= SIGMAS * math.sqrt(variance / N)


def test_each_lane_of_a_call_is_normal() -> None:
    """Kolmogorov-Smirnov, n = N / 4 a lane: cosines and sines of both pairs of words."""
    for lane in range(4):
        assert stats.kstest(draw().ravel()[lane::4], "norm").pvalue > P_ONE_IN


def test_tails_of_normals() -> None:
    """Counts beyond 2, 3 and 4 are binomial."""
    for limit in (2.0, 3.0, 4.0):
        p = 2 * stats.norm.sf(limit)
        count = (np.abs(draw()) > limit).sum()
        assert abs(count - N * p) <= SIGMAS * math.sqrt(N * p * (1 - p))


def test_the_lanes_of_a_pair_are_uncorrelated_in_magnitude() -> None:
    """r cos and r sin share r: their squares would be correlated if r were not of its law."""
    z = draw().ravel()
    for a, b in ((0, 1), (2, 3), (0, 2), (1, 3)):
        x, y = z[a::4].astype(np.float64) ** 2 - 1, z[b::4].astype(np.float64) ** 2 - 1
        assert abs((x * y).mean()) <= SIGMAS * 2.0 / math.sqrt(N / 4)


def test_rademacher_is_balanced_in_every_column_of_a_call() -> None:
    """Each of the 128 bits has its own count, n = N / 128; 128 tests share 5 sigma."""
    z = draw("rademacher").reshape(-1, 128)
    assert set(np.unique(z)) == {-1.0, 1.0}
    assert abs(z.mean(dtype=np.float64)) <= SIGMAS / math.sqrt(N)
    assert np.abs(z.mean(0, dtype=np.float64)).max() <= SIGMAS / math.sqrt(N / 128)


def test_rademacher_bits_are_pairwise_uncorrelated() -> None:
    """All 8128 pairs of columns of a call: 6 sigma for the largest of them."""
    z = draw("rademacher").reshape(-1, 128)
    correlation = (z.T @ z) / len(z) - np.eye(128, dtype=np.float32)
    assert np.abs(correlation).max() <= 6.0 / math.sqrt(len(z))


@pytest.mark.parametrize(("p_zero", "r_max"), [(0.0, 1), (0.33, 15), (0.5, 127)])
def test_sparse_int8_histogram(p_zero: float, r_max: int) -> None:
    """Chi-square against the exact law: the count of 16-bit numbers that give each value."""
    law = np.bincount([sparse_value(h, p_zero, r_max) + r_max for h in range(1 << 16)])
    z = sample(
        (ROWS, COLS),
        torch.tensor([SEED, STEP]),
        tensor=TENSOR,
        noise="sparse_int8",
        p_zero=p_zero,
        r_max=r_max,
    )
    counts = np.bincount(z.numpy().ravel().astype(np.int64) + r_max, minlength=2 * r_max + 1)
    assert stats.chisquare(counts, law * (N / 65536)).pvalue > P_ONE_IN


OTHERS: dict[str, dict[str, Any]] = {
    "next-tensor": {"tensor": TENSOR + 1},
    "high-tensor": {"tensor": TENSOR + 2**31},
    "next-step": {"step": STEP + 1},
    "high-step": {"step": STEP + 2**31},
    "next-query": {"query": 1},
    "rounding": {"purpose": "rounding"},
    "dropout": {"purpose": "dropout"},
    "data": {"purpose": "data"},
    "next-seed": {"seed": SEED + 1},
    "seed-bit-32": {"seed": SEED + 2**32},
    "seed-bit-62": {"seed": SEED + 2**62},
    "swapped-tensor-step": {"tensor": STEP, "step": TENSOR},
}


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_streams_are_uncorrelated(other: dict[str, Any], kind: str) -> None:
    product = draw(kind) * draw.__wrapped__(kind, **other)
    assert abs(product.mean(dtype=np.float64)) <= SIGMAS / math.sqrt(N)


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
@pytest.mark.parametrize(
    ("rows", "cols"), [(0, 1), (0, 2), (0, 3), (0, 4), (0, 8), (0, 32), (0, 128), (1, 0), (2, 0)]
)
def test_neighbours_are_uncorrelated(rows: int, cols: int, kind: str) -> None:
    """Columns at the distances of a lane, a call, a word; rows next to each other."""
    z = draw(kind)
    product = z[: ROWS - rows, : COLS - cols] * z[rows:, cols:]
    assert abs(product.mean(dtype=np.float64)) <= SIGMAS / math.sqrt(product.size)


def test_queries_of_many_steps_average_to_a_normal() -> None:
    """The mean over 256 (step, query) streams of one element: n = 2^16 elements."""
    total = np.zeros(1 << 16)
    for step in range(64):
        for query in range(4):
            key = torch.tensor([SEED, step])
            total += sample((1 << 16,), key, tensor=TENSOR, query=query).numpy()
    assert stats.kstest(total / 16, "norm").pvalue > P_ONE_IN
