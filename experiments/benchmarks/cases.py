"""One call of a kernel that is timed: inputs, bytes, operations, and its float64 result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.section import Bench

NOISES = ("normal", "rademacher")
WEIGHT = EPS = 0.02  # a perturbation as large as the weights: a wrong one shows in bf16 too


@dataclass
class Case:
    """One call.

    Attributes:
        make: inputs. run: the call on them. verify: the error of a call, for products also of
            another one than `run`; raises Refused.
        bytes: read and written. flops: of products, in the unit `kind` of the peaks.
        elements: of noise, `instructions` each.
        vendor: what the vendor's library takes for the products alone, or the same function.
    """

    kernel: str
    name: str
    make: Callable[[], Any]
    run: Callable[[Any], Any]
    verify: Callable[..., float]
    bytes: int
    flops: float = 0.0
    kind: str = "fp32"
    elements: int = 0
    instructions: float = 0.0
    precision: str | None = None
    vendor: Callable[[Any], Any] | None = None
    vendor_what: str = ""


class Shared:
    """What the calls of a run have in common."""

    def __init__(self, bench: Bench) -> None:
        device = bench.device
        self.device, self.backend = device, bench.backend
        self.key = torch.tensor([3, 5], device=device)
        self.before = torch.tensor([3, 4], device=device)
        self.eps = torch.tensor(EPS, dtype=torch.float64, device=device)
        self.lr = torch.tensor([0.01], dtype=torch.float64, device=device)
        self.decay = torch.tensor([0.1], dtype=torch.float64, device=device)
        self.skip = torch.zeros((), device=device)

    def coeff(self, queries: int) -> Tensor:
        """Projected gradients that move a weight about as far as it is large."""
        return torch.linspace(1.0, 2.0, queries, dtype=torch.float64, device=self.device)

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=self.device)).to(dtype)
