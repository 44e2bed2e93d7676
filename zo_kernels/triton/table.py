"""A table of tensors on the device, so that one launch can walk many of them.

A row says where a weight lies, how to walk it and which noise is its own; a program finds its row
by its number. A table holds addresses: it is made again when any of them changes, and whoever
records a launch to repeat it (a CUDA graph) must keep the table alive (`hold_tables`).
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,operator,index"

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from zo_kernels.layout import PER_CALL, groups_per_row, layout_of
from zo_kernels.triton.shim import jit, tl

BLOCK = 1024  # elements a program
FIELDS = tl.constexpr(18)
MAX_TABLES = 4096  # chunks of large layers have one each
INT32_MAX = 2**31 - 1


@jit
def source_row(table_ptr, t, INT64: tl.constexpr):
    """(pid in the tensor, elements, cols, padded cols, first row) of the program's weight."""
    p_row = table_ptr + t * FIELDS
    pid = tl.program_id(0) - tl.load(p_row + 1)
    elements = tl.load(p_row + 2)
    cols = tl.load(p_row + 3)
    padded_cols = tl.load(p_row + 4)
    first_row = tl.load(p_row + 17)
    if not INT64:
        pid = pid.to(tl.int32)
        elements = elements.to(tl.int32)
        cols = cols.to(tl.int32)
        padded_cols = padded_cols.to(tl.int32)
        first_row = first_row.to(tl.int32)
    return pid, elements, cols, padded_cols, first_row


@jit
def row_offset(table_ptr, t, o_row, o_col, FIRST: tl.constexpr, INT64: tl.constexpr):
    """Memory offset of elements; the strides (row, outer, inner) stand from field FIRST on."""
    p_row = table_ptr + t * FIELDS
    inner = tl.load(p_row + 5)
    s_row = tl.load(p_row + FIRST)
    s_outer = tl.load(p_row + FIRST + 1)
    s_inner = tl.load(p_row + FIRST + 2)
    if not INT64:
        inner = inner.to(tl.int32)
        s_row = s_row.to(tl.int32)
        s_outer = s_outer.to(tl.int32)
        s_inner = s_inner.to(tl.int32)
    return o_row * s_row + (o_col // inner) * s_outer + (o_col % inner) * s_inner


@jit
def flat_walk(p_row, o_e, DTYPE: tl.constexpr, INT64: tl.constexpr):
    """Pointers to elements of a flat weight, and which exist: for 16-byte accesses.

    Address and length are multiples of 16. That is told here, where they are loaded: told of the
    results of a call it is lost in Triton 3.6, and in 3.9 believed of all of them.
    """
    w_ptr = tl.multiple_of(tl.load(p_row).to(tl.pointer_type(DTYPE)), 16)
    elements = tl.multiple_of(tl.load(p_row + 2), 16)
    if not INT64:
        elements = elements.to(tl.int32)
    return w_ptr + o_e, o_e < elements


@dataclass(frozen=True)
class Table:
    """What the launch over tensors of one dtype needs on the device.

    Attributes:
        fields: `[T, FIELDS]` int64: address, first program, elements, cols, padded cols, inner,
            strides (row, outer, inner), tensor, group, flat, offset in the output, its strides
            (row, outer, inner) and the distance of its halves, first row.
        scales: `[T]` float64.
        blocks: `[programs]` int32, the tensor of each program.
        flat: whether every tensor can be walked in memory order, 16 bytes at a time.
        kept: `[T, 1 + tensors]` int64 where an update keeps state: where the weight's settings
            begin, and the addresses of its state.
    """

    fields: Tensor
    scales: Tensor
    blocks: Tensor
    int64: bool
    flat: bool
    kept: Tensor | None = None


def build_table(
    params: Sequence[Tensor],
    tensors: Sequence[int],
    groups: Sequence[int],
    scales: Sequence[float],
    noise: str,
    outs: Sequence[Tensor] | None = None,
    first_row: int = 0,
    kept: Sequence[tuple[int, ...]] = (),
) -> Table:
    """The table of weights that a kernel can walk; `outs` [halves, ...] lie in one memory, and
    state (`kept_of`) as its weight does."""
    per = PER_CALL[noise]
    rows, owners, first, largest, all_flat = [], [], 0, 0, True
    for t, (w, tensor, group) in enumerate(zip(params, tensors, groups, strict=True)):
        layout = layout_of(w)
        assert layout is not None
        padded_cols = groups_per_row(layout.cols, noise) * per
        padded = layout.rows * padded_cols
        aligned = w.data_ptr() % 16 == 0 and w.numel() % 16 == 0
        flat = aligned and layout.flat and (layout.cols % per == 0 or layout.rows == 1)
        flat = flat and not any(address % 16 for own in kept[t : t + 1] for address in own[1:])
        target = [0] * 5
        if outs is not None:
            to, out = layout_of(outs[t][0]), outs[t]
            assert to is not None
            offset = (out.data_ptr() - outs[0].data_ptr()) // out.element_size()
            target = [offset, to.s_row, to.s_outer, to.s_inner, out.stride(0)]
            flat = flat and to.flat and offset % 16 == 0 and out.stride(0) % 16 == 0
            largest = max(largest, to.extent)
        elements = w.numel() if flat else padded
        blocks = -(-padded // BLOCK)
        where = [w.data_ptr(), first, elements, layout.cols, padded_cols, layout.inner]
        strides = [layout.s_row, layout.s_outer, layout.s_inner]
        rows.append([*where, *strides, tensor, group, int(flat), *target, first_row])
        owners += [t] * blocks
        first += blocks
        all_flat = all_flat and flat
        largest = max(largest, padded, layout.extent)
    device = params[0].device
    return Table(
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.tensor(scales, dtype=torch.float64, device=device),
        torch.tensor(owners, dtype=torch.int32, device=device),
        largest + BLOCK > INT32_MAX,
        all_flat,
        torch.tensor(kept, dtype=torch.int64, device=device) if kept else None,
    )


_TABLES: OrderedDict[tuple[object, ...], Table] = OrderedDict()
_HELD: list[list[Table]] = []


def table_of(
    params: Sequence[Tensor],
    tensors: Sequence[int],
    groups: Sequence[int],
    scales: Sequence[float],
    noise: str,
    outs: Sequence[Tensor] | None = None,
    first_row: int = 0,
    kept: Sequence[tuple[int, ...]] = (),
) -> Table:
    """The table of these very tensors, made again when one of them moved."""
    where = tuple((w.data_ptr(), w.shape, w.stride(), w.dtype) for w in params)
    to: tuple[object, ...] = ()
    if outs is not None:
        base = outs[0].data_ptr()
        aligned = base % 16 == 0
        to = (aligned, *((out.data_ptr() - base, out.stride(), out.dtype) for out in outs))
    names = (tuple(tensors), tuple(groups), tuple(scales), noise, first_row, tuple(kept))
    signature = (where, to, names, params[0].device)
    if signature not in _TABLES:
        named = (tensors, groups, scales, noise, outs, first_row, kept)
        _TABLES[signature] = build_table(params, *named)
        if len(_TABLES) > MAX_TABLES:
            _TABLES.popitem(last=False)
    _TABLES.move_to_end(signature)
    for held in _HELD:
        held.append(_TABLES[signature])
    return _TABLES[signature]


@contextmanager
def hold_tables() -> Iterator[list[Table]]:
    """Collect the tables used meanwhile: a recorded launch reads them for as long as it lives."""
    held: list[Table] = []
    _HELD.append(held)
    try:
        yield held
    finally:
        _HELD.remove(held)
