"""Running points one by one, or stacked, from the same buffers and the same generator state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elasticzo.buffers import BufferSlot, BufferSnapshot, generator_state, set_generator_state
from elasticzo.forward.draws import alone
from elasticzo.forward.passes import Layer, Pass


class ToSettle(Exception):
    """What a first forward shows: the plan changes, and it starts again."""


class NotByHalf(ToSettle):
    """A fallback whose halves cannot be joined: the module around it must run by half instead."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer.name)
        self.layer = layer


class NotBySample(ToSettle):
    """A layer that cannot tell the samples of its input apart: its weights have one direction."""

    def __init__(self, layer: Layer, why: str) -> None:
        super().__init__(layer.name)
        self.layer, self.why = layer, why


class KeepsState(ToSettle):
    """What modules keep in attributes belongs to a half, and the next forward reads it."""


class WritesInput(ToSettle):
    """The model writes to its stacked input without a trace."""


class UsesGenerator(ToSettle):
    """The model drew from torch's generator while its halves ran stacked, or somebody did and it is
    to be seen who."""


def each_half(current: Pass, slots: Sequence[BufferSlot], run: Callable[[int], Any]) -> list[Any]:
    """`run(half)` for every half, each from the same buffers and the same generator state.

    Afterwards floating buffers hold their mean over the halves, attributes what the last one left,
    and the generator has moved once.
    """
    snapshot = BufferSnapshot(slots)
    attributes = current.attributes() if current.attributes is not None else None
    before = generator_state(current.key.device)
    if current.started is None:
        current.started = before
    outputs, buffers = [], []
    if current.draws is not None:
        current.draws.begin()
    try:
        for half in range(current.halves):
            if half:
                snapshot.restore()
                if attributes is not None:
                    attributes.restore()
                _rewind(current, before)
            with current.only(half):
                outputs.append(run(half))
            if current.draws is not None:
                current.draws.end_half()
            if slots:
                buffers.append(snapshot.values())
    except RuntimeError:
        snapshot.restore()
        raise
    if slots and current.halves > 1:
        snapshot.write_mean(buffers)
    return outputs


def _rewind(current: Pass, state: Tensor) -> None:
    """Back to this state of the generator, where the half before drew from it."""
    device = current.key.device
    if torch.equal(generator_state(device), state):
        return
    if current.draws is not None:
        current.draws.rewind(state)
    elif alone():
        set_generator_state(device, state)
    else:
        raise UsesGenerator


def run_stacked(model: nn.Module, current: Pass, args: Any, kwargs: Any) -> Any:
    """One call of the model with stacked inputs; it must not draw from the generator."""
    look(current)
    output = model(*args, **kwargs)
    check_generator(current)
    return output


def look(current: Pass) -> None:
    """From here on nothing may be drawn."""
    current.generator_state = generator_state(current.key.device)
    if current.started is None:
        current.started = current.generator_state
    if current.draws is not None:
        current.draws.begin()


def check_generator(current: Pass) -> None:
    """Complain when something drew from torch's generator since the last look."""
    assert current.generator_state is not None
    if current.draws is not None:
        drew = current.draws.seen
    else:
        drew = not torch.equal(generator_state(current.key.device), current.generator_state)
    if drew:
        raise UsesGenerator
