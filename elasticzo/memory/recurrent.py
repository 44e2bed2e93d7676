"""What oneDNN's LSTM holds on the CPU: its scratch, and the workspace that its backward reads.

Of the workspace, several times the activations, torch's shape functions say that it is empty. So,
as for convolutions (`elasticzo.memory.scratch`), the op itself runs: small ones as they are, large
ones on two small batches, and the straight line through what it held is continued.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from elasticzo.memory.scratch import allocations

FEW = (16, 32)  # samples
SMALL = 1 << 24  # bytes of the gates of a call that runs as it is: whole pages tell there
LSTM = torch.ops.aten.mkldnn_rnn_layer.default
LSTM_BACKWARD = torch.ops.aten.mkldnn_rnn_layer_backward.default
LSTM_OPS = (LSTM, LSTM_BACKWARD)


@dataclass(frozen=True)
class _Call:
    """A call of one layer in one direction, but for the batch.

    Attributes:
        batch_major: whether the input `[T, B, I]`, and the gradient of the output, have the batch
            outermost in memory.
        settings: of the forward, from `reverse` to `train`.
        gradients: of a backward, which of output, h and c has one; None for a forward.
        recorded: whether gradients are recorded: only then is there a workspace.
    """

    steps: int
    features: int
    dtype: torch.dtype
    batch_major: tuple[bool, bool]
    weights: tuple[tuple[int, ...], ...]
    settings: tuple[Any, ...]
    gradients: tuple[bool, ...] | None
    recorded: bool
    threads: int


def lstm_inside(func: Any, args: Any) -> tuple[int, int]:
    """Bytes that a call holds at most above what was held before, its outputs among them, and
    bytes of the workspace that it returns.

    Args:
        func: one of `LSTM_OPS`.
        args: as it is called; of tensors the shapes are looked at, not the values.
    """
    x, forward = args[0], func is LSTM
    if forward:
        settings = (args[7], tuple(args[8]), *args[9:16])
    else:
        reverse, mode, hidden, layers, biases, train, both, sizes, first = args[13:22]
        settings = (reverse, tuple(sizes), mode, hidden, layers, biases, both, first, train)
    call = _Call(
        x.shape[0],
        x.shape[2],
        x.dtype,
        (_batch_major(x), not forward and _batch_major(args[10])),
        tuple(tuple(w.shape) for w in args[1:5]),
        settings,
        None if forward else tuple(g is not None for g in args[10:13]),
        torch.is_grad_enabled() or not forward,
        torch.get_num_threads(),
    )
    batch, (low, high) = x.shape[1], FEW
    if batch <= high or 4 * x.shape[0] * batch * args[5].shape[-1] * x.itemsize <= SMALL:
        return _held(call, batch)
    few, more = _held(call, low), _held(call, high)
    inside, workspace = (
        a + (b - a) * (batch - low) // (high - low) for a, b in zip(few, more, strict=True)
    )
    return inside, workspace


@lru_cache(maxsize=256)
def _held(call: _Call, batch: int) -> tuple[int, int]:
    """The same of a batch of this size, by running it."""
    x = torch.zeros(call.steps, batch, call.features, dtype=call.dtype, device="cpu")
    x = _laid_out(x, call.batch_major[0])
    weights = [torch.zeros(shape, dtype=call.dtype, device="cpu") for shape in call.weights]
    reverse, sizes, mode, hidden, layers, biases, both, first, train = call.settings
    h, c = (torch.zeros(batch, hidden, dtype=call.dtype, device="cpu") for _ in range(2))
    with torch.set_grad_enabled(call.recorded):
        given = (x, *weights, h, c, reverse, list(sizes), mode, hidden, layers, biases, both)
        output, *last, workspace = LSTM(*given, first, train)
        run: Any = lambda: LSTM(*given, first, train)  # noqa: E731
        if call.gradients is not None:
            made: list[Tensor] = [output, *last]
            wanted = zip(made, call.gradients, strict=True)
            gradients = [torch.zeros_like(t) if there else None for t, there in wanted]
            if gradients[0] is not None:
                gradients[0] = _laid_out(gradients[0], call.batch_major[1])
            after = (reverse, mode, hidden, layers, biases, train, both, list(sizes), first)
            back = (x, *weights, h, c, *made, *gradients, *after, workspace)
            run = lambda: LSTM_BACKWARD(*back)  # noqa: E731
            run()
        inside = max(accumulate(allocations(run)), default=0)
    return inside, workspace.nbytes if workspace is not None else 0


def _batch_major(t: Tensor | None) -> bool:
    return t is not None and t.stride(0) < t.stride(1)


def _laid_out(t: Tensor, batch_major: bool) -> Tensor:
    """`[T, B, ...]` with time or the batch outermost in memory."""
    return t.transpose(0, 1).contiguous().transpose(0, 1) if batch_major else t
