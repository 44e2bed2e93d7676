"""What fused sweeps over fp32 weights share: how to walk a weight, and threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from zo_kernels.cpu.kernels import NORMAL, RADEMACHER
from zo_kernels.layout import PER_CALL, PURPOSES, groups_per_row, layout_of

KINDS = {"normal": NORMAL, "rademacher": RADEMACHER}
NOISES = {kind: noise for noise, kind in KINDS.items()}
MASK = 0xFFFFFFFF
PARALLEL_FROM = 1 << 19  # elements: below, a thread's hand-over costs more than it saves


@dataclass(frozen=True)
class Walk:
    """What a sweep needs to know of a weight's layout; `layout` is (cols, inner, three strides)."""

    layout: tuple[int, int, int, int, int]
    extent: int
    kind: int
    lanes: int
    groups: int
    contiguous: bool
    dense: bool  # a half in the memory format of the weight lies as the weight does


@lru_cache(maxsize=4096)
def walk_of(shape: torch.Size, strides: tuple[int, ...], noise: str) -> Walk | None:
    """How to sweep a weight of this layout; None where no sweep can walk it."""
    w = torch.empty_strided(shape, strides, device="meta")
    layout = layout_of(w)
    if layout is None:
        return None
    return Walk(
        (layout.cols, layout.inner, layout.s_row, layout.s_outer, layout.s_inner),
        layout.extent,
        KINDS[noise],
        PER_CALL[noise],
        layout.rows * groups_per_row(layout.cols, noise),
        w.is_contiguous(),
        layout.extent == w.numel() and torch.empty_like(w).stride() == w.stride(),
    )


@cache
def pool_of(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="zo_kernels")


if hasattr(os, "register_at_fork"):
    # A forked child has the pool and none of its threads: it would wait for them for ever.
    os.register_at_fork(after_in_child=pool_of.cache_clear)


def over_threads(
    sweep: Callable[..., None], args: tuple[Any, ...], walk: Walk, first_row: int = 0
) -> None:
    """Run `sweep(*args, first, last)` over all groups, in parts where there is enough work."""
    groups = walk.groups
    first = first_row * groups_per_row(walk.layout[0], NOISES[walk.kind])
    workers = torch.get_num_threads() if groups * walk.lanes >= PARALLEL_FROM else 1
    if workers == 1:
        sweep(*args, first, first + groups)
        return
    bounds = [first + groups * i // workers for i in range(workers + 1)]
    for job in [pool_of(workers).submit(sweep, *args, a, b) for a, b in pairwise(bounds)]:
        job.result()


def counter_words(key: Tensor, tensor: int, query: int, purpose: str = "noise") -> tuple[int, ...]:
    """Counter words c1, c2, c3 and the two halves of the key."""
    seed, step = key.tolist()
    third = query + (PURPOSES[purpose] << 24)
    return tensor, step & MASK, third, seed & MASK, (seed >> 32) & MASK


def memory_of(t: Tensor, extent: int) -> Any:
    """The memory of a tensor as a flat numpy array."""
    return t.as_strided((extent,), (1,)).numpy()
