"""The clean pass of learnt feedback, which is heard, and what both passes share.

Where the head ends, in front of the tail's modules and at the network's outputs, its activations
become leaves: so the tail's backward leaves the exact gradient there, and that of the loss by the
outputs. Nothing of what comes before is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from elasticzo.buffers import generator_state
from elasticzo.feedback import Feedback
from elasticzo.forward.passes import Layer, Pass
from elasticzo.head import HeadParameter

Entry = tuple[str, int, int]  # a module, which of its calls, which of its inputs
Leaves = list[tuple[str, Tensor]]  # weights by name


@dataclass
class Heard:
    """What a clean pass leaves for the noisy one.

    Attributes:
        args, kwargs: the inputs, which are the user's own. versions: theirs and the outputs'.
        generator: where the model draws from torch's, its state before the pass.
        modes: `training` of every module.
        outputs: `[1, B, ...]`, by their places; their gradients will be there.
        cut: what the tail's modules read, likewise.
        outer: weights of modules around the cut as leaves: what comes behind it is exact.
        ends: the errors of what exact layers read, which the backward leaves here.
    """

    args: Any
    kwargs: Any
    versions: list[int]
    micro_batch: int
    first: int
    samples: int
    generator: Tensor | None
    autocast: torch.dtype | None
    modes: tuple[bool, ...]
    outputs: dict[int, Tensor]
    cut: dict[Entry, Tensor]
    outer: Leaves
    ends: dict[Entry, Tensor]

    def check(self, modules: list[nn.Module]) -> None:
        """Raise RuntimeError where the second pass would not be that of the first one's network."""
        if all(t.grad is None for t in self.outputs.values()):
            raise RuntimeError(
                "learnt feedback needs the gradient of the loss by the outputs: call "
                "model.backward(losses) on a loss that can be differentiated before zo.step(losses)"
            )
        if versions((self.args, self.kwargs, self.outputs)) != self.versions:
            raise RuntimeError(
                "an input or output was written to between the forward and zo.step, which runs the "
                "model once more: give each step's batch memory of its own"
            )
        if tuple(m.training for m in modules) != self.modes:
            raise RuntimeError(
                "the model was switched between train() and eval() between the forward and "
                "zo.step, which runs it once more"
            )

    def error(self) -> tuple[Tensor, Tensor]:
        """Outputs and the loss's gradient by them, `[B, outputs]` each."""
        outputs = list(self.outputs.values())
        errors = [torch.zeros_like(t) if t.grad is None else t.grad for t in outputs]
        return rows([t.detach() for t in outputs]), rows(errors)

    def parts(self, count: int) -> Iterator[tuple[slice, Any, Any]]:
        """(samples, their inputs) of so many parts of the batch; one where it cannot be cut."""
        flat, spec = pytree.tree_flatten((self.args, self.kwargs))
        inputs = [t for t in flat if isinstance(t, Tensor)]
        can = all(t.dim() and len(t) == self.samples for t in (*inputs, *self.cut.values()))
        step = self.samples
        if can and self.generator is None:
            step = -(-self.samples // count)
        for first in range(0, self.samples, step):
            here = slice(first, min(first + step, self.samples))
            if step == self.samples:
                yield slice(None), self.args, self.kwargs
                continue
            some = [t[here] if isinstance(t, Tensor) else t for t in flat]
            yield here, *pytree.tree_unflatten(some, spec)


def heard_of(
    current: Pass, args: Any, kwargs: Any, output: Any, generator: Tensor, modes: tuple[bool, ...]
) -> tuple[Any, Heard]:
    """The outputs of a clean pass, and what it leaves for the noisy one.

    Args:
        generator: the state of torch's before it.
    Raises: ValueError for outputs without the batch.
    """
    clean, device = current.listener, current.key.device
    if current.batch is None or any(t.shape[1:2] != (current.batch,) for t in floats(output)):
        shapes = [list(t.shape[1:]) for t in floats(output)]
        raise ValueError(
            f"learnt feedback needs outputs whose dimension 0 is the batch ({current.batch}), "
            f"got shapes {shapes}"
        )
    output, outputs = clean.outputs(output)
    draws = current.draws
    drew = draws.seen if draws else not torch.equal(generator, generator_state(device))
    on = torch.is_autocast_enabled(device.type)
    return output, Heard(
        args=args,
        kwargs=kwargs,
        versions=versions((args, kwargs, outputs)),
        micro_batch=current.micro_batch,
        first=current.first,
        samples=current.batch,
        generator=generator if drew else None,
        autocast=torch.get_autocast_dtype(device.type) if on else None,
        modes=modes,
        outputs=outputs,
        **clean.left(),
    )


def versions(tree: Any) -> list[int]:
    """How often each tensor was written to; what inference mode made cannot tell."""
    tensors = [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]
    return [t._version for t in tensors if not t.is_inference()]


def rows(tensors: list[Tensor]) -> Tensor:
    """Outputs `[1, B, ...]` as one number each, `[B, outputs]`, in float32 at least."""
    wide = [t[0].to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    wide = [t.reshape(len(t), -1) for t in wide]
    return wide[0] if len(wide) == 1 else torch.cat(wide, 1)


def parameters_of(layer: Layer) -> list[tuple[Any, str, HeadParameter]]:
    """(module, local name, what belongs to it) of all weights that a layer answers for."""
    return [(layer.module, local, head) for local, head in layer.head.items()] + layer.swaps


def is_float(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def floats(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if is_float(t)]


def each_once(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


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


class Listener(ABC):
    """What stands before the layers of the head, and the modules of the tail, while a pass runs.

    Attributes:
        around: names of layers that have other layers of the head, or the tail, inside of them.
        replaced: tensors in whose place another is read, and that one, by id.
    """

    def __init__(self, around: set[str]) -> None:
        self.around = around
        self.replaced: dict[int, tuple[Any, Tensor]] = {}
        self.calls: Counter[str] = Counter()

    @abstractmethod
    def layer(
        self, current: Pass, layer: Layer, run: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """A layer of the head is called."""

    @abstractmethod
    def tail(self, name: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module of the tail is called."""

    @abstractmethod
    def instead(self, t: Any) -> Any:
        """What is read in place of a tensor from now on."""

    def next_call(self, name: str) -> int:
        self.calls[name] += 1
        return self.calls[name] - 1


class Clean(Listener):
    """Makes leaves where the head ends; see `Heard` for what it has then.

    Args:
        inputs: of the model, which have no error.
        settings: which layers the errors go on through.
    """

    def __init__(self, around: set[str], inputs: Any, settings: Feedback) -> None:
        super().__init__(around)
        self.settings = settings
        self.ends: dict[Entry, Tensor] = {}
        self._through = False
        self.cut: dict[Entry, Tensor] = {}
        self.outer: Leaves = []
        self._inputs = {id(t) for t in pytree.tree_leaves(inputs)}

    def layer(
        self, current: Pass, layer: Layer, run: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if layer.name in self.around:
            with opened(current, layer) as leaves:
                self.outer += leaves
                return run(*args, **kwargs)
        if self.settings.is_exact(layer.name) and layer.in_front:
            args, kwargs = self._into(layer.name, args, kwargs)
        else:
            args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        return run(*args, **kwargs)

    def _into(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The inputs of an exact layer, which will tell their errors."""
        call, done = self.next_call(name), dict[int, Tensor]()
        args, kwargs = pytree.tree_map(self.instead, (args, kwargs))
        for place, t in enumerate(each_once(floats((args, kwargs)))):
            if id(t) not in self._inputs:
                done[id(t)] = self._told((name, call, place), t)
        args, kwargs = pytree.tree_map(lambda t: done.get(id(t), t), (args, kwargs))
        return args, kwargs

    def _told(self, at: Entry, t: Tensor) -> Tensor:
        ends, self._through = self.ends, True

        def tell(error: Tensor) -> None:
            ends[at] = ends[at] + error if at in ends else error

        def take(leaf: Tensor) -> None:  # so that nothing holds the leaf itself
            assert leaf.grad is not None
            tell(leaf.grad)
            leaf.grad = None

        if t.requires_grad:
            t.register_hook(tell)  # type: ignore[no-untyped-call]
            return t
        leaf = t.detach().requires_grad_()
        leaf.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
        self.replaced[id(t)] = (t, leaf)
        return leaf

    def tail(self, name: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        call = self.next_call(name)
        flat, spec = pytree.tree_flatten((args, kwargs))
        for place, t in enumerate(flat):
            if is_float(t):
                flat[place] = self._end((name, call, place), self.instead(t))
        args, kwargs = pytree.tree_unflatten(flat, spec)
        return run(*args, **kwargs)

    def _end(self, at: Entry, t: Tensor) -> Tensor:
        if id(t) in self._inputs or (t.requires_grad and not (self.outer or self._through)):
            return t  # the tail's own, or a leaf already
        if t.requires_grad:  # of weights around the cut, or by way of exact layers
            t.retain_grad()
            self.cut[at] = t
            return t
        leaf = self.cut[at] = t.detach().requires_grad_()
        self.replaced[id(t)] = (t, leaf)
        return leaf

    def instead(self, t: Any) -> Any:
        return self.replaced[id(t)][1] if id(t) in self.replaced else t

    def left(self) -> dict[str, Any]:
        """What `Heard` has of it."""
        return {"cut": self.cut, "outer": self.outer, "ends": self.ends}

    def outputs(self, tree: Any) -> tuple[Any, dict[int, Tensor]]:
        """The outputs with leaves where no gradient would come to, and all of them by places."""
        flat, spec = pytree.tree_flatten(tree)
        flat = [
            t.detach().requires_grad_() if is_float(t) and not t.requires_grad else t for t in flat
        ]
        for t in floats(flat):
            t.retain_grad()
        return pytree.tree_unflatten(flat, spec), dict(enumerate(floats(flat)))


class Instead(TorchFunctionMode):
    """Functions of torch read what a listener has in place of their arguments."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self.listener = listener

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Every call of the forward comes by, few read such a tensor: look before rebuilding.
        if self.listener.replaced and self._reads_one((*args, *kwargs.values())):
            args, kwargs = pytree.tree_map(self.listener.instead, (args, kwargs))
        return func(*args, **kwargs)

    def _reads_one(self, values: Iterable[Any]) -> bool:
        for v in values:
            if isinstance(v, Tensor):
                if id(v) in self.listener.replaced:
                    return True
            elif isinstance(v, (list, tuple, dict)) and self._reads_one(
                v.values() if isinstance(v, dict) else v
            ):
                return True
        return False


def own_work() -> AbstractContextManager[None]:
    """What runs inside is no function of the model's: none of it is to be looked through."""
    return torch._C.DisableTorchFunction()  # of modes, too


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
