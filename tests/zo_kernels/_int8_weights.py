"""int8 weights and int32 accumulators of every layout the integer ops promise to take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.zo_kernels._weights import ALL, EXPANDED


def int8_weight(name: str, device: Any) -> Tensor:
    """Values all over [-127, 127], with both ends."""
    w = ALL[name](torch.int8, device)
    if name not in EXPANDED:
        w.copy_(torch.randint(-127, 128, w.shape, dtype=torch.int8))
        if w.numel() > 1:
            w[(0,) * w.ndim], w[(-1,) * w.ndim] = 127, -127
    return w


def accumulator(name: str, device: Any, largest: int = 30_000) -> Tensor:
    """int32 in [-largest, largest]."""
    acc = ALL[name](torch.int32, device)
    if name not in EXPANDED:
        acc.copy_(torch.randint(-largest, largest + 1, acc.shape))
    return acc


def key_on(device: Any, step: int = 2**31 + 9) -> Tensor:
    return torch.tensor([2**40 + 7, step], dtype=torch.int64, device=device)


def int32(values: Any, device: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


__all__ = ["accumulator", "int8_weight", "int32", "key_on"]
