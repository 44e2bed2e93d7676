"""Who draws from torch's generator while a forward runs: the model, or another thread.

All threads of a process share that generator. Alone, a forward that moved it has drawn from it.
Beside other threads (loaders that augment) its own draws are seen as they are dispatched, which is
by thread; and nothing is rewound that another one moved.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elasticzo.buffers import generator_state, set_generator_state

DRAWS = (
    "the model draws from torch's generator outside nn.Dropout; its halves run one after the other "
    "from the same generator state"
)
SHARED = (
    "the model draws from torch's generator outside nn.Dropout, and another thread drew from it "
    "meanwhile: the halves need the same numbers, and that thread's would come again; give the "
    "thread a torch.Generator of its own, or use nn.Dropout in the model"
)


def alone() -> bool:
    """Whether no other thread may draw."""
    return threading.active_count() == 1


class Draws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees what this thread draws from torch's generator, whatever others do.

    Attributes:
        seen: whether it drew.
        shared: whether the generator had moved since this thread last left it.
    """

    passive = True  # kernels of this library draw nothing from it

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Forget what was seen."""
        self.seen = self.shared = False
        self.last = generator_state(self.device)
        self.first: list[int] | None = None  # hashes of the states that the first half left
        self.states: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not draws(func, args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        self.seen = True
        self.shared |= not torch.equal(generator_state(self.device), self.last)
        result = func(*args, **(kwargs or {}))
        self.last = generator_state(self.device)
        self.states.append(hash(self.last.numpy().tobytes()))
        return result

    def end_half(self) -> None:
        """Raise RuntimeError where a half that drew had not the numbers of the first one, or what
        comes next would rewind another thread."""
        self.first = self.states if self.first is None else self.first
        if self.seen and (self.shared or self.first != self.states):
            raise RuntimeError(SHARED)
        self.states = []

    def alone_moved(self) -> bool:
        """Whether this thread drew, and none but it."""
        mine = self.seen and not self.shared
        return mine and torch.equal(generator_state(self.device), self.last)

    def rewind(self, state: Tensor) -> None:
        """Back to this state, where this thread drew."""
        if not self.seen:
            return
        if not torch.equal(generator_state(self.device), self.last):
            raise RuntimeError(SHARED)
        set_generator_state(self.device, state)
        self.last = state


@contextmanager
def noticing(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Tells whether this thread has drawn since."""
    if alone():
        before = generator_state(device)
        yield lambda: not torch.equal(before, generator_state(device))
        return
    with Draws(device) as draws:
        yield lambda: draws.seen


@contextmanager
def from_state(device: torch.device, state: Tensor | None) -> Iterator[None]:
    """Inside, torch's generator goes on from this state, if any; afterwards it is where it was.

    Raises: RuntimeError where another thread drew from it meanwhile.
    """
    if state is None:
        yield
        return
    before = generator_state(device)
    set_generator_state(device, state)
    if alone():
        try:
            yield
        finally:
            set_generator_state(device, before)
        return
    with Draws(device) as draws:
        yield
    draws.end_half()
    draws.rewind(before)


def put_back(device: torch.device, state: Tensor) -> None:
    """After a look at the model: what it drew is not to be missed later. Beside other threads it
    is, since they may have drawn, too."""
    if alone():
        set_generator_state(device, state)


@cache
def _defaults(func: Any) -> dict[str, Any] | None:
    """Arguments of an operator that may draw, in their order; None of others."""
    found = {a.name: a.default_value for a in func._schema.arguments}
    tagged = torch.Tag.nondeterministic_seeded in func.tags
    return found if tagged or "generator" in found else None


def draws(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call of an operator draws from the generator that all share: attention and
    recurrent ones may without dropout, too."""
    given = _defaults(func)
    if given is None:
        return False
    given = given | dict(zip(given, args, strict=False)) | kwargs
    if given.get("generator") is not None:
        return False
    if any(given.get(name) is False for name in ("train", "training")):
        return False
    return all(given.get(name) != 0.0 for name in ("dropout_p", "dropout"))
