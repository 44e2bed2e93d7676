"""Torch's own calls for layers whose weights were staged: all halves of a batch in one call.

A stacked input is `[n * B, ...]`, half after half; `W` and `b` come as `[n, ...]`. A call
takes the module (for its settings), the input, the staged parameters by name and n.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from elasticzo.forward.passes import Layer, Pass

Staged = dict[str, Tensor | None]


def halves_of(x: Tensor, n: int) -> Tensor:
    """`[n * B, ...]` seen as `[n, B, ...]`."""
    return x.reshape(n, x.shape[0] // n, *x.shape[1:])


def by_half(x: Tensor, n: int, run: Callable[[Tensor, int], Tensor]) -> Tensor:
    """`run(x of half h, h)` for each half, stacked again."""
    if n == 1:
        return run(x, 0)
    return torch.cat([run(part, h) for h, part in enumerate(x.chunk(n))])


def pick(t: Tensor | None, h: int) -> Tensor | None:
    return None if t is None else t[h]


def linear(m: nn.Linear, x: Tensor, staged: Staged, n: int) -> Tensor:
    w, b = staged["weight"], staged["bias"]
    assert w is not None
    if n == 1:
        return F.linear(x, w[0], pick(b, 0))
    rows = halves_of(x, n).flatten(1, -2)  # [n, rows, K]
    w_t = w.transpose(1, 2)
    y = torch.bmm(rows, w_t) if b is None else torch.baddbmm(b.unsqueeze(1), rows, w_t)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def conv(m: Any, x: Tensor, staged: Staged, n: int) -> Tensor:
    w, b = staged["weight"], staged["bias"]
    assert w is not None
    y: Tensor = by_half(x, n, lambda part, h: m._conv_forward(part, w[h], pick(b, h)))
    return y


def shares_input(m: nn.Module) -> bool:
    """Whether all halves of a shared input can come from one call of `m`."""
    return isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and m.groups == 1


def conv_of_shared(m: Any, x: Tensor, staged: Staged, n: int) -> Tensor:
    """All halves of a convolution of one input `[B, ...]`: their filters as output channels."""
    w, b = staged["weight"], staged["bias"]
    assert w is not None
    y = m._conv_forward(x, w.flatten(0, 1), None if b is None else b.flatten())
    by_half_first: Tensor = rearrange(y, "b (n c) ... -> (n b) c ...", n=n)
    return by_half_first


def embedding(m: nn.Embedding, x: Tensor, staged: Staged, n: int) -> Tensor:
    w = staged["weight"]
    assert w is not None
    # One table of all halves, each looking into its own part.
    offset = torch.arange(n, device=x.device).mul_(w.shape[1])
    rows = (halves_of(x, n) + offset.view(n, *([1] * x.dim()))).flatten(0, 1)
    return F.embedding(rows, w.flatten(0, 1))


def stage_all(current: Pass, layer: Layer, dtype: torch.dtype | None = None) -> Staged:
    """The parameters of a layer at the points that run now, by local name."""
    m = layer.module
    staged: Staged = {"weight": None, "bias": None}
    for local, p in m._parameters.items():
        if p is None:
            continue
        if (id(m), local) in current.swapped:
            staged[local] = p.unsqueeze(0)
        elif local in layer.head:
            staged[local] = current.stage(p, layer.head[local], dtype)
        else:
            staged[local] = p.expand(current.count, *p.shape)
    return staged
