"""The noise in numpy, written from its definition alone: what every implementation is held to.

Key = seed; counter words c0 = element group, c1 = tensor, c2 = step, c3 = query + 2^24 * purpose.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

PER_GROUP = {"normal": 4, "bits": 4, "rademacher": 128, "sparse_int8": 8}
PURPOSE = {"noise": 0, "rounding": 1, "dropout": 2, "data": 3, "sample_left": 6, "node": 8}
LOW = np.uint64(0xFFFFFFFF)
U32 = np.uint64(32)


def philox(seed: int, c0: np.ndarray, c1: int, c2: int, c3: int) -> list[np.ndarray]:
    """Philox4x32-10 (Salmon et al. 2011) in 64-bit products: four words a counter."""
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    x = [c0.astype(np.uint64), *(np.full(c0.shape, c, np.uint64) for c in (c1, c2, c3))]
    for _ in range(10):
        p, q = np.uint64(0xD2511F53) * x[0], np.uint64(0xCD9E8D57) * x[2]
        x = [(q >> U32) ^ x[1] ^ np.uint64(k0), q & LOW, (p >> U32) ^ x[3] ^ np.uint64(k1), p & LOW]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return x


def uniform(words: np.ndarray) -> np.ndarray:
    return ((words >> np.uint64(9)).astype(np.float64) + 0.5) * 2.0**-23


def _normals(words: list[np.ndarray]) -> np.ndarray:
    lanes = []
    for a, b in ((words[0], words[1]), (words[2], words[3])):
        r = np.sqrt(-2.0 * np.log(uniform(a)))
        lanes += [r * np.cos(2 * math.pi * uniform(b)), r * np.sin(2 * math.pi * uniform(b))]
    return np.stack(lanes, -1)


def sparse_value(h: int, p_zero: float, r_max: int) -> int:
    """One 16-bit number -> [-r_max, r_max], in Python's integers."""
    p0 = round(65536 * p_zero)
    return 0 if h < p0 else ((h - p0) * (2 * r_max + 1)) // (65536 - p0) - r_max


@cache
def _sparse_table(p_zero: float, r_max: int) -> np.ndarray:
    return np.array([sparse_value(h, p_zero, r_max) for h in range(1 << 16)])


def _lanes(words: list[np.ndarray], kind: str, p_zero: float, r_max: int) -> np.ndarray:
    """`[groups, PER_GROUP[kind]]`."""
    if kind == "normal":
        return _normals(words)
    w = np.stack(words, -1)
    if kind == "rademacher":
        bits = (w[..., None] >> np.arange(32, dtype=np.uint64)) & np.uint64(1)
        return 2 * bits.astype(np.int64).reshape(len(w), 128) - 1
    if kind == "sparse_int8":
        halves = np.stack([w & np.uint64(0xFFFF), w >> np.uint64(16)], -1).reshape(len(w), 8)
        return _sparse_table(p_zero, r_max)[halves.astype(np.int64)]
    return w.astype(np.int64)


def model(
    shape: Sequence[int],
    seed: int,
    step: int,
    *,
    tensor: int,
    query: int = 0,
    noise: str = "normal",
    purpose: str = "noise",
    p_zero: float = 0.0,
    r_max: int = 1,
) -> Tensor:
    """Noise in the shape of a weight: float64 for normals, int64 for the rest."""
    rows = shape[0] if len(shape) > 1 else 1
    cols = math.prod(shape[1:] if len(shape) > 1 else shape)
    per = PER_GROUP[noise]
    per_row = -(-cols // per)
    groups = np.arange(rows * per_row, dtype=np.uint64)
    words = philox(seed, groups, tensor, step, query + (PURPOSE[purpose] << 24))
    z = _lanes(words, noise, p_zero, r_max).reshape((rows, per_row * per))[:, :cols]
    if len(shape) > 2:  # input channels are innermost
        z = np.moveaxis(z.reshape(rows, *shape[2:], shape[1]), -1, 1)
    return torch.from_numpy(z.reshape(tuple(shape)).copy())


__all__ = ["PER_GROUP", "PURPOSE", "model", "philox", "sparse_value", "uniform"]
