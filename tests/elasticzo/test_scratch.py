"""What an op takes inside itself: predicted on tensors without memory, and recorded."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch

from elasticzo.memory.scratch import SCRATCH_OPS, allocations, copies_inside, peak_inside

CONVOLUTIONS = {
    "few channels": (1, 6, 28, 5, {"padding": 2}),
    "square": (16, 16, 8, 3, {"padding": 1}),
    "strided": (16, 32, 8, 3, {"padding": 1, "stride": 2}),
    "pointwise": (32, 64, 8, 1, {}),
    "grouped": (8, 16, 8, 3, {"groups": 2}),
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """oneDNN takes scratch for each of its threads: only of one is it the same at every size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("batch", [1, 3, 12, 40])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_scratch_of_a_convolution_is_that_of_the_whole_batch(
    case: str, batch: int, one_thread: None
) -> None:
    inner, outer, size, kernel, how = CONVOLUTIONS[case]
    settings: dict[str, Any] = {"stride": 1, "padding": 0, "groups": 1, **how}
    x, w = torch.randn(batch, inner, size, size), torch.randn(outer, inner, kernel, kernel)
    w = w[:, : inner // settings["groups"]].contiguous()
    places = ([settings["stride"]] * 2, [settings["padding"]] * 2, [1, 1], False, [0, 0])
    forward, backward = SCRATCH_OPS
    args: tuple[Any, ...] = (x, w, None, *places, settings["groups"])
    y = forward(*args)
    for op, given in (
        (forward, args),
        (backward, (y, x, w, [0], *places, settings["groups"], [True] * 3)),
    ):
        peak = max(accumulate(allocations(partial(op, *given))))
        assert peak_inside(op, given, {}) == peak > 0


A, B = torch.randn(300, 500), torch.arange(150_000).reshape(300, 500)
ATEN = torch.ops.aten


@pytest.mark.parametrize(
    "op, args",
    [
        (ATEN.mul.Tensor, (A, B > 3)),
        (ATEN.mul.Tensor, (A, A)),
        (ATEN.mul_.Tensor, (A.clone(), B)),
        (ATEN.add.Tensor, (A.double(), A[0])),
        (ATEN.sub.Tensor, (A[:, :1], A.bfloat16())),
        (ATEN.eq.Tensor, (A, B)),
        (ATEN.mul.Tensor, (A, torch.tensor(2))),
        (ATEN.sum.dim_IntList, (B > 3, [1])),
        (ATEN.sum.dim_IntList, (B, [0])),
        (ATEN.sum.dim_IntList, (A, [0])),
        (ATEN.relu.default, (A,)),
    ],
    ids=lambda value: str(value) if callable(value) else "",
)
def test_copies_in_a_common_dtype(op: Any, args: tuple[Any, ...]) -> None:
    kept = op(*args)
    out = 0 if kept is args[0] else kept.untyped_storage().nbytes()
    peak = max(accumulate(allocations(partial(op, *args))), default=0)
    # Beside the output a reduction takes a buffer of a few elements.
    assert out + copies_inside(op, args) <= peak <= out + copies_inside(op, args) + 4096
