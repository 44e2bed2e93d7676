"""CPU twin of `zo_kernels.sample`: the fast noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zo_kernels.cpu.kernels import BITS, SPARSE, fill_float, fill_int
from zo_kernels.cpu.sweeps import KINDS, counter_words
from zo_kernels.layout import PER_CALL, SAMPLE_DTYPES, groups_per_row, rows_cols, to_shape


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
    first_row: int = 0,
) -> Tensor:
    words, p0 = counter_words(key, tensor, query, purpose), round(65536 * p_zero)
    rows, cols = rows_cols(shape)
    per_row = groups_per_row(cols, noise)
    first, groups, lanes = first_row * per_row, rows * per_row, PER_CALL[noise]
    if noise in KINDS:
        z = torch.empty(groups * lanes, dtype=torch.float32, device="cpu")
        fill_float(z.numpy(), KINDS[noise], first, groups, *words)
    else:
        z = torch.empty(groups * lanes, dtype=torch.int64, device="cpu")
        kind = BITS if noise == "bits" else SPARSE
        fill_int(z.numpy(), kind, first, groups, p0, r_max, *words)
    z = z.view(rows, per_row * lanes)[:, :cols]
    return to_shape(z.to(SAMPLE_DTYPES[noise]), shape).contiguous()
