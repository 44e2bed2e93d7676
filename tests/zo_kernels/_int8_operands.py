"""Operands of the integer products, and what they give: noise from its model, sums in float64,
which holds them all exactly."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.zo_kernels._int8_weights import key_on
from tests.zo_kernels._integer_model import bits
from tests.zo_kernels._noise_model import model

TENSOR = 2**31 + 5
NOISE = {"p_zero": 0.33, "r_max": 15}


def int8(*shape: int, device: Any = "cpu") -> Tensor:
    """Values all over [-127, 127]."""
    return torch.randint(-127, 128, shape, dtype=torch.int8).to(device)


def halves_of(w: Tensor, start: int, stop: int, noisy: bool, **noise: Any) -> list[Tensor]:
    """`clip(w +- z)`, int64."""
    if not noisy:
        return [w.cpu().long()] * (stop - start)
    seed, step = key_on("cpu").tolist()
    found = []
    for half in range(start, stop):
        where = {"tensor": TENSOR, "query": half // 2, "noise": "sparse_int8"} | noise
        z = model(w.shape, seed, step, **where)
        found.append((w.cpu().long() + (-z if half % 2 else z)).clamp(-127, 127))
    return found


def expected(
    x: Tensor,
    w: Tensor,
    *,
    start: int = 0,
    stop: int = 2,
    noisy: bool = True,
    shared: bool = False,
    relu: bool = False,
    pool: bool = False,
    p_zero: float = NOISE["p_zero"],
    r_max: int = 15,
    **geometry: Any,
) -> tuple[Tensor, Tensor]:
    """Accumulators and bits, of a linear layer or a convolution."""
    count = stop - start
    sums, ranges = [], []
    for half, w_half in enumerate(halves_of(w, start, stop, noisy, p_zero=p_zero, r_max=r_max)):
        rows = (x if shared else x.tensor_split(count)[half]).cpu().double()
        if w.ndim == 2:
            y = rows @ w_half.double().mT
        else:
            conv = F.conv2d if w.ndim == 4 else F.conv1d
            y = conv(rows, w_half.double(), **geometry)
        y = F.max_pool2d(y, 2) if pool else y
        y = y.relu() if relu else y
        sums.append(y)
        ranges.append(bits(int(y.abs().max())) if y.numel() else 0)
    return torch.cat(sums).to(torch.int32), torch.tensor(ranges, dtype=torch.int32)


def assert_same(found: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(found, want, strict=True):
        assert a.dtype == b.dtype == torch.int32
        assert a.shape == b.shape and torch.equal(a.cpu(), b.cpu())


__all__ = ["NOISE", "TENSOR", "assert_same", "expected", "halves_of", "int8"]
