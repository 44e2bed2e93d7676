"""What the integer products share on the host: the limit of their depth, checks. No Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.int8 import LIMIT, check_sparse
from zo_kernels.layout import check_groups
from zo_kernels.registry import check_indices, check_key, check_tensor

MAX_DEPTH = (2**31 - 1) // LIMIT**2  # 133,144: sums of more products may leave int32


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
    if not 0 <= start < stop:
        raise ValueError(f"halves need 0 <= start < stop, got start={start}, stop={stop}")
    if not shared and x.shape[0] % (stop - start):
        raise ValueError(
            f"x must have equally many rows for {stop - start} halves, got {x.shape[0]}"
        )
    check_sparse(p_zero, r_max)
    check_indices(tensor or 0, (stop - 1) // 2)
    if key is not None:
        check_key(key, w.device)
        check_groups(w.shape, "sparse_int8")
        if tensor is None:
            raise ValueError("tensor must be the index of w in the model, got None")


__all__ = ["MAX_DEPTH", "check_depth", "check_operands", "check_pair"]
