"""The noise itself, as a tensor: for tests, dropout masks, data order and whoever wants to see `z`.

Nothing in a step stores `z`; the kernels that use it make it in registers.
"""
# mypy: disable-error-code="return"

from __future__ import annotations

from typing import Any

from torch import Tensor

from zo_kernels.int8 import check_sparse
from zo_kernels.layout import PURPOSES, SAMPLE_DTYPES, Shape, check_groups
from zo_kernels.registry import check_indices, check_key, check_noise, op


def _fake(shape: Shape, key: Tensor, noise: str, **_: Any) -> Tensor:
    return key.new_empty(shape, dtype=SAMPLE_DTYPES[noise])


@op(like="key", fake=_fake)
def sample(
    shape: Shape,
    key: Tensor,
    *,
    tensor: int,
    query: int = 0,
    noise: str = "normal",
    purpose: str = "noise",
    p_zero: float = 0.0,
    r_max: int = 1,
    first_row: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Noise for a tensor of `shape`: a pure function of (seed, step, query, tensor, row, column).

    Args:
        shape: of the result; columns run with dimension 1 innermost.
        key: `[2]` int64, (seed, step); its device is the result's.
        tensor: index of the tensor in the model.
        query: direction of this step, in [0, 2^24).
        noise: "normal" (fp32), "rademacher" (fp32 +-1), "sparse_int8" (int8 in [-r_max, r_max]) or
            "bits" (the words, int64 in [0, 2^32)).
        purpose: "noise", "rounding", "dropout", "data", "left", "right", "sample_left",
            "sample_right" or "node": separate streams.
        p_zero, r_max: of "sparse_int8": probability of a forced zero in [0, 1), largest value.
        first_row: number of the first row, where the result is a slice of rows of the tensor (a
            part of a batch, say).
        backend: "auto", "triton", "numba" or "reference".
    Returns: `[*shape]`, contiguous.
    Determinism: integers and signs are bit-equal on all backends; normals within 1.5e-6 of float64.
    Source: Salmon et al. 2011 (Philox4x32-10); Box and Muller 1958.
    """
    check_key(key)
    check_noise(noise, tuple(SAMPLE_DTYPES))
    check_indices(tensor, query)
    if first_row < 0:
        raise ValueError(f"first_row must be >= 0, got {first_row}")
    check_groups(shape, noise, first_row)
    if purpose not in PURPOSES:
        raise ValueError(f"purpose must be one of {tuple(PURPOSES)}, got {purpose!r}")
    check_sparse(p_zero, r_max)
