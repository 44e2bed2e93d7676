"""The ops on the CPU: fused sweeps for fp32 weights, fast noise and torch for the rest."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_kernels.cpu.kernels import (
    BITS,
    NORMAL,
    RADEMACHER,
    SPARSE,
    fill_float,
    fill_int,
    perturb_sweep,
    update_all,
    update_sweep,
)
from zo_kernels.layout import (
    PER_CALL,
    groups_per_row,
    layout_of,
    rows_cols,
    to_shape,
)
from zo_kernels.reference.noise import PURPOSES
from zo_kernels.reference.sample import DTYPES
from zo_kernels.reference.update import updated
from zo_kernels.reference.weights import compute_dtype, empty_halves, write_halves

KINDS = {"normal": NORMAL, "rademacher": RADEMACHER}
NOISES = {kind: noise for noise, kind in KINDS.items()}
MASK = 0xFFFFFFFF
PARALLEL_FROM = 1 << 19  # elements: below, a thread's hand-over costs more than it saves


@dataclass(frozen=True)
class _Walk:
    """What a sweep needs to know of a weight's layout; `layout` is (cols, inner, three strides)."""

    layout: tuple[int, int, int, int, int]
    extent: int
    kind: int
    lanes: int
    groups: int
    contiguous: bool
    dense: bool  # a half in the memory format of the weight lies as the weight does


@lru_cache(maxsize=4096)
def walk_of(shape: torch.Size, strides: tuple[int, ...], noise: str) -> _Walk | None:
    """How to sweep a weight of this layout; None where no sweep can walk it."""
    w = torch.empty_strided(shape, strides, device="meta")
    layout = layout_of(w)
    if layout is None:
        return None
    return _Walk(
        (layout.cols, layout.inner, layout.s_row, layout.s_outer, layout.s_inner),
        layout.extent,
        KINDS[noise],
        PER_CALL[noise],
        layout.rows * groups_per_row(layout.cols, noise),
        w.is_contiguous(),
        layout.extent == w.numel() and torch.empty_like(w).stride() == w.stride(),
    )


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="zo_kernels")


