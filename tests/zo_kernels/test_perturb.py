"""`perturb_` (the in-place walk) against `w + alpha z` in float64, on every backend and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests._budget import NORMAL_ERROR, assert_rounded, assert_within_budget
from tests.zo_kernels._noise_model import model
from tests.zo_kernels._weights import FEW, LAYOUTS, f64, same_bits, storage
from zo_kernels import perturb_
from zo_kernels.registry import interpreted

pytestmark = pytest.mark.usefixtures("poison")

SEED, STEP, TENSOR, QUERY, ALPHA = 2**40 + 7, 2**31 + 9, 5, 2, -0.375
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


def perturb(w: Tensor, alpha: float, backend: str, noise: str = "normal") -> None:
    key = torch.tensor([SEED, STEP], device=w.device)
    alpha_ = f64(alpha, w.device)
    perturb_(w, key, alpha_, tensor=TENSOR, query=QUERY, noise=noise, backend=backend)


@pytest.mark.parametrize("noise", ["normal", "rademacher"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_twin(make: Any, dtype: torch.dtype, noise: str, backend: str, device: Any) -> None:
    w = make(dtype, device)
    before, around = w.clone(), storage(w).clone()
    perturb(w, ALPHA, backend, noise)
    z = model(w.shape, SEED, STEP, tensor=TENSOR, query=QUERY, noise=noise).double()
    exact = before.cpu().double() + ALPHA * z
    extra = abs(ALPHA) * NORMAL_ERROR if noise == "normal" else 0.0
    if dtype == torch.bfloat16:
        # The interpreter's cast drops bits where hardware rounds.
        ulps = 1.0 if backend == "triton" and interpreted() else 0.5
        assert_rounded(w, exact, ulps, extra + 1e-6)
    else:
        plain = before.cpu() + ALPHA * z.float().to(dtype)
        assert_within_budget(w, plain, exact, extra)
    w.copy_(before)
    assert same_bits(storage(w), around), "memory around the weight was written"


@pytest.mark.parametrize("make", FEW.values(), ids=FEW)
def test_the_walk_of_mezo(make: Any, backend: str, device: Any) -> None:
    """+eps, -2 eps, +eps ends within three roundings of the start, not on it."""
    w = make(torch.float32, device)
    before = w.clone()
    for alpha in (1e-3, -2e-3, 1e-3):
        perturb(w, alpha, backend)
    assert (w - before).abs().max() <= 3 * 2.0**-24 * (before.abs().max() + 0.01)


def test_the_version_counter_moves(backend: str, device: Any) -> None:
    w = torch.randn(3, 4, device=device)
    version = w._version
    perturb(w, 0.1, backend)
    assert w._version > version
