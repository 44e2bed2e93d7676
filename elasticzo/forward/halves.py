"""Running points one by one, or stacked, from the same buffers and the same generator state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from elasticzo.buffers import BufferSlot, BufferSnapshot, generator_state, set_generator_state
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
    """The model drew from torch's generator while its halves ran stacked."""


def each_half(current: Pass, slots: Sequence[BufferSlot], run: Callable[[int], Any]) -> list[Any]:
    """`run(half)` for every half, each from the same buffers and the same generator state.

    Afterwards floating buffers hold their mean over the halves, attributes what the last one left,
    and the generator has moved once.
    """
    device = current.key.device
    snapshot = BufferSnapshot(slots)
    attributes = current.attributes() if current.attributes is not None else None
    before = generator_state(device)
    if current.started is None:
        current.started = before
    outputs, buffers = [], []
    for half in range(current.halves):
        if half:
            snapshot.restore()
            if attributes is not None:
                attributes.restore()
            if not torch.equal(generator_state(device), before):
                set_generator_state(device, before)
        with current.only(half):
            outputs.append(run(half))
        if slots:
            buffers.append(snapshot.values())
    if slots and current.halves > 1:
        snapshot.write_mean(buffers)
    return outputs


def run_stacked(model: nn.Module, current: Pass, args: Any, kwargs: Any) -> Any:
    """One call of the model with stacked inputs; the generator must stay as it is."""
    device = current.key.device
    current.started = current.generator_state = generator_state(device)
    output = model(*args, **kwargs)
    check_generator(current)
    return output


def check_generator(current: Pass) -> None:
    """Complain when something drew from torch's generator since the last look."""
    assert current.generator_state is not None
    if not torch.equal(generator_state(current.key.device), current.generator_state):
        raise UsesGenerator
