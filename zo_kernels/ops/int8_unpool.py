"""Errors of maxima to the places they came from: what windows 2 x 2, stride 2, pass back.

On a device four masked writes; traffic: the errors and places four times, the result once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.registry import check_tensor, register, resolve_backend, twin


def _empty(error: Tensor, size: Sequence[int]) -> Tensor:
    return torch.empty((*error.shape[:2], *size), dtype=torch.int8, device=error.device)


def _masked(error: Tensor, places: Tensor, size: Sequence[int]) -> Tensor:
    out = _empty(error, size).zero_()
    height, width = (2 * n for n in error.shape[2:])
    for place in range(4):
        to = out[:, :, place // 2 : height : 2, place % 2 : width : 2]
        torch.mul(error, places == place, out=to)
    return out


def _implementation(error: Tensor, places: Tensor, size: list[int], backend: str) -> Tensor:
    backend = resolve_backend(backend, error.device)
    if backend == "triton" or error.numel() == 0:
        return _masked(error, places, size)
    out: Tensor = twin("int8_unpool", backend)(error, places, size)
    return out


def _fake(error: Tensor, places: Tensor, size: list[int], backend: str) -> Tensor:
    return _empty(error, size)


_OP = register(
    "int8_unpool(Tensor error, Tensor places, int[] size, str backend) -> Tensor",
    _implementation,
    _fake,
)


def int8_unpool(
    error: Tensor, places: Tensor, size: Sequence[int], *, backend: str = "auto"
) -> Tensor:
    """`out[b, c, 2 h + p // 2, 2 w + p % 2] = error[b, c, h, w]`, p the place; 0 elsewhere.

    Args:
        error: `[B, C, H, W]` int8, of the maxima; any strides, as for places.
        places: `[B, C, H, W]` uint8 in [0, 3], of `int8_conv2d_max_pool`.
        size: (height, width) of the result: 2 H and 2 W, or one more.
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[B, C, *size]` int8, contiguous.
    Determinism: a copy.
    """
    check_tensor("error", error, dtype=[torch.int8])
    if error.ndim != 4:
        raise ValueError(f"error must have four dimensions, got shape {list(error.shape)}")
    check_tensor("places", places, shape=error.shape, dtype=[torch.uint8], device=error.device)
    wanted = [[2 * n, 2 * n + 1] for n in error.shape[2:]]
    if len(size) != 2 or any(n not in known for n, known in zip(size, wanted, strict=True)):
        raise ValueError(
            f"size must be (height, width) in {wanted[0]} and {wanted[1]}, got {list(size)}"
        )
    out: Tensor = _OP(error, places, [*size], backend)
    return out


__all__ = ["int8_unpool"]
