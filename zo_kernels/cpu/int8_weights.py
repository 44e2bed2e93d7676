"""The integer ops on the CPU: fused sweeps over flat memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zo_kernels.cpu.int8_kernels import (
    cross_entropy,
    gradient_update,
    perturb_int8,
    range_flat,
    requantize_flat,
    softmax_error,
    update_int8,
)
from zo_kernels.cpu.update import sample
from zo_kernels.int8 import (
    ERROR_EXPONENT,
    ROUNDINGS,
    check_target,
    dense,
    half_shape,
    sparse_constants,
    update_shift,
)
from zo_kernels.layout import Layout, groups_per_row, layout_of
from zo_kernels.reference.integer import rounding_words
from zo_kernels.reference.integer_projected_sign import integer_projected_sign
from zo_kernels.reference.noise import MASK, PURPOSES
from zo_kernels.reference.weights import empty_halves

NO_WORDS = np.zeros(0, np.int64)
ZERO = torch.zeros(1, dtype=torch.int32)


def _memory(t: Tensor, extent: int | None = None) -> Any:
    """Memory from the first element on as a flat numpy array."""
    return t.as_strided((t.numel() if extent is None else extent,), (1,)).numpy()


def _counters(key: Tensor, tensor: int, query: int) -> tuple[np.uint64, ...]:
    """Counter words c1, c2, c3 and the two halves of the key; one type for all values."""
    seed, step = key.tolist()
    third = query + (PURPOSES["noise"] << 24)
    words = (tensor, step & MASK, third, seed & MASK, (seed >> 32) & MASK)
    return tuple(np.uint64(word) for word in words)


def _settings(p_zero: float, r_max: int) -> tuple[int, int, int, int]:
    p0, magic, shift = sparse_constants(p_zero, r_max)
    return p0, magic & MASK, shift, r_max


def _walk(layout: Layout) -> tuple[int, int, int, int, int]:
    return layout.cols, layout.inner, layout.s_row, layout.s_outer, layout.s_inner


def int8_range(acc: Tensor, *, halves: int | None = None) -> Tensor:
    flat = _memory(acc if dense(acc) else acc.contiguous())
    parts = flat.reshape(halves or 1, acc.numel() // (halves or 1))
    bits = torch.tensor([range_flat(part) for part in parts], dtype=torch.int32)
    return bits.squeeze(0) if halves is None else bits


def int8_requantize(
    acc: Tensor,
    bits: Tensor | None,
    exponent: Tensor,
    *,
    weight_exponent: Tensor | None = None,
    halves: int | None = None,
    rounding: str = "nearest",
    key: Tensor | None = None,
    tensor: int = 0,
    query: int = 0,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    if bits is None:
        bits = int8_range(acc, halves=halves)
    noise = rounding_words(half_shape(acc.shape, halves), key, rounding, tensor, query, sample)
    words = NO_WORDS if noise is None else noise.contiguous().view(-1).numpy()
    source = acc if dense(acc) and noise is None else acc.contiguous()
    q = torch.empty_like(source, dtype=torch.int8)
    total = torch.empty(() if halves is None else (halves,), dtype=torch.int32)
    # Kept here until the call is over; an expanded exponent has one place for all halves.
    exponents = [ZERO if t is None else t.contiguous() for t in (bits, exponent, weight_exponent)]
    requantize_flat(
        *(source.data_ptr(), q.data_ptr(), acc.numel(), total.data_ptr(), halves or 1),
        tuple((t.data_ptr(), t.numel()) for t in exponents),
        *(ROUNDINGS[rounding], words, 0 if relu else -127),
    )
    out = q if source is acc else torch.empty_like(acc, dtype=torch.int8).copy_(q)
    return out, total


@torch.no_grad()
def int8_gradient_update_(
    w: Tensor,
    gradient: Tensor,
    *,
    b_bp: int,
    rounding: str = "pseudo",
    key: Tensor | None = None,
    tensor: int = 0,
) -> None:
    noise = rounding_words(w.shape, key, rounding, tensor, 0, sample)
    words = NO_WORDS if noise is None else noise.contiguous().view(-1).numpy()
    target = w.contiguous()
    flat = target.view(-1).numpy(), gradient.contiguous().view(-1).numpy()
    gradient_update(*flat, b_bp, ROUNDINGS[rounding], words)
    if target is not w:
        w.copy_(target)


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
        halves = torch.empty(out.shape, dtype=torch.int8)
        source = target = layout_of(w)
        assert source is not None and target is not None
    groups = source.rows * groups_per_row(source.cols, "sparse_int8")
    walks = (_walk(source), _walk(target), groups, _settings(p_zero, r_max))
    memory = _memory(w, source.extent)
    for query in range(start // 2, (stop + 1) // 2):
        plus, minus = 2 * query >= start, 2 * query + 1 < stop
        first = halves[2 * query - start] if plus else halves[2 * query + 1 - start]
        second = halves[2 * query + 1 - start] if minus else first
        to = (_memory(first, target.extent), _memory(second, target.extent), plus, minus)
        perturb_int8(memory, *to, *walks, _counters(key, tensor, query))
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
    signs, settings = g.detach().numpy(), _settings(p_zero, r_max)
    for w, tensor in zip(params, tensors, strict=True):
        if w.numel() == 0:
            continue
        target = w if layout_of(w) is not None else w.contiguous()
        layout = layout_of(target)
        assert layout is not None
        groups = layout.rows * groups_per_row(layout.cols, "sparse_int8")
        rest = (s, ROUNDINGS[rounding], _walk(layout), groups, settings)
        update_int8(_memory(target, layout.extent), signs, *rest, _counters(key, tensor, 0))
        if target is not w:
            w.copy_(target)


def integer_cross_entropy(
    logits: Tensor, exponent: Tensor, target: Tensor, *, fraction_bits: int = 12
) -> Tensor:
    check_target(target, logits.shape[2])
    losses = torch.empty(logits.shape[0], dtype=torch.int64)
    where = (logits.numpy(), exponent.numpy(), target.numpy())
    cross_entropy(*where, fraction_bits, losses.numpy())
    return losses


def integer_softmax_error(
    logits: Tensor,
    exponent: Tensor,
    target: Tensor,
    *,
    fraction_bits: int = 12,
    rounding: str = "stochastic",
    key: Tensor | None = None,
    tensor: int = 0,
    query: int = 0,
) -> tuple[Tensor, Tensor]:
    halves, batch, classes = logits.shape
    check_target(target, classes)
    noise = rounding_words((batch, classes), key, rounding, tensor, query, sample)
    words = (torch.empty((0, 0), dtype=torch.int64) if noise is None else noise).numpy()
    out = torch.empty(logits.shape, dtype=torch.int8)
    where = (logits.numpy(), exponent.numpy(), target.numpy())
    softmax_error(*where, fraction_bits, ROUNDINGS[rounding], words, out.numpy())
    return out, torch.full((halves,), ERROR_EXPONENT, dtype=torch.int32)


__all__ = [
    "int8_gradient_update_",
    "int8_perturbed_weights",
    "int8_range",
    "int8_requantize",
    "int8_update_",
    "integer_cross_entropy",
    "integer_projected_sign",
    "integer_softmax_error",
]
