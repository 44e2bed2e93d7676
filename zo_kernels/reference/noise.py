"""The noise definition in plain torch: Philox4x32-10 and the maps from its words to noise.

`z` is a pure function of (seed, step, query, tensor, row, column). Key = seed; counter words:
c0 = element group, c1 = tensor index, c2 = step, c3 = query + 2^24 * purpose.
Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from zo_kernels.layout import PURPOSES, SAMPLE_DTYPES, groups_per_row, rows_cols, to_shape

MASK = 0xFFFFFFFF
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
WEYL_A, WEYL_B = 0x9E3779B9, 0xBB67AE85


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product, in int64 without overflow."""
    low = a * (b & 0xFFFF)  # < 2^48
    high = a * (b >> 16)  # < 2^48
    total = (high & 0xFFFF) * 65536 + low  # < 2^49
    return (high >> 16) + (total >> 32), total & MASK


def philox(
    seed: int, c0: Tensor, c1: int, c2: int, c3: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words (int64 tensors in [0, 2^32)) for each counter.

    Args:
        seed: the key, in [0, 2^64).
        c0: int64 tensor of first counter words; c1, c2, c3: the others, in [0, 2^32).
    """
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    x0, x1, x2, x3 = c0, torch.full_like(c0, c1), torch.full_like(c0, c2), torch.full_like(c0, c3)
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(ROUND_A, x0)
        hi1, lo1 = _mul_hi_lo(ROUND_B, x2)
        x0, x1, x2, x3 = hi1 ^ x1 ^ k0, lo1, hi0 ^ x3 ^ k1, lo0
        k0, k1 = (k0 + WEYL_A) & MASK, (k1 + WEYL_B) & MASK
    return x0, x1, x2, x3


def uniforms(words: Tensor) -> Tensor:
    """`((u >> 9) + 0.5) * 2^-23`: exact in fp32, never 0 or 1; float64 here."""
    return ((words >> 9).double() + 0.5) * 2.0**-23


def normals(w0: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    """Box-Muller in float64: words `[n]` each -> normals `[n, 4]`, lanes 0..3 of each group."""
    lanes = []
    for a, b in ((w0, w1), (w2, w3)):
        r = torch.sqrt(-2.0 * torch.log(uniforms(a)))
        angle = 2.0 * math.pi * uniforms(b)
        lanes += [r * torch.cos(angle), r * torch.sin(angle)]
    return torch.stack(lanes, -1)


def sparse_int8(half_words: Tensor, p_zero: float, r_max: int) -> Tensor:
    """16-bit words -> integers in [-r_max, r_max], zero with probability p_zero (plus 1/(2r+1) of
    the rest): `h < p0` gives 0, else `((h - p0) * (2 r_max + 1)) // (65536 - p0) - r_max`."""
    p0 = round(65536 * p_zero)
    value = torch.div(
        (half_words - p0) * (2 * r_max + 1), max(65536 - p0, 1), rounding_mode="floor"
    )
    return torch.where(half_words < p0, 0, value - r_max)


def noise_rows(
    kind: str,
    rows: int,
    cols: int,
    *,
    seed: int,
    step: int,
    tensor: int,
    query: int,
    purpose: str = "noise",
    p_zero: float = 0.0,
    r_max: int = 1,
    first_row: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Noise `[rows, cols]` in noise coordinates, from row `first_row` of the tensor on.

    Returns: float64 for "normal" (unrounded), int64 for the others: +-1 for "rademacher",
    `[-r_max, r_max]` for "sparse_int8", words in `[0, 2^32)` for "bits".
    """
    per_row = groups_per_row(cols, kind)
    group = first_row * per_row + torch.arange(rows * per_row, dtype=torch.int64, device=device)
    words = philox(seed, group, tensor, step & MASK, query + (PURPOSES[purpose] << 24))
    if kind == "normal":
        z = normals(*words)
    else:
        z = torch.stack(words, -1)
        if kind == "rademacher":
            bits = torch.arange(32, device=device)
            z = 2 * ((z[..., None] >> bits) & 1) - 1
        elif kind == "sparse_int8":
            z = sparse_int8(torch.stack([z & 0xFFFF, z >> 16], -1), p_zero, r_max)
    if rows * cols == 0:
        return z.new_empty(rows, cols)
    return rearrange(z, "(rows group) ... -> rows (group ...)", rows=rows)[:, :cols]


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
        first_row=first_row,
        device=key.device,
    )
    return to_shape(z.to(SAMPLE_DTYPES[noise]), shape).contiguous()
