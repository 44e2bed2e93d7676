"""CPU twin of `zo_kernels.int8_paired_linear`: samples are images of one row."""

from __future__ import annotations

import torch
from torch import Tensor

from zo_kernels.cpu.int8_products import After, Images, Noise, multiply
from zo_kernels.geometry import Geometry

SAMPLES = 64  # in an "image": they stay in cache
ONE = Geometry((1, 1), (0, 0), (1, 1))


def int8_paired_linear(
    x: Tensor,
    w: Tensor,
    key: Tensor | None,
    *,
    tensor: int | None = None,
    start: int = 0,
    stop: int = 2,
    shared: bool = False,
    p_zero: float = 0.0,
    r_max: int = 1,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    count, (features, depth) = stop - start, w.shape
    rows = x.shape[0] if shared else x.shape[0] // count
    out = torch.empty((count * rows, features), dtype=torch.int32, device="cpu")
    if out.numel() == 0 or depth == 0:
        return out.zero_(), torch.zeros(count, dtype=torch.int32, device="cpu")
    noise = Noise(key, tensor or 0, start, stop, p_zero, r_max)
    wide = min(rows, SAMPLES)
    images = -(-rows // wide)
    s_row, s_col = x.stride()
    strides = (0 if shared else rows * s_row, wide * s_row, s_col, 0, s_row)
    source = Images(images, (depth, 1, wide), strides, rows)
    to = (rows * features, wide * features, 1, 0, features)
    target = Images(images, (features, 1, wide), to, rows)
    return out, multiply((x, source), (out, target), w, noise, (1, 1), ONE, shared, After(relu))
