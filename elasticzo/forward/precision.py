"""In which arithmetic the products of the head run: a dtype, and for float32 a precision.

`compute_dtype` of the wrapper is a dtype, or "ieee", "tf32", "tf32x3" for float32 products. Without
one, float32 products follow torch's own settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PRECISIONS = ("ieee", "tf32", "tf32x3")
COMPUTE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def parse_compute_dtype(
    wanted: torch.dtype | str | None,
) -> tuple[torch.dtype | None, str | None]:
    """(dtype, precision) of what a user gave; None is autocast's, or torch's setting.

    >>> parse_compute_dtype("tf32")
    (torch.float32, 'tf32')
    """
    if isinstance(wanted, str) and wanted in PRECISIONS:
        return torch.float32, wanted
    if wanted is not None and wanted not in COMPUTE_DTYPES:
        raise ValueError(
            f"compute_dtype must be one of {COMPUTE_DTYPES} or {PRECISIONS}, got {wanted!r}"
        )
    assert not isinstance(wanted, str)
    return wanted, None


def compute_dtype(device: torch.device, wanted: torch.dtype | None) -> torch.dtype | None:
    """The dtype a matrix product computes in, or None for that of its weight."""
    if wanted is not None:
        return wanted
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def precision_of(device: torch.device, convolution: bool, wanted: str | None) -> str:
    """The precision of float32 products of a layer: the user's, else torch's setting for CUDA."""
    if wanted is not None:
        return wanted
    if device.type != "cuda":  # torch's settings speak of tensor cores; a CPU multiplies in fp32
        return "ieee"
    backends: Any = torch.backends
    backend = backends.cudnn.conv if convolution else backends.cuda.matmul
    chosen = backend.fp32_precision
    if chosen == "none":
        chosen = backends.fp32_precision
    return "tf32" if chosen == "tf32" else "ieee"


@contextmanager
def vendor_precision(device: torch.device, wanted: str | None) -> Iterator[None]:
    """The vendor's products in the precision the user named; for "tf32x3" in fp32."""
    if wanted is None or device.type != "cuda":
        yield
        return
    known: Any = torch.backends
    backends = (known.cudnn.conv, known.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "tf32" if wanted == "tf32" else "ieee"
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
