"""What a convolution takes inside itself: predicted on tensors without memory, and recorded."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch

from elasticzo.scratch import SCRATCH_OPS, allocations, peak_inside

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
        peak = max(accumulate(allocations(lambda op=op, given=given: op(*given))))
        assert peak_inside(op, given, {}) == peak > 0
