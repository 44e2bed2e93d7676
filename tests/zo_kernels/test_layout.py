"""Where elements lie, and when offsets need 64 bits: decided on the host, tested without memory."""

from __future__ import annotations

from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.zo_kernels._weights import ALL
from zo_kernels.layout import Layout, layout_of, rows_cols, to_shape
from zo_kernels.registry import has_triton

needs_triton = pytest.mark.skipif(not has_triton(), reason="needs triton")
CPU = torch.device("cpu")
UNWALKABLE = {"sliced-kernel", "permuted-kernel"}


@pytest.mark.parametrize("name", ALL)
def test_offsets_of_a_layout_are_those_of_its_strides(name: str) -> None:
    w = ALL[name](torch.float32, CPU)
    layout = layout_of(w)
    assert (layout is None) == (name in UNWALKABLE)
    if layout is None:
        return
    rows, cols = rows_cols(w.shape)
    assert (layout.rows, layout.cols) == (rows, cols)
    if w.numel() == 0:
        assert layout.extent == 0
        return
    at = to_shape(
        torch.tensor([[offset(layout, r, c) for c in range(cols)] for r in range(rows)]), w.shape
    )
    for index in product(*(range(n) for n in w.shape)):
        assert at[index] == sum(i * s for i, s in zip(index, w.stride(), strict=True))
    assert layout.extent == int(at.max()) + 1


def offset(layout: Layout, row: int, col: int) -> int:
    outer, inner = divmod(col, layout.inner)
    return row * layout.s_row + outer * layout.s_outer + inner * layout.s_inner


FLAT = {
    "0d": (),
    "vector": (5,),
    "matrix": (3, 4),
    "conv1x1": (8, 16, 1, 1),
    "conv-of-one-channel": (6, 1, 5, 5),
}


@pytest.mark.parametrize("shape", FLAT.values(), ids=FLAT)
def test_memory_order_is_noticed(shape: tuple[int, ...]) -> None:
    """Strides of dimensions of extent 1 are arbitrary and must not hide it."""
    layout = layout_of(torch.randn(shape))
    assert layout is not None and layout.flat


def test_convolutions_are_flat_in_channels_last_only() -> None:
    w = torch.randn(6, 3, 5, 5)
    first, last = layout_of(w), layout_of(w.to(memory_format=torch.channels_last))
    assert first is not None and not first.flat
    assert last is not None and last.flat


def test_unused_strides_do_not_distinguish() -> None:
    w = torch.randn(1, 1, 4, 4)
    assert layout_of(w) == layout_of(w.as_strided(w.shape, (99, 77, 4, 1)))


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device="meta", dtype=dtype)


class Recorder:
    """Stands for a kernel: keeps what it is launched with."""

    def __getitem__(self, grid: Any) -> Any:
        self.grid = grid
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


EDGE = 2**31 - 1 - 1024  # the last block must not pass 2^31 - 1


@needs_triton
@pytest.mark.parametrize(
    ("elements", "halves", "wide"),
    [(1000, 2, False), (EDGE // 2 // 4 * 4, 2, False), (2**30, 2, True), (EDGE + 1, 1, True)],
)
def test_perturbed_weights_knows_when_offsets_need_64_bits(
    elements: int, halves: int, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, kernel = import_module("zo_kernels.triton.weights"), Recorder()
    monkeypatch.setattr(module, "_perturbed_weights_kernel", kernel)
    key, eps = meta(2, dtype=torch.int64), meta(dtype=torch.float64)
    module._launch(meta(elements), meta(halves, elements), key, eps, 0, 0, halves, "normal", 1.0)
    assert kernel.kwargs["INT64"] is wide


@needs_triton
def test_gaps_count_in_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few elements spread over more than 2^31."""
    module, kernel = import_module("zo_kernels.triton.weights"), Recorder()
    monkeypatch.setattr(module, "_perturbed_weights_kernel", kernel)
    w = meta(1).as_strided((4, 8), (2**30, 1))
    key, eps = meta(2, dtype=torch.int64), meta(dtype=torch.float64)
    module._launch(w, meta(2, 4, 8), key, eps, 0, 0, 2, "normal", 1.0)
    assert kernel.kwargs["INT64"] is True
    table = import_module("zo_kernels.triton.table").build_table([w], [0], [0], [1.0], "normal")
    assert table.int64


@needs_triton
@pytest.mark.parametrize(
    ("elements", "wide"), [(1000, False), (2**31 - 2**21, False), (2**31 - 2**20, True)]
)
def test_update_knows_when_offsets_need_64_bits(
    elements: int, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host lists the blocks of a table: here few but large ones."""
    module = import_module("zo_kernels.triton.table")
    monkeypatch.setattr(module, "BLOCK", 2**20)
    params = [meta(5), meta(elements)]
    assert module.build_table(params, [0, 1], [0, 0], [1.0, 1.0], "normal").int64 is wide


@needs_triton
@pytest.mark.parametrize(("cols", "wide"), [(1000, False), (EDGE // 4 * 4, False), (2**31, True)])
def test_sample_knows_when_offsets_need_64_bits(
    cols: int, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, kernel = import_module("zo_kernels.triton.noise"), Recorder()
    monkeypatch.setattr(module, "_sample_kernel", kernel)
    key = meta(2, dtype=torch.int64)
    module.sample((1, cols), key, tensor=0)
    assert kernel.kwargs["INT64"] is wide
