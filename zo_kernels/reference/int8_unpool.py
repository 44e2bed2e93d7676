"""Reference of `zo_kernels.int8_unpool`: each window is one row of four."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def int8_unpool(error: Tensor, places: Tensor, size: Sequence[int]) -> Tensor:
    rows = error.new_zeros((*error.shape, 4))
    rows.scatter_(4, places.to(torch.int64).unsqueeze(4), error.unsqueeze(4))
    out = rearrange(rows, "b c h w (i j) -> b c (h i) (w j)", i=2)
    return F.pad(out, (0, size[1] - out.shape[3], 0, size[0] - out.shape[2])).contiguous()


__all__ = ["int8_unpool"]
