"""CPU twins of `zo_kernels.int8_perturbed_weights` and `int8_update_`: sweeps over flat memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_kernels.cpu.int8_kernels import perturb_int8, update_int8
from zo_kernels.int8 import ROUNDINGS, sparse_constants, update_shift
from zo_kernels.layout import PURPOSES, Layout, empty_halves, groups_per_row, layout_of

MASK = 0xFFFFFFFF


def memory_of(t: Tensor, extent: int | None = None) -> Any:
    """Memory from the first element on as a flat numpy array."""
    return t.as_strided((t.numel() if extent is None else extent,), (1,)).numpy()


def counters(key: Tensor, tensor: int, query: int) -> tuple[np.uint64, ...]:
    """Counter words c1, c2, c3 and the two halves of the key; one type for all values."""
    seed, step = key.tolist()
    third = query + (PURPOSES["noise"] << 24)
    words = (tensor, step & MASK, third, seed & MASK, (seed >> 32) & MASK)
    return tuple(np.uint64(word) for word in words)


def settings_of(p_zero: float, r_max: int) -> tuple[int, int, int, int]:
    p0, magic, shift = sparse_constants(p_zero, r_max)
    return p0, magic & MASK, shift, r_max


def walk_of(layout: Layout) -> tuple[int, int, int, int, int]:
    return layout.cols, layout.inner, layout.s_row, layout.s_outer, layout.s_inner


def int8_perturbed_weights(
    w: Tensor,
    key: Tensor,
    *,
    tensor: int,
    start: int = 0,
    stop: int = 2,
    p_zero: float = 0.0,
    r_max: int = 1,
) -> Tensor:
    out = empty_halves(w, stop - start, torch.int8)
    source, target = layout_of(w), layout_of(out[0])
    if w.numel() == 0:
        return out
    halves = out
    if source is None or target is None:
        w = w.contiguous()
        halves = torch.empty(out.shape, dtype=torch.int8, device="cpu")
        source = target = layout_of(w)
        assert source is not None and target is not None
    groups = source.rows * groups_per_row(source.cols, "sparse_int8")
    walks = (walk_of(source), walk_of(target), groups, settings_of(p_zero, r_max))
    memory = memory_of(w, source.extent)
    for query in range(start // 2, (stop + 1) // 2):
        plus, minus = 2 * query >= start, 2 * query + 1 < stop
        first = halves[2 * query - start] if plus else halves[2 * query + 1 - start]
        second = halves[2 * query + 1 - start] if minus else first
        to = (memory_of(first, target.extent), memory_of(second, target.extent), plus, minus)
        perturb_int8(memory, *to, *walks, counters(key, tensor, query))
    return out if halves is out else out.copy_(halves)


@torch.no_grad()
def int8_update_(
    params: Sequence[Tensor],
    key: Tensor,
    g: Tensor,
    *,
    tensors: Sequence[int],
    p_zero: float = 0.0,
    r_max: int = 1,
    b_zo: int = 1,
    rounding: str = "nearest",
) -> None:
    s = update_shift(g.numel(), r_max, b_zo)
    signs, settings = g.detach().numpy(), settings_of(p_zero, r_max)
    for w, tensor in zip(params, tensors, strict=True):
        if w.numel() == 0:
            continue
        target = w if layout_of(w) is not None else w.contiguous()
        layout = layout_of(target)
        assert layout is not None
        groups = layout.rows * groups_per_row(layout.cols, "sparse_int8")
        rest = (s, ROUNDINGS[rounding], walk_of(layout), groups, settings)
        update_int8(memory_of(target, layout.extent), signs, *rest, counters(key, tensor, 0))
        if target is not w:
            w.copy_(target)
