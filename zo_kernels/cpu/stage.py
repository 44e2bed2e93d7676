"""CPU twin of `zo_kernels.stage_`: one compiled call for all small fp32 weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from zo_kernels.cpu.kernels import stage_all
from zo_kernels.cpu.noise import sample
from zo_kernels.cpu.sweeps import PARALLEL_FROM, counter_words, walk_of
from zo_kernels.cpu.update import small_table, update_rows_
from zo_kernels.cpu.weights import sweep_halves
from zo_kernels.reference.stage import stage_one


@torch.no_grad()
def stage_(
    outs: Sequence[Tensor],
    params: Sequence[Tensor],
    key: Tensor,
    eps: Tensor,
    *,
    tensors: Sequence[int],
    scales: Sequence[float],
    start: int = 0,
    stop: int = 2,
    first_row: int = 0,
    noise: str = "normal",
    before: Tensor | None = None,
    coeff: Tensor | None = None,
    lr: Tensor | None = None,
    weight_decay: Tensor | None = None,
    skip: Tensor | None = None,
    groups: Sequence[int] = (),
    rule: str = "sgd",
    state: Sequence[Tensor] = (),
    settings: Tensor | None = None,
) -> None:
    if before is not None:
        assert coeff is not None and lr is not None
        assert weight_decay is not None and skip is not None
        update = (before, coeff, lr, weight_decay, skip, tensors, groups, scales, noise, first_row)
        update_rows_(params, *update, rule, state, settings)
    draw = partial(sample, first_row=first_row)
    small: dict[int, list[int]] = {}  # by the memory of their halves
    for i, (out, w) in enumerate(zip(outs, params, strict=True)):
        span = (tensors[i], start, stop, scales[i], first_row)
        walk = walk_of(w.shape, w.stride(), noise)
        if w.dtype != torch.float32 or out.dtype != torch.float32:
            stage_one(out, w, key, eps, tensors[i], scales[i], start, noise, draw)
        elif w.numel() == 0:
            continue
        elif walk is None or not _as_weight(out, w):
            # The same sweep over contiguous copies: the memory format does not show in the bits.
            halves = torch.empty(out.shape, dtype=w.dtype, device="cpu")
            walk = walk_of(w.shape, halves[0].stride(), noise)
            assert walk is not None
            sweep_halves(halves, w.contiguous(), walk, key, eps, *span)
            out.copy_(halves)
        elif not first_row and walk.groups * walk.lanes < PARALLEL_FROM:
            small.setdefault(out.untyped_storage().data_ptr(), []).append(i)
        else:
            sweep_halves(out, w, walk, key, eps, *span)
    for members in small.values():
        to, of = [outs[i] for i in members], [params[i] for i in members]
        named = [(tensors[i], scales[i]) for i in members]
        _stage_small(to, of, key, eps, named, start, stop, noise)


def _as_weight(out: Tensor, w: Tensor) -> bool:
    """Whether each half lies as the weight does, without gaps, one behind the other."""
    dense = w.is_contiguous() or torch.empty_like(w, device="meta").stride() == w.stride()
    return dense and out.stride() == (w.numel(), *w.stride())


def _stage_small(
    outs: list[Tensor],
    params: list[Tensor],
    key: Tensor,
    eps: Tensor,
    named: list[tuple[int, float]],
    start: int,
    stop: int,
    noise: str,
) -> None:
    base = min(out.data_ptr() for out in outs)
    end = max(out.data_ptr() + out.numel() * 4 for out in outs)
    memory = next(out for out in outs if out.data_ptr() == base)
    flat = memory.as_strided(((end - base) // 4,), (1,)).numpy()
    where = tuple((w.data_ptr(), w.shape, w.stride()) for w in params)
    offsets = [(out.data_ptr() - base) // 4 for out in outs]
    who = tuple((t, at, s) for (t, s), at in zip(named, offsets, strict=True))
    words = counter_words(key, 0, 0)[1:]
    table, scales = small_table(where, who, noise)
    stage_all(table, scales, flat, np.float32(eps.item()), start, stop, words)
