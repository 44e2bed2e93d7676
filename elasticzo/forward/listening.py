"""The two passes of learnt feedback: one that is clean and heard, one with noise that learns.

In the clean pass the output of the head's last layer becomes a leaf, so that the tail's backward
leaves the exact gradient there, and that of the loss at the network's outputs. In the noisy one
each layer of the head runs with its input in hand: its own backward turns the error of its outputs
into gradients of its weights, which are used at once; its outputs get their noise, and go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from elasticzo.forward.passes import Layer, Pass
from elasticzo.head import HeadParameter

Call = tuple[str, int]  # layer, which of its calls in a forward
Leaves = list[tuple[str, Tensor]]  # weights by name
Take = Callable[[str, Tensor], None]


@dataclass
class Heard:
    """What a clean pass leaves for the noisy one: the inputs, which are the user's own, the
    outputs `[1, B, ...]` by their places, and the leaves of the cut, where gradients will be."""

    args: Any
    kwargs: Any
    micro_batch: int
    first: int
    generator: Tensor | None  # where the model draws from torch's: its state before the pass
    autocast: torch.dtype | None
    outputs: dict[int, Tensor]
    cut: list[Tensor]
    outer: Leaves
    samples: int | None

    def error(self) -> tuple[Tensor, Tensor]:
        """Outputs and the loss's gradient by them, `[B, outputs]` each."""
        given = [t for t in self.outputs.values() if t.grad is not None]
        if not given or all(t.grad is None for t in (*self.cut, *(w for _, w in self.outer))):
            raise RuntimeError(
                "learnt feedback needs the gradient of the loss by the outputs: call "
                "model.backward(losses) on a loss that can be differentiated before zo.step(losses)"
            )
        outputs = list(self.outputs.values())
        errors = [torch.zeros_like(t) if t.grad is None else t.grad for t in outputs]
        return rows([t.detach() for t in outputs]), rows(errors)

    def parts(self, count: int) -> Iterator[tuple[slice, Any, Any]]:
        """(samples, their inputs) of so many parts of the batch; one where it cannot be cut."""
        leaves = [t for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]
        size = self.samples or 0
        can = self.generator is None and all(len(c) == size for c in self.cut)
        can = can and all(t.dim() and len(t) == size for t in leaves)
        step = -(-size // count) if can and size else max(size, 1)
        for first in range(0, max(size, 1), step):
            here = slice(first, min(first + step, size))
            if step >= size:
                yield slice(None), self.args, self.kwargs
                continue
            flat, spec = pytree.tree_flatten((self.args, self.kwargs))
            flat = [t[here] if isinstance(t, Tensor) else t for t in flat]
            yield here, *pytree.tree_unflatten(flat, spec)


def rows(tensors: list[Tensor]) -> Tensor:
    """Outputs `[1, B, ...]` as one number each, `[B, outputs]`, in float32 at least."""
    wide = [t[0].flatten(1).to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return wide[0] if len(wide) == 1 else torch.cat(wide, 1)


def parameters_of(layer: Layer) -> list[tuple[Any, str, HeadParameter]]:
    """(module, local name, what belongs to it) of all weights that a layer answers for."""
    return [(layer.module, local, head) for local, head in layer.head.items()] + layer.swaps


def is_float(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def floats(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]


@dataclass
class Order:
    """At which of its ends a step is done with a weight: known from the first noisy pass on, so
    that later ones move weights at once and let go of each graph as soon as they can."""

    last: dict[str, int] = field(default_factory=dict)
    known: bool = False

    def note(self, names: list[str], end: int) -> None:
        if not self.known:
            self.last |= dict.fromkeys(names, end)
        elif any(end > self.last.get(name, -1) for name in names):
            raise RuntimeError(
                f"{names[0]!r} is read in another order than in the first step: learnt feedback "
                "needs the same order of layers in every step"
            )


class Listener:
    """What stands between a layer of the head and its module while a pass runs.

    Attributes:
        around: names of layers that have other layers of the head, or the tail, inside of them.
    """

    def __init__(self, around: set[str]) -> None:
        self.around = around
        self.calls: Counter[str] = Counter()

    def __call__(
        self, current: Pass, layer: Layer, run: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        raise NotImplementedError

    def next_call(self, layer: Layer) -> Call:
        self.calls[layer.name] += 1
        return layer.name, self.calls[layer.name] - 1


class Clean(Listener):
    """Hears who runs, and makes the output of the last layer a leaf.

    Attributes:
        wanted: the call that was the last one in the first forward; None while that is not known.
        last: the one that was the last now.
        outer: weights of modules around as leaves: what comes after the last layer is exact.
    """

    def __init__(self, around: set[str], wanted: Call | None) -> None:
        super().__init__(around)
        self.wanted, self.last = wanted, cast(Call | None, None)
        self.cut: list[Tensor] = []
        self.outer: Leaves = []

    def __call__(
        self, current: Pass, layer: Layer, run: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if layer.name in self.around:
            with opened(current, layer) as leaves:
                self.outer += leaves
                return run(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        output = run(*args, **kwargs)
        self.last = self.next_call(layer)
        if self.last != self.wanted:
            return output
        flat, spec = pytree.tree_flatten(output)
        flat = [t.detach().requires_grad_() if is_float(t) else t for t in flat]
        self.cut = floats(flat)
        return pytree.tree_unflatten(flat, spec)


@contextmanager
def opened(current: Pass, layer: Layer) -> Iterator[Leaves]:
    """The weights of a layer as leaves while it reads them."""
    put_back, leaves = [], []
    for module, local, head in parameters_of(layer):
        p = module._parameters[local]
        # Of its data: a weight that moves leaves what other segments have saved of it usable.
        with current.unwatched():
            leaf = p.data.requires_grad_(head.scale != 0.0)
        module._parameters[local] = leaf
        if current.watch is not None:
            current.watch.swap(leaf, head, head.name in current.watch.consumed)
        current.swapped.add((id(module), local))
        put_back.append((module, local, p))
        if head.scale != 0.0:
            leaves.append((head.name, leaf))
    try:
        yield leaves
    finally:
        for module, local, p in put_back:
            module._parameters[local] = p
            current.swapped.discard((id(module), local))
        for module in {m for m, *_ in put_back if isinstance(m, torch.nn.RNNBase)}:
            module._init_flat_weights()
