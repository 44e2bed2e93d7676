"""How far a floating-point result may be from float64: budgets computed, not tuned.

`budget = 2 * (error of a low-precision reference + eps * max|exact|)`: a kernel may be as wrong as
plain torch in the same precision, twice, and a rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of a normal against float64 of the same uniforms (measured in test_normal_error.py).
NORMAL_ERROR = 1.5e-6


def assert_within_budget(actual: Tensor, low: Tensor, exact: Tensor, extra: float = 0.0) -> None:
    """`actual` and `low` come in one precision, `exact` is float64; NaN is never within.

    Args:
        extra: what is known to be added, such as the error of a normal times its factor.
    """
    assert actual.shape == exact.shape and actual.dtype == low.dtype
    if exact.numel() == 0:
        return
    exact = exact.to(actual.device)
    error = (actual.double() - exact).abs().max().item()
    low_error = (low.to(actual.device).double() - exact).abs().max().item()
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    budget = 2 * (low_error + rounding) + extra
    assert error <= budget, f"error {error:.3g} exceeds the budget {budget:.3g}"


def assert_rounded(actual: Tensor, exact: Tensor, ulps: float, extra: float = 0.0) -> None:
    """Every element lies within `ulps` spacings of its own value: 0.5 is rounding to nearest."""
    assert actual.shape == exact.shape
    exact = exact.to(actual.device)
    info = torch.finfo(actual.dtype)
    _, exponent = torch.frexp(exact.abs().clamp_min(info.tiny))
    spacing = torch.ldexp(torch.full_like(exact, info.eps), exponent - 1)
    excess = (actual.double() - exact).abs() - ulps * spacing - extra
    # Written so that NaN fails.
    assert bool((excess <= 0).all()), f"beyond {ulps} ulp by {excess.max().item():.3g}"


__all__ = ["NORMAL_ERROR", "assert_rounded", "assert_within_budget"]
