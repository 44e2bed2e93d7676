"""In which arithmetic the products of the head run: a dtype, and for float32 a precision.

`compute_dtype` of the wrapper is a dtype, or "ieee", "tf32", "tf32x3" for float32 products. Without
one, float32 products follow torch's own settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


def precision_of(device: torch.device, convolution: bool, wanted: str | None) -> str:
    """The precision of float32 products of a layer: the user's, else torch's setting for CUDA."""
    if wanted is not None:
        return wanted
    if device.type != "cuda":  # torch's settings speak of tensor cores; a CPU multiplies in fp32
        return "ieee"
    if convolution:
        return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@contextmanager
def vendor_precision(device: torch.device, wanted: str | None) -> Iterator[None]:
    """The vendor's products in the precision the user named; for "tf32x3" in fp32."""
    if wanted is None or device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if wanted == "tf32" else "highest")
    try:
        with torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled,
            benchmark=torch.backends.cudnn.benchmark,
            deterministic=torch.backends.cudnn.deterministic,
            allow_tf32=wanted == "tf32",
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


__all__ = ["COMPUTE_DTYPES", "parse_compute_dtype", "precision_of", "vendor_precision"]
