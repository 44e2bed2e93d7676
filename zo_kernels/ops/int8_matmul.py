"""`a b` of int8 matrices, summed in int32, and the bits of its range: the integer tail's products.

`int8_paired_linear` without noise, for one half and any strides: the error that a layer passes on
is `int8_matmul(err, w)` of `[B, N]` and `[N, K]`, the gradient of its weight
`int8_matmul(err.mT, x)` of `[N, B]` and `[B, K]`.

NITI: Wang et al., arXiv:2009.13108 (backward pass of a linear layer).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zo_kernels.ops.checks import check_depth
from zo_kernels.registry import check_tensor, register, resolve_backend, twin
from zo_kernels.triton.int8_linear import launch


def _empty(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    acc = torch.empty((a.shape[0], b.shape[1]), dtype=torch.int32, device=a.device)
    return acc, torch.zeros((), dtype=torch.int32, device=a.device)


def _implementation(a: Tensor, b: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    backend = resolve_backend(backend, a.device)
    if backend == "triton":
        acc, bits = _empty(a, b)
        if acc.numel():
            launch(a, b.t(), acc, bits, None, 0, 0, 1, False, 0.0, 1, False)
        return acc, bits
    result: tuple[Tensor, Tensor] = twin("int8_matmul", backend)(a, b)
    return result


def _fake(a: Tensor, b: Tensor, backend: Any) -> tuple[Tensor, Tensor]:
    return _empty(a, b)


_OP = register(
    "int8_matmul(Tensor a, Tensor b, str backend) -> (Tensor, Tensor)", _implementation, _fake
)


def int8_matmul(a: Tensor, b: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`a b`, and its bits.

    Args:
        a: `[M, K]` int8 in [-127, 127], K at most 133,144; any strides, as for b.
        b: `[K, N]` int8.
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[M, N]` int32, and `[]` int32: its `int8_range`.
    Determinism: equal on all backends, for any launch.
    Source: NITI (arXiv:2009.13108).
    """
    check_tensor("a", a, dtype=[torch.int8])
    check_tensor("b", b, dtype=[torch.int8], device=a.device)
    for name, t in (("a", a), ("b", b)):
        if t.ndim != 2:
            raise ValueError(f"{name} must have two dimensions, got shape {list(t.shape)}")
    check_tensor("b", b, shape=[a.shape[1], b.shape[1]])
    check_depth(a.shape[1])
    acc, bits = _OP(a, b, backend)
    return acc, bits


__all__ = ["int8_matmul"]