if hasattr(os, "register_at_fork"):
    # A forked child has the pool and none of its threads: it would wait for them for ever.
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _over_threads(
    sweep: Callable[..., None], args: tuple[Any, ...], walk: _Walk, first_row: int = 0
) -> None:
    """Run `sweep(*args, first, last)` over all groups, in parts where there is enough work."""
    groups = walk.groups
    first = first_row * groups_per_row(walk.layout[0], NOISES[walk.kind])
    workers = torch.get_num_threads() if groups * walk.lanes >= PARALLEL_FROM else 1
    if workers == 1:
        sweep(*args, first, first + groups)
        return
    bounds = [first + groups * i // workers for i in range(workers + 1)]
    for job in [_pool(workers).submit(sweep, *args, a, b) for a, b in pairwise(bounds)]:
        job.result()


def counter_words(key: Tensor, tensor: int, query: int, purpose: str = "noise") -> tuple[int, ...]:
    """Counter words c1, c2, c3 and the two halves of the key."""
    seed, step = key.tolist()
    third = query + (PURPOSES[purpose] << 24)
    return tensor, step & MASK, third, seed & MASK, (seed >> 32) & MASK


def _memory(t: Tensor, extent: int) -> Any:
    """The memory of a tensor as a flat numpy array."""
    return t.as_strided((extent,), (1,)).numpy()


def sample(
    shape: Sequence[int],
    key: Tensor,
    *,
    tensor: int,
    query: int = 0,
    noise: str = "normal",
    purpose: str = "noise",
    p_zero: float = 0.0,
    r_max: int = 1,
) -> Tensor:
    words = counter_words(key, tensor, query, purpose)
    return _sample(shape, noise, 0, words, round(65536 * p_zero), r_max)


def sample_rows(
    shape: Sequence[int],
    key: Tensor,
    *,
    tensor: int,
    query: int = 0,
    noise: str = "normal",
    purpose: str = "noise",
    first_row: int = 0,
) -> Tensor:
    """Noise of a slice of rows, `first_row` being the number of the first."""
    return _sample(shape, noise, first_row, counter_words(key, tensor, query, purpose))


def _sample(
    shape: Sequence[int],
    noise: str,
    first_row: int,
    words: tuple[int, ...],
    p0: int = 0,
    r_max: int = 1,
) -> Tensor:
    rows, cols = rows_cols(shape)
    per_row = groups_per_row(cols, noise)
    first, groups, lanes = first_row * per_row, rows * per_row, PER_CALL[noise]
    if noise in KINDS:
        z = torch.empty(groups * lanes, dtype=torch.float32)
        fill_float(z.numpy(), KINDS[noise], first, groups, *words)
    else:
        z = torch.empty(groups * lanes, dtype=torch.int64)
        kind = BITS if noise == "bits" else SPARSE
        fill_int(z.numpy(), kind, first, groups, p0, r_max, *words)
    z = z.view(rows, per_row * lanes)[:, :cols]
    return to_shape(z.to(DTYPES[noise]), shape)


def perturbed_weights(
    w: Tensor,
    key: Tensor,
    eps: Tensor,
    *,
    tensor: int,
    start: int = 0,
    stop: int = 2,
    noise: str = "normal",
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    count = stop - start
    if w.dtype != torch.float32 or dtype not in (None, torch.float32):
        return _from_noise(w, key, eps, tensor, start, stop, noise, scale, dtype)
    walk = walk_of(w.shape, w.stride(), noise)
    if walk is None or not (walk.contiguous or walk.dense):
        # The same sweep over contiguous copies: the memory format does not show in the bits.
        halves = torch.empty((count, *w.shape))
        walk = walk_of(halves.shape[1:], halves.stride()[1:], noise)
        assert walk is not None
        sweep_halves(halves, w.contiguous(), walk, key, eps, tensor, start, stop, scale)
        return empty_halves(w, count, dtype).copy_(halves)
    out = torch.empty((count, *w.shape)) if walk.contiguous else empty_halves(w, count, dtype)
    sweep_halves(out, w, walk, key, eps, tensor, start, stop, scale)
    return out


def sweep_halves(
    out: Tensor,
    w: Tensor,
    walk: _Walk,
    key: Tensor,
    eps: Tensor,
    tensor: int,
    start: int,
    stop: int,
    scale: float,
    first_row: int = 0,
) -> None:
    """The fused sweep of an fp32 weight; each half of `out` lies as the weight does."""
    size = w.numel()
    if walk.contiguous:
        source, target = w.numpy().reshape(-1), out.numpy().reshape(-1)
    else:
        source, target = _memory(w, size), _memory(out, size * out.shape[0])
    amplitude = np.float32(np.float32(eps.item()) * np.float32(scale))
    for query in range(start // 2, (stop + 1) // 2):
        plus, minus = 2 * query >= start, 2 * query + 1 < stop
        first = (2 * query - start) * size if plus else 0
        args = (
            source,
            target[first:] if first else target,
            plus,
            minus,
            size if plus and minus else 0,
            amplitude,
            (*walk.layout, first_row),
            (walk.kind, walk.lanes, *counter_words(key, tensor, query)),
        )
        _over_threads(perturb_sweep, args, walk, first_row)


def _from_noise(
    w: Tensor,
    key: Tensor,
    eps: Tensor,
    tensor: int,
    start: int,
    stop: int,
    noise: str,
    scale: float,
    dtype: torch.dtype | None,
) -> Tensor:
    """Other dtypes: fast noise, the reference's arithmetic."""
    out = empty_halves(w, stop - start, dtype)
    wide = compute_dtype(w)
    amplitude = eps.to(wide) * torch.tensor(scale, dtype=wide)
    for query in range(start // 2, (stop + 1) // 2):
        z = sample(w.shape, key, tensor=tensor, query=query, noise=noise)
        write_halves(out, w, amplitude, start, query, z)
    return out


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
        args = (_memory(target, walk.extent), coeff32, *settings)
        _over_threads(update_sweep, args, walk, first_row)
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


@torch.no_grad()
def perturb_(
    w: Tensor,
    key: Tensor,
    alpha: Tensor,
    *,
    tensor: int,
    query: int = 0,
    noise: str = "normal",
) -> None:
    wide = compute_dtype(w)
    z = sample(w.shape, key, tensor=tensor, query=query, noise=noise)
    w.add_(alpha.to(wide) * z.to(wide))  # in the wider of the two dtypes, then rounded once


__all__ = ["perturb_", "perturbed_weights", "sample", "update_"]
