"""Checks that several ops share, on the host."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor

from zo_kernels.geometry import Geometry, conv_size
from zo_kernels.int8 import LIMIT, check_sparse
from zo_kernels.layout import check_groups
from zo_kernels.registry import PRODUCT_DTYPES, check_indices, check_key, check_noise, check_tensor

PRECISIONS = ("ieee", "tf32", "tf32x3")
MAX_DEPTH = (2**31 - 1) // LIMIT**2  # 133,144: sums of more products may leave int32


def check_span(start: int, stop: int) -> None:
    if not 0 <= start < stop:
        raise ValueError(f"halves need 0 <= start < stop, got start={start}, stop={stop}")


def check_scale(name: str, scale: float) -> None:
    """What is no number would become NaN on the way to a kernel."""
    if not (isinstance(scale, (int, float)) and -inf < scale < inf):
        raise ValueError(f"{name} must be a finite number, got {scale!r}")


def check_rows(x: Tensor, halves: int) -> None:
    """Dimension 0 of `x` is `halves` halves of equally many rows."""
    if x.shape[0] % halves:
        raise ValueError(f"x must have equally many rows for {halves} halves, got {x.shape[0]}")


def check_halves(x: Tensor, halves: int) -> None:
    if halves < 1:
        raise ValueError(f"halves must be at least 1, got {halves}")
    check_rows(x, halves)


def check_affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: list[int]) -> None:
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check_tensor(name, t, shape=shape, dtype=PRODUCT_DTYPES, device=x.device)


def check_epsilon(epsilon: float) -> None:
    if not 0 <= epsilon < inf:
        raise ValueError(f"epsilon must be finite and not negative, got {epsilon}")


def check_no_grad(op: str, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if torch.is_grad_enabled() and t is not None and t.requires_grad:
            raise RuntimeError(
                f"{name} requires grad, and {op} has no backward: use torch.no_grad()"
            )


def check_product(x: Tensor, w: Tensor, bias: Tensor | None, dims: int, name: str) -> None:
    """Operands of a float product."""
    check_tensor("w", w, dtype=PRODUCT_DTYPES)
    check_tensor("x", x, dtype=PRODUCT_DTYPES, device=w.device)
    for what, t in (("w", w), ("x", x)):
        if t.ndim != dims:
            raise ValueError(f"{what} must have {name} dimensions, got shape {list(t.shape)}")
    if bias is not None:
        check_tensor("bias", bias, shape=[w.shape[0]], dtype=PRODUCT_DTYPES, device=w.device)


def check_perturbation(
    w: Tensor,
    bias: Tensor | None,
    key: Tensor,
    eps: Tensor,
    tensor: int,
    bias_tensor: int | None,
    stop: int,
    noise: str,
    scale: float,
    bias_scale: float,
) -> None:
    """Of a product's weight and bias."""
    check_scale("scale", scale)
    check_scale("bias_scale", bias_scale)
    check_key(key, w.device)
    check_tensor("eps", eps, shape=[], dtype=[torch.float64], device=w.device)
    check_noise(noise)
    check_indices(tensor, (stop - 1) // 2)
    check_groups(w.shape, noise)
    if bias is not None and bias_tensor is None:
        raise ValueError("bias_tensor must be the index of the bias in the model, got None")
    check_indices(bias_tensor or 0)


def check_arithmetic(precision: str, compute_dtype: torch.dtype | None) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    if compute_dtype is not None and compute_dtype not in PRODUCT_DTYPES:
        raise TypeError(f"compute_dtype must be one of {PRODUCT_DTYPES}, got {compute_dtype}")


def check_images(x: Tensor, w: Tensor) -> None:
    """Sizes of a convolution's operands that have four dimensions."""
    if 0 in w.shape or 0 in x.shape[1:]:
        raise ValueError(
            f"only the batch may be empty, got shapes {list(x.shape)} of x and {list(w.shape)} of w"
        )
    if w.shape[1] != x.shape[1]:
        raise ValueError(
            f"w must have the {x.shape[1]} input channels of x (groups are not supported), "
            f"got shape {list(w.shape)}"
        )


def check_size(x: Tensor, w: Tensor, geo: Geometry, pool: bool) -> None:
    height, width = conv_size(x.shape[2:], w.shape[2:], geo)
    least = 2 if pool else 1
    if min(height, width) < least:
        raise ValueError(
            f"the convolution must give at least {least} x {least} outputs, got {height} x {width} "
            f"from shapes {list(x.shape)} of x and {list(w.shape)} of w"
        )


def check_series(x: Any, w: Any) -> None:
    for name, t in (("w", w), ("x", x)):
        check_tensor(name, t)
        if t.ndim != 3:
            raise ValueError(f"{name} must have three dimensions, got shape {list(t.shape)}")


def check_depth(depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"a sum may have at most {MAX_DEPTH} products in int32, got {depth}")


def check_operands(x: Tensor, w: Tensor, dims: int, name: str) -> None:
    check_tensor("w", w, dtype=[torch.int8])
    check_tensor("x", x, dtype=[torch.int8], device=w.device)
    for what, t in (("w", w), ("x", x)):
        if t.ndim != dims:
            raise ValueError(f"{what} must have {name} dimensions, got shape {list(t.shape)}")
    check_depth(w[0].numel() if len(w) else 0)


def check_pair(
    x: Tensor,
    w: Tensor,
    key: Tensor | None,
    tensor: int | None,
    start: int,
    stop: int,
    shared: bool,
    p_zero: float,
    r_max: int,
) -> None:
    """Which halves there are, and their noise, which only a key brings."""
    check_span(start, stop)
    if not shared:
        check_rows(x, stop - start)
    check_sparse(p_zero, r_max)
    check_indices(tensor or 0, (stop - 1) // 2)
    if key is not None:
        check_key(key, w.device)
        check_groups(w.shape, "sparse_int8")
        if tensor is None:
            raise ValueError("tensor must be the index of w in the model, got None")
