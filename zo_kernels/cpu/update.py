"""CPU twin of `zo_kernels.update_`: one compiled call for all small fp32 weights, else sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_kernels.cpu.kernels import update_all, update_sweep
from zo_kernels.cpu.noise import sample_rows
from zo_kernels.cpu.sweeps import PARALLEL_FROM, counter_words, memory_of, over_threads, walk_of
from zo_kernels.reference.update import updated


@torch.no_grad()
def update_(
    params: Sequence[Tensor],
    key: Tensor,
    coeff: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    skip: Tensor,
    *,
    tensors: Sequence[int],
    groups: Sequence[int],
    scales: Sequence[float],
    noise: str = "normal",
) -> None:
    update_rows_(
        *(params, key, coeff, lr, weight_decay, skip),
        *(tensors, groups, scales, noise, 0),
    )


def update_rows_(
    params: Sequence[Tensor],
    key: Tensor,
    coeff: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    skip: Tensor,
    tensors: Sequence[int],
    groups: Sequence[int],
    scales: Sequence[float],
    noise: str,
    first_row: int,
) -> None:
    """The update of weights, or of a slice of rows of each from `first_row` on."""
    if skip.item() != 0:
        return
    draw = partial(sample_rows, first_row=first_row)
    f32 = np.float32
    coeff32 = coeff.to(torch.float32).numpy()
    rates, decays = (t.to(torch.float32).numpy() for t in (lr, weight_decay))
    words = counter_words(key, 0, 0)[1:]
    small: list[int] = []
    for i, (w, tensor, group) in enumerate(zip(params, tensors, groups, strict=True)):
        if w.dtype != torch.float32:
            rate, decay = lr[group], weight_decay[group]
            w.copy_(updated(w, key, coeff, rate, decay, tensor, scales[i], noise, draw))
            continue
        walk = walk_of(w.shape, w.stride(), noise)
        if walk is not None and not first_row and walk.groups * walk.lanes < PARALLEL_FROM:
            small.append(i)
            continue
        target = w
        if walk is None:
            target = w.contiguous()
            walk = walk_of(target.shape, target.stride(), noise)
            assert walk is not None
        named = (walk.kind, walk.lanes, tensor, *words)
        where = (*walk.layout, first_row)
        settings = (f32(scales[i]), rates[group], decays[group], where, named)
        args = (memory_of(target, walk.extent), coeff32, *settings)
        over_threads(update_sweep, args, walk, first_row)
        if target is not w:
            w.copy_(target)
    if small:
        places = tuple((params[i].data_ptr(), params[i].shape, params[i].stride()) for i in small)
        who = tuple((tensors[i], groups[i], scales[i]) for i in small)
        update_all(*small_table(places, who, noise), coeff32, rates, decays, words)


@lru_cache(maxsize=16)
def small_table(
    where: tuple[tuple[int, torch.Size, tuple[int, ...]], ...],
    who: tuple[tuple[int, int, float], ...],
    noise: str,
) -> tuple[Any, Any]:
    """The table of `update_all` and `stage_all` for weights at these addresses; their scales."""
    rows = []
    for (address, shape, strides), (tensor, group, _) in zip(where, who, strict=True):
        walk = walk_of(shape, strides, noise)
        assert walk is not None
        counts = (walk.kind, walk.lanes, walk.groups, tensor, group)
        rows.append((address, walk.extent, *walk.layout, *counts))
    return np.array(rows, np.int64), np.array([scale for *_, scale in who], np.float32)


__all__ = ["small_table", "update_", "update_rows_"]
