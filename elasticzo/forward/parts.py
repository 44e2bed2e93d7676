"""What the layers read for one half: as its part of the stacked batch it is what it is alone.

A tensor without the batch (positions, latents, a table), or with it elsewhere than in dimension 0,
is cut in the wrong place, whatever its length. The half alone gives it another shape, or, where
rows only stand in another order, other rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from elasticzo.buffers import has_values

Call = tuple[str, int]  # a layer, and which of its calls


@dataclass(frozen=True)
class Print:
    """Of a tensor: what it is, and a number a row where it has values."""

    shape: torch.Size
    dtype: torch.dtype
    rows: Tensor | None

    def same(self, other: Print) -> bool:
        """Whether both are of one tensor but for rounding, far below what other rows differ by."""
        if (self.shape, self.dtype) != (other.shape, other.dtype):
            return False
        if self.rows is None or other.rows is None or not has_values(self.rows):
            return True
        a, b = self.rows, other.rows
        both = a.isfinite() & b.isfinite()
        a, b = a[both], b[both]
        finest = torch.finfo(self.dtype).eps if self.dtype.is_floating_point else 0.0
        spread = (a - a.mean()).norm() if len(a) else a.new_zeros(())
        return bool((a - b).norm() <= 0.1 * spread + finest**0.5 * a.norm())


@torch.no_grad()
def print_of(t: Tensor) -> Print:
    """The print of a tensor whose rows are dimension 0."""
    rows = None
    if t.layout == torch.strided and not t.is_quantized:
        flat = (torch.view_as_real(t) if t.is_complex() else t).unsqueeze(-1).flatten(1)
        wide = torch.promote_types(flat.dtype, torch.float32)
        weights = torch.arange(1, flat.shape[1] + 1, device=t.device, dtype=wide).mul_(1.7).cos_()
        with torch.autocast(t.device.type, enabled=False):
            rows = (flat.to(wide) @ weights).double()
    return Print(t.shape, t.dtype, rows)


class Parts:
    """What the first half gives each layer to read, in the order of calls, and the outputs."""

    def __init__(self) -> None:
        self.seen: dict[Call, list[Print]] = {}

    def note(self, name: str, tree: Any, halves: int = 1) -> None:
        """Tensors of the first half, or those of so many, stacked."""
        call = 0
        while (name, call) in self.seen:
            call += 1
        tensors = [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.dim()]
        self.seen[name, call] = [print_of(t[: len(t) // halves]) for t in tensors]

    def differ(self, other: Parts) -> Iterator[str]:
        """Names of layers that read something else in another pass, the outermost of each first."""
        for at, prints in self.seen.items():
            found = other.seen.get(at, [])
            if len(found) != len(prints) or not all(map(Print.same, prints, found)):
                yield at[0]

    def without_rows(self, other: Parts, rows: int, size: int) -> Iterator[str]:
        """Names of layers whose first tensor has not `rows` rows, or not `size` in another pass,
        as the batches of both have."""
        for at, prints in self.seen.items():
            found = other.seen.get(at, [])
            if not prints or not found:
                continue
            one, more = prints[0], found[0]
            same = more.shape[:1] == (size,) and more.shape[1:] == one.shape[1:]
            if one.shape[0] != rows or not same:
                yield at[0]

    def stay(self, moved: Parts, rows: int) -> Iterator[str]:
        """Names of layers whose first tensor is the same where the samples took other places."""
        for at, prints in self.seen.items():
            found = moved.seen.get(at, [])
            if prints and found and (prints[0].same(found[0]) or prints[0].shape[0] != rows):
                yield at[0]
