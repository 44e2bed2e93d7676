"""Where an element of a tensor stands in the noise: its row and column, for any strides.

0-d and 1-d tensors are one row; else rows = shape[0] and the columns run with dimension 1
innermost, `w.permute(0, 2, ..., 1).reshape(rows, -1)`, whatever the memory format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

Shape = Sequence[int]
# Elements of one row that share a Philox call, by kind of noise.
PER_CALL = {"normal": 4, "bits": 4, "rademacher": 128, "sparse_int8": 8}
# Separate streams. The factors of a direction of low rank are left and right, and those of a
# sample's direction; nodes are a layer's outputs.
PURPOSES = {
    "noise": 0,
    "rounding": 1,
    "dropout": 2,
    "data": 3,
    "left": 4,
    "right": 5,
    "sample_left": 6,
    "sample_right": 7,
    "node": 8,
}
SAMPLE_DTYPES = {
    "normal": torch.float32,
    "rademacher": torch.float32,
    "sparse_int8": torch.int8,
    "bits": torch.int64,
}


def rows_cols(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor in noise coordinates."""
    if len(shape) < 2:
        return 1, int(shape[0]) if len(shape) else 1
    cols = 1
    for n in shape[1:]:
        cols *= int(n)
    return int(shape[0]), cols


def groups_per_row(cols: int, kind: str) -> int:
    return -(-cols // PER_CALL[kind])


def check_groups(shape: Sequence[int], kind: str, first_row: int = 0) -> None:
    rows, cols = rows_cols(shape)
    groups = (first_row + rows) * groups_per_row(cols, kind)
    if groups > 1 << 32:
        raise ValueError(
            f"a tensor may have at most 2^32 groups of noise, got {groups} for shape {list(shape)}"
        )


def to_shape(z: Tensor, shape: Sequence[int]) -> Tensor:
    """A `[rows, cols]` tensor in noise coordinates, seen in the shape of its weight (a view)."""
    if len(shape) < 3:
        return z.reshape(tuple(shape))
    return z.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def empty_halves(w: Tensor, count: int, dtype: torch.dtype | None) -> Tensor:
    """`[count, *w.shape]`, each half in the memory format of `w`."""
    like = torch.empty_like(w, dtype=dtype or w.dtype)
    if count == 1:
        return like.unsqueeze(0)
    return like.new_empty_strided((count, *w.shape), (w.numel(), *like.stride()))


def channels_last(x: Tensor) -> bool:
    return x.movedim(1, -1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """`x` where it is contiguous or has its channels last; others are copied."""
    return x if channels_last(x) else x.contiguous()


@dataclass(frozen=True)
class Layout:
    """Where element (row, col) lies: at `row * s_row + (col // inner) * s_outer + (col % inner) *
    s_inner`.

    `inner` is the extent of dimension 1 (input channels); the dimensions behind it act as one.
    Dimensions of extent 1 take no part, whatever their strides: `s_inner` is 1, the others are 0.
    """

    rows: int
    cols: int
    inner: int
    s_row: int
    s_outer: int
    s_inner: int

    @property
    def flat(self) -> bool:
        """Whether memory order is noise order without gaps."""
        return (
            self.s_inner == 1
            and (self.inner == self.cols or self.s_outer == self.inner)
            and (self.rows == 1 or self.s_row == self.cols)
        )

    @property
    def extent(self) -> int:
        """Elements from the first to the last one touched."""
        if self.rows * self.cols == 0:
            return 0
        outer = self.cols // self.inner
        return (
            (self.rows - 1) * self.s_row
            + (outer - 1) * self.s_outer
            + (self.inner - 1) * self.s_inner
            + 1
        )


def layout_of(w: Tensor) -> Layout | None:
    """The layout of `w`, or None where its dimensions 2, 3, ... do not act as one."""
    return _layout(tuple(w.shape), w.stride())


@lru_cache(maxsize=4096)
def _layout(shape: tuple[int, ...], strides: tuple[int, ...]) -> Layout | None:
    rows, cols = rows_cols(shape)
    if len(shape) == 0:
        return Layout(1, 1, 1, 1, 1, 1)
    if len(shape) == 1:
        return Layout(1, cols, max(cols, 1), 0, 0, strides[0] if cols > 1 else 1)
    inner = int(shape[1])
    s_outer = 0
    tail = [(int(n), s) for n, s in zip(shape[2:], strides[2:], strict=True) if n != 1]
    if tail:
        s_outer = tail[-1][1]
        for (_, s), (n_next, s_next) in pairwise(tail):
            if s != n_next * s_next:
                return None
    s_row = strides[0] if rows > 1 else 0
    return Layout(rows, cols, max(inner, 1), s_row, s_outer, strides[1] if inner > 1 else 1)
