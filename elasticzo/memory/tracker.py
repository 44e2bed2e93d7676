"""Bytes that a computation holds at once, counted while it runs on tensors without memory.

Under torch's FakeTensorMode every op makes tensors of the right shape, dtype and device and
computes nothing. A dispatch mode sees each storage come, and a weak reference tells when it goes:
what autograd saves, gradients and scratch count because the code keeps them, not by a formula.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from elasticzo.forward.draws import draws
from elasticzo.memory.recurrent import LSTM, LSTM_OPS, lstm_inside
from elasticzo.memory.scratch import SCRATCH_OPS, copies_inside, peak_inside

CUDA_BLOCK = 512  # bytes: the caching allocator rounds up to it
OTHER = "activations"  # what nobody labelled: outputs, what autograd saved, temporaries
HALVES = ("zo_kernels::perturbed_weights", "zo_kernels::stage_")  # ops that write W+ and W-


@dataclass
class Peak:
    """The most bytes held at once, of what they are made, and during which op.

    Attributes:
        parts: bytes by kind: weights, inputs, halves (staged W+ and W-), activations (what autograd
            saved and temporaries), gradients, optimizer, scratch (inside of an op of a library).
    """

    bytes: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)
    at: str = ""


class Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages of one device while it is entered, on top of a FakeTensorMode.

    Ops on real tensors alone (the state of a generator) run as they are; an op that draws from
    torch's generator moves it, so that a model that draws is seen to.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.held = 0
        self.peak = Peak()
        self._known: dict[int, tuple[Any, int, str]] = {}  # by address: reference, bytes, label
        self._by_label: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if leaves and not any(isinstance(t, FakeTensor) for t in leaves):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if self.device.type == "cpu" and func in SCRATCH_OPS:
            with unset_fake_temporarily():
                self._reach(str(func), peak_inside(func, args, kwargs))
        workspace = 0
        if self.device.type == "cpu" and func in LSTM_OPS:
            with unset_fake_temporarily():
                inside, workspace = lstm_inside(func, args)
            self._reach(str(func), inside)
        result = func(*args, **kwargs)
        if func is LSTM:
            result = (*result[:3], torch.empty(workspace, dtype=torch.uint8, device="cpu"))
        copies = copies_inside(func, args) if self.device.type == "cpu" else 0
        if draws(func, args, kwargs):
            with unset_fake_temporarily():
                torch.rand((), device=self.device)
        self.note(result, at=str(func))
        self._reach(str(func), copies)
        if func.name() in HALVES:
            self.note((result, args[0] if result is None else ()), "halves")
        return result

    def note(self, tree: Any, label: str | None = None, at: str = "") -> None:
        """Count the storages of these tensors, or give another label to those that are known."""
        for t in pytree.tree_leaves(tree):
            if not isinstance(t, Tensor) or t.layout != torch.strided or t.device != self.device:
                continue
            storage = t.untyped_storage()
            place = storage._cdata
            if place not in self._known:
                size = storage.nbytes()
                if self.device.type == "cuda":
                    size = -(-size // CUDA_BLOCK) * CUDA_BLOCK
                reference = weakref.ref(storage, partial(_drop, weakref.ref(self), place))
                self._known[place] = (reference, size, label or OTHER)
                self._by_label[label or OTHER] += size
                self.held += size
            elif label is not None:
                reference, size, before = self._known[place]
                self._known[place] = (reference, size, label)
                self._by_label[before] -= size
                self._by_label[label] += size
        self._reach(at, 0)

    def _reach(self, at: str, inside: int) -> None:
        """Take note of a moment, `inside` bytes above what is held."""
        if self.held + inside > self.peak.bytes:
            parts = {k: n for k, n in self._by_label.items() if n}
            if inside:
                parts["scratch"] = inside
            self.peak = Peak(self.held + inside, parts, at)

    def restart(self) -> Peak:
        """The peak so far; from now on another is looked for."""
        found, self.peak = self.peak, Peak()
        self._reach("", 0)
        return found


def _drop(tracker: Any, place: int, _: Any) -> None:
    """A storage is gone."""
    mine = tracker()
    if mine is not None:
        _, size, label = mine._known.pop(place)
        mine.held -= size
        mine._by_label[label] -= size


@contextmanager
def tracked(device: torch.device) -> Iterator[tuple[Tracker, FakeTensorMode]]:
    """Tensors made inside have no memory, and are counted; torch's generator stays as it was."""
    cuda = [device] if device.type == "cuda" else []
    tracker, fake = Tracker(device), FakeTensorMode(allow_non_fake_inputs=True)
    with torch.random.fork_rng(devices=cuda), fake, tracker:
        yield tracker, fake
