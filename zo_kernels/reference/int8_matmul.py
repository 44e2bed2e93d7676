"""Reference of `zo_kernels.int8_matmul`: a product of integers, and its range."""

from __future__ import annotations

from torch import Tensor

from zo_kernels.reference.int8_linear import integer_product
from zo_kernels.reference.int8_range import int8_range


def int8_matmul(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    acc = integer_product(a, b.mT)
    return acc, int8_range(acc)


__all__ = ["int8_matmul"]
