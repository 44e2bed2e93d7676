"""Weights that share memory, with another or among their own elements: an update of one would move
the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from elasticzo.buffers import address, has_values


def check_apart(model: nn.Module, head: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError where a weight of the head lies over another parameter, or a buffer."""
    mine = {id(t): name for name, t in head}
    every = [*model.named_parameters(), *model.named_buffers()]
    found = sorted((_span(t), place) for place, (_, t) in enumerate(every) if _lies(t))
    reach: list[tuple[tuple[int, int], int]] = []  # those before that end behind this one's start
    for span, place in found:
        reach = [one for one in reach if one[0][1] > span[0]]
        for _, other in reach:
            (a, t), (b, u) = every[place], every[other]
            if (id(t) in mine or id(u) in mine) and _meet(t, u):
                raise ValueError(
                    f"weights of the head must have memory of their own: {b!r} and {a!r} lie over "
                    "each other, and an update of one would move both; clone one of them"
                )
        reach.append((span, place))


def refuse_overlap(name: str, p: Tensor) -> None:
    """Raise for a weight whose elements share memory: each update of one would move the others."""
    reach = 0  # the last element of the dimensions before, smaller strides first
    for stride, size in sorted(zip(p.stride(), p.shape, strict=True)):
        if size > 1 and p.numel() and stride <= reach:
            raise ValueError(
                f"elements of head parameter {name!r} share memory (strides {list(p.stride())} of "
                f"shape {list(p.shape)}): make it a tensor of its own, nn.Parameter(p.clone())"
            )
        reach += stride * (size - 1)


def _lies(t: Tensor) -> bool:
    return t.layout == torch.strided and has_values(t) and t.numel() > 0


def _span(t: Tensor) -> tuple[int, int]:
    """First byte and the one behind the last."""
    last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return address(t), address(t) + (last + 1) * t.element_size()


def _meet(t: Tensor, u: Tensor) -> bool:
    """Whether two tensors whose spans meet have a byte in common: rows may alternate."""
    common = set(_bytes(t)) & set(_bytes(u)) if t.numel() + u.numel() < 1 << 20 else {0}
    return bool(common)


def _bytes(t: Tensor) -> Iterator[int]:
    places = torch.zeros((), dtype=torch.int64, device="cpu")
    for n, step in zip(t.shape, t.stride(), strict=True):
        places = places.unsqueeze(-1) + torch.arange(n, device="cpu") * step
    size = t.element_size()
    for first in (places.flatten() * size + address(t)).tolist():
        yield from range(first, first + size)
