"""Weights of every layout the ops promise to take, and what a test asks of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

COLUMNS = (0, 1, 3, 4, 5, 127, 128, 129, 1023, 1024, 1025)
Make = Callable[[torch.dtype, torch.device], Tensor]


def _of(shape: tuple[int, ...], view: Callable[[Tensor], Tensor] = lambda w: w) -> Make:
    def make(dtype: torch.dtype, device: torch.device) -> Tensor:
        return view(torch.randn(shape, dtype=torch.float64).to(device, dtype))

    return make


def _channels_last(w: Tensor) -> Tensor:
    return w.to(memory_format=torch.channels_last)


SHAPES: dict[str, Make] = {
    "0d": _of(()),
    "no-rows": _of((0, 7)),
    "one-row": _of((1, 130)),
    **{f"1d-{n}": _of((n,)) for n in (0, 1, 5, 1025, 1040)},
    **{f"3x{n}": _of((3, n)) for n in COLUMNS},
    "conv1d": _of((4, 3, 5)),
    "conv2d": _of((6, 3, 5, 5)),
    "conv2d-1-channel": _of((6, 1, 5, 5)),
    "conv2d-1x1": _of((8, 16, 1, 1)),
    "conv3d": _of((4, 3, 2, 3, 2)),
}
VIEWS: dict[str, Make] = {
    "channels-last": _of((6, 3, 5, 5), _channels_last),
    "channels-last-4": _of((6, 4, 3, 3), _channels_last),
    "channels-last-3d": _of((4, 3, 2, 3, 2), lambda w: w.to(memory_format=torch.channels_last_3d)),
    "transposed": _of((40, 7), lambda w: w.t()),
    "every-third": _of((400,), lambda w: w[::3]),
    "some-rows": _of((9, 33), lambda w: w[1::2]),
    "some-columns": _of((9, 140), lambda w: w[:, 3:136]),
    "misaligned": _of((1 + 8 * 64,), lambda w: w[1:].view(8, 64)),
    "conv-transposed": _of((3, 6, 5, 5), lambda w: w.transpose(0, 1)),
    # Here dimensions 2, 3, ... do not act as one: no single stride walks them.
    "sliced-kernel": _of((6, 3, 6, 7), lambda w: w[:, :, ::2, :5]),
    "permuted-kernel": _of((4, 3, 4, 5, 2), lambda w: w.permute(0, 1, 4, 2, 3)),
}
EXPANDED: dict[str, Make] = {
    "expanded-rows": _of((1, 37), lambda w: w.expand(5, 37)),
    "expanded-columns": _of((5, 1), lambda w: w.expand(5, 37)),
    "expanded-kernel": _of((4, 3, 1, 1), lambda w: w.expand(4, 3, 2, 5)),
    "expanded-channels": _of((4, 1, 2, 5), lambda w: w.expand(4, 3, 2, 5)),
}
IN_PLACE = SHAPES | VIEWS
ALL = IN_PLACE | EXPANDED
# One of each kind, and of each layout, for tests that vary something else.
FEW = {
    name: ALL[name]
    for name in ("0d", "3x129", "conv2d", "channels-last", "transposed", "sliced-kernel")
}
LAYOUTS = FEW | VIEWS


def storage(w: Tensor) -> Tensor:
    """The whole memory behind a view."""
    size = w.untyped_storage().nbytes() // w.element_size()
    return w.detach().as_strided((size,), (1,), 0)


def bits(t: Tensor) -> Tensor:
    """The pattern: equal bits tell -0.0 from 0.0 and one NaN from another."""
    t = t.detach().contiguous()
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a).cpu(), bits(b).cpu())


def f64(value: float | list[float], device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


__all__ = [
    "ALL",
    "EXPANDED",
    "FEW",
    "IN_PLACE",
    "LAYOUTS",
    "VIEWS",
    "bits",
    "f64",
    "same_bits",
    "storage",
]
