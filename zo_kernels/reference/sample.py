"""Reference of `zo_kernels.sample`: noise of a given shape."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.layout import rows_cols, to_shape
from zo_kernels.reference.noise import noise_rows

DTYPES = {
    "normal": torch.float32,
    "rademacher": torch.float32,
    "sparse_int8": torch.int8,
    "bits": torch.int64,
}


def sample_rows(
    shape: Sequence[int],
    key: Tensor,
    *,
    tensor: int,
    query: int = 0,
    noise: str = "normal",
    purpose: str = "noise",
    first_row: int = 0,
) -> Tensor:
    """Noise of a slice of rows, `first_row` being the number of the first."""
    seed, step = key.tolist()
    rows, cols = rows_cols(shape)
    at = {"seed": seed, "step": step, "tensor": tensor, "query": query, "first_row": first_row}
    z = noise_rows(noise, rows, cols, **at, purpose=purpose, device=key.device)
    return to_shape(z.to(DTYPES[noise]), shape)


def sample(
    shape: Sequence[int],
    key: Tensor,
    *,
    tensor: int,
    query: int = 0,
    noise: str = "normal",
    purpose: str = "noise",
    p_zero: float = 0.0,
    r_max: int = 1,
) -> Tensor:
    seed, step = key.tolist()
    rows, cols = rows_cols(shape)
    z = noise_rows(
        noise,
        rows,
        cols,
        seed=seed,
        step=step,
        tensor=tensor,
        query=query,
        purpose=purpose,
        p_zero=p_zero,
        r_max=r_max,
        device=key.device,
    )
    return to_shape(z.to(DTYPES[noise]), shape)


__all__ = ["sample", "sample_rows"]
