"""The ops on the CPU: fused sweeps for fp32 weights, fast noise and torch for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_kernels._layout import (
    PER_CALL,
    Layout,
    groups_per_row,
    layout_of,
    rows_cols,
    to_shape,
)
from zo_kernels.cpu.noise import BITS, NORMAL, RADEMACHER, SPARSE, fill_float, fill_int
from zo_kernels.cpu.sweep import perturb_sweep, update_sweep
from zo_kernels.reference.noise import PURPOSES
from zo_kernels.reference.perturbed_weights import compute_dtype, empty_halves, write_halves
from zo_kernels.reference.sample import DTYPES
from zo_kernels.reference.update import updated

KINDS = {"normal": NORMAL, "rademacher": RADEMACHER}
MASK = 0xFFFFFFFF
PARALLEL_FROM = 1 << 19  # elements: below, a thread's hand-over costs more than it saves


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="zo_kernels")


def _over_threads(
    sweep: Callable[..., None], args: tuple[Any, ...], groups: int, lanes: int
) -> None:
    """Run `sweep(*args, first, last)` over all groups, in parts where there is enough work."""
    workers = torch.get_num_threads() if groups * lanes >= PARALLEL_FROM else 1
    if workers == 1:
        sweep(*args, 0, groups)
        return
    bounds = [groups * i // workers for i in range(workers + 1)]
    for job in [_pool(workers).submit(sweep, *args, a, b) for a, b in pairwise(bounds)]:
        job.result()


def _counters(key: Tensor, tensor: int, query: int, purpose: str = "noise") -> tuple[Any, ...]:
    seed, step = key.tolist()
    third = query + (PURPOSES[purpose] << 24)
    u32 = np.uint32
    return u32(tensor), u32(step & MASK), u32(third), u32(seed & MASK), u32(seed >> 32)


def _memory(t: Tensor, extent: int) -> Any:
    """The memory of a tensor as a flat numpy array."""
    return t.as_strided((extent,), (1,)).numpy()


def _layout_args(layout: Layout) -> tuple[int, ...]:
    return layout.cols, layout.inner, layout.s_row, layout.s_outer, layout.s_inner


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
    rows, cols = rows_cols(shape)
    per_row = groups_per_row(cols, noise)
    groups, lanes = rows * per_row, PER_CALL[noise]
    counters = _counters(key, tensor, query, purpose)
    if noise in KINDS:
        z = torch.empty(groups * lanes, dtype=torch.float32)
        fill_float(z.numpy(), KINDS[noise], 0, groups, *counters)
    else:
        z = torch.empty(groups * lanes, dtype=torch.int64)
        kind = BITS if noise == "bits" else SPARSE
        fill_int(z.numpy(), kind, 0, groups, round(65536 * p_zero), r_max, *counters)
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
    out = empty_halves(w, stop - start, dtype)
    layout = layout_of(w) if w.dtype == out.dtype == torch.float32 else None
    if layout is None or layout_of(out[0]) != layout:
        wide = compute_dtype(w)
        amplitude = eps.to(wide) * torch.tensor(scale, dtype=wide)
        for query in range(start // 2, (stop + 1) // 2):
            z = sample(w.shape, key, tensor=tensor, query=query, noise=noise)
            write_halves(out, w, amplitude, start, query, z)
        return out
    amplitude_ = np.float32(np.float32(eps.item()) * np.float32(scale))
    lanes = PER_CALL[noise]
    groups = layout.rows * groups_per_row(layout.cols, noise)
    source = _memory(w, layout.extent)
    for query in range(start // 2, (stop + 1) // 2):
        plus, minus = 2 * query >= start, 2 * query + 1 < stop
        first = out[2 * query - start if plus else 0]
        distance = out.stride(0) if plus and minus else 0
        target = _memory(first, layout.extent + distance)
        noise_args = (KINDS[noise], lanes, *_counters(key, tensor, query))
        args = (source, target, plus, minus, distance, amplitude_, _layout_args(layout), noise_args)
        _over_threads(perturb_sweep, args, groups, lanes)
    return out


def _update_one(
    w: Tensor,
    key: Tensor,
    coeff: Any,
    scale: float,
    lr: float,
    decay: float,
    tensor: int,
    noise: str,
) -> bool:
    """The fused update of one fp32 weight; False where its layout is not one we sweep."""
    layout = layout_of(w) if w.dtype == torch.float32 else None
    if layout is None:
        return False
    lanes = PER_CALL[noise]
    f32 = np.float32
    args = (
        _memory(w, layout.extent),
        coeff,
        f32(scale),
        f32(lr),
        f32(decay),
        _layout_args(layout),
        (KINDS[noise], lanes, *_counters(key, tensor, 0)),
    )
    _over_threads(update_sweep, args, layout.rows * groups_per_row(layout.cols, noise), lanes)
    return True


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
    if skip.item() != 0:
        return
    coeff32 = coeff.to(torch.float32).numpy()
    rates, decays = lr.tolist(), weight_decay.tolist()
    for w, tensor, group, scale in zip(params, tensors, groups, scales, strict=True):
        if not _update_one(w, key, coeff32, scale, rates[group], decays[group], tensor, noise):
            new = updated(
                w, key, coeff, lr[group], weight_decay[group], tensor, scale, noise, sample
            )
            w.copy_(new)


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
    w.add_((alpha.to(wide) * z.to(wide)).to(w.dtype)) if w.dtype == wide else w.copy_(
        w.to(wide) + alpha.to(wide) * z.to(wide)
    )


__all__ = ["perturb_", "perturbed_weights", "sample", "update_"]
