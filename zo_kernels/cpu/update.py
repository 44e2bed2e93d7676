"""CPU twin of `zo_kernels.update_`: one compiled call for all small fp32 weights, else sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_kernels.cpu.kernels import update_all, update_sweep
from zo_kernels.cpu.noise import sample
from zo_kernels.cpu.rules import CODES, rule_all, rule_sweep
from zo_kernels.cpu.sweeps import PARALLEL_FROM, counter_words, memory_of, over_threads, walk_of
from zo_kernels.layout import layout_of
from zo_kernels.reference.update import update_one_
from zo_kernels.rules import write_back


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
    rule: str = "sgd",
    state: Sequence[Tensor] = (),
    settings: Tensor | None = None,
) -> None:
    named = (tensors, groups, scales, noise, 0, rule, state, settings)
    update_rows_(params, key, coeff, lr, weight_decay, skip, *named)


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
    rule: str,
    state: Sequence[Tensor],
    settings: Tensor | None,
) -> None:
    """The update of weights, or of a slice of rows of each from `first_row` on."""
    if skip.item() != 0:
        return
    draw = partial(sample, first_row=first_row)
    f32 = np.float32
    coeff32 = coeff.to(torch.float32).numpy()
    rates, decays = (t.to(torch.float32).numpy() for t in (lr, weight_decay))
    words = counter_words(key, 0, 0)[1:]
    small: list[int] = []
    numbers: Any = None
    if rule != "sgd":
        numbers = np.zeros((len(params), 1)) if settings is None else settings.numpy()
    for i, (w, tensor, group) in enumerate(zip(params, tensors, groups, strict=True)):
        own = state[i :: len(params)] if state else ()
        if w.dtype != torch.float32:
            rates_of = (lr[group], weight_decay[group], skip, tensor, scales[i], noise)
            by = (rule, own, None if settings is None else settings[i])
            update_one_(w, key, coeff, *rates_of, *by, draw)
            continue
        walk = walk_of(w.shape, w.stride(), noise)
        if own and any(layout_of(s) != layout_of(w) for s in own):
            walk = None
        if walk is not None and not first_row and walk.groups * walk.lanes < PARALLEL_FROM:
            small.append(i)
            continue
        targets = [w, *own]
        if walk is None:
            targets = [t.contiguous() for t in targets]
            walk = walk_of(targets[0].shape, targets[0].stride(), noise)
            assert walk is not None
        named = (walk.kind, walk.lanes, tensor, *words)
        where = (*walk.layout, first_row)
        args = (coeff32, f32(scales[i]), rates[group], decays[group], where, named)
        memory = [memory_of(t, walk.extent) for t in targets]
        if rule == "sgd":
            over_threads(update_sweep, (*memory, *args), walk, first_row)
        else:
            ruled = (CODES[rule], *_three(memory), numbers[i], *args)
            over_threads(rule_sweep, ruled, walk, first_row)
        write_back([w, *own], targets)
    if small:
        members = [[params[i], *state[i :: len(params)]] for i in small]
        who = tuple((tensors[i], groups[i], scales[i]) for i in small)
        given = (coeff32, rates, decays, words)
        _update_small(members, who, small, noise, rule, numbers, given)


def _update_small(
    members: list[list[Tensor]],
    who: tuple[tuple[int, int, float], ...],
    rows: list[int],
    noise: str,
    rule: str,
    numbers: Any,
    given: tuple[Any, ...],
) -> None:
    """One compiled call for all small weights; each with its state, and its row of numbers."""
    places = tuple((w.data_ptr(), w.shape, w.stride()) for w, *_ in members)
    table, factors = small_table(places, who, noise)
    if rule == "sgd":
        update_all(table, factors, *given)
        return
    owners = zip(rows, map(_three, members), strict=True)
    kept = np.array([(i, b.data_ptr(), c.data_ptr()) for i, (_, b, c) in owners])
    rule_all(CODES[rule], table, kept, numbers, factors, *given)


def _three(found: list[Any]) -> list[Any]:
    """A weight and two of state; where there is less, what is not read stands in."""
    return (found + 2 * found[-1:])[:3]


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
