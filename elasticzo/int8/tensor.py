"""`Int8Tensor`: int8 values with one exponent, and the one place where floats become integers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elasticzo.buffers import has_values
from elasticzo.settings import check_integer

LIMIT = 127
# Of weights and inputs. Exponents of activations are sums of them and of shifts: far within int32.
MIN_EXPONENT, MAX_EXPONENT = -64, 64


@dataclass(frozen=True, eq=False)
class Int8Tensor:
    """Values `q * 2^exponent`.

    Args:
        q: int8 in [-127, 127].
        exponent: int32 in [-64, 64], `[]`; or `[H]` for a q of `[H, ...]`, one a half.
    """

    q: Tensor
    exponent: Tensor

    def __len__(self) -> int:
        return len(self.q)

    def __getitem__(self, index: Any) -> Int8Tensor:
        """A part of the samples of a tensor with one exponent."""
        if self.exponent.ndim:
            raise TypeError("a tensor with an exponent for each half cannot be indexed: index q")
        return Int8Tensor(self.q[index], self.exponent)

    @property
    def shape(self) -> torch.Size:
        return self.q.shape

    @property
    def device(self) -> torch.device:
        return self.q.device

    def to(self, device: torch.device | str) -> Int8Tensor:
        return Int8Tensor(self.q.to(device), self.exponent.to(device))

    def dequantize(self) -> Tensor:
        """The values, float64: exact."""
        exponent = self.exponent.reshape(-1, *[1] * (self.q.ndim - 1)) if self.q.ndim else None
        scale = torch.exp2((self.exponent if exponent is None else exponent).double())
        values: Tensor = self.q.double() * scale
        return values


def ceil_log2(value: float) -> int:
    """`ceil(log2 value)` of a positive float, exactly; 0 for 0."""
    mantissa, exponent = math.frexp(value)
    return exponent - 1 if mantissa == 0.5 else exponent


def quantize(x: Tensor, exponent: int | None = None) -> Int8Tensor:
    """Convert inputs once, before training: `q = round(x 2^(7 - b))`, exponent `b - 7`.

    `b = ceil(log2 max|x|)`, 0 for all zeros; one exponent for the whole tensor, so a data set is
    converted whole. A scaling by a power of 2 is exact: the integers are the same everywhere.

    Args:
        x: any shape, floating or uint8.
        exponent: in place of `b - 7`, for what has to match another tensor, an int; values beyond
            its range are clipped. Nothing waits for a device then: what is not finite is refused on
            the CPU, elsewhere infinities are clipped and NaN becomes 0.
    Returns: q int8 like x, exponent `[]` int32.
    Raises: ValueError for values that are not finite, or an exponent that is not in [-64, 64].
    Source: NITI (arXiv:2009.13108).
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if not (x.is_floating_point() or x.dtype == torch.uint8):
        raise TypeError(f"x must be floating or uint8, got {x.dtype}")
    if exponent is None:
        exponent = ceil_log2(largest_of("x", x)) - 7
        check_range("the exponent of x", exponent)
    else:
        check_integer("exponent", exponent, MIN_EXPONENT, MAX_EXPONENT)
        if x.device.type == "cpu" and has_values(x):
            largest_of("x", x)
    q = torch.round(x.double() * 2.0**-exponent).clamp(-LIMIT, LIMIT).nan_to_num(0.0)
    at = torch.tensor(exponent, dtype=torch.int32, device=x.device)
    return Int8Tensor(q.to(torch.int8), at)


def largest_of(name: str, x: Tensor) -> float:
    """`max|x|`, 0 for no values; refuses what is not finite."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    if not math.isfinite(largest):
        nan, inf = int(x.isnan().sum()), int(x.isinf().sum())
        raise ValueError(f"{name} must be finite, got {nan} NaN and {inf} infinite of {x.numel()}")
    return largest


def quantize_weight(w: Tensor) -> Int8Tensor:
    """`q = round(127 w / max|w|)`, exponent `ceil(log2 max|w|) - 7`, on the CPU, in float64.

    The largest weight becomes 127 whatever its place between two powers of 2: a layer's scale
    changes by up to 2, which ReLU networks without bias pass on to the logits' temperature alone.

    Source: NITI (arXiv:2009.13108).
    """
    w = w.detach().to("cpu", torch.float64)
    largest = largest_of("weights", w)
    exponent = ceil_log2(largest) - 7
    check_range("the exponent of a weight", exponent)
    q = torch.round(w * (LIMIT / largest)) if largest else w
    return Int8Tensor(q.to(torch.int8), torch.tensor(exponent, dtype=torch.int32, device="cpu"))


def check_range(name: str, exponent: int) -> None:
    if not MIN_EXPONENT <= exponent <= MAX_EXPONENT:
        raise ValueError(f"{name} must be in [{MIN_EXPONENT}, {MAX_EXPONENT}], got {exponent}")


def check_input(x: Any, device: torch.device) -> None:
    """Types and places; values only where reading them stops no device."""
    if not isinstance(x, Int8Tensor):
        raise TypeError(f"x must be an Int8Tensor (see quantize), got {type(x).__name__}")
    if x.q.dtype != torch.int8 or x.exponent.dtype != torch.int32:
        raise TypeError(
            f"x must have an int8 q and an int32 exponent, got {x.q.dtype} and {x.exponent.dtype}"
        )
    if x.exponent.ndim:
        raise ValueError(f"the exponent of x must be 0-d, got shape {list(x.exponent.shape)}")
    if x.q.device != device or x.exponent.device != device:
        raise ValueError(f"x must be on {device}, got {x.q.device} and {x.exponent.device}")
    if x.q.ndim < 2 or len(x.q) == 0:
        raise ValueError(f"x must have shape [B, ...], B > 0, got {list(x.q.shape)}")
    if device.type == "cpu" and has_values(x.q):
        check_range("the exponent of x", int(x.exponent))
        if x.q.numel() and int(x.q.amin()) < -LIMIT:
            raise ValueError("q of x must be in [-127, 127], got -128")
