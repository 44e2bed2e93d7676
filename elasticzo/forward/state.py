"""What a model holds besides weights while it runs forward: buffers, torch's generator, attributes.

A module may keep what it likes in attributes (a counter, a hidden state, the last attention). Those
that a forward changes are put back before the next half, as buffers are.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elasticzo.buffers import (
    BufferSnapshot,
    all_buffers,
    generator_state,
    has_values,
    set_generator_state,
)
from elasticzo.forward.draws import Draws, alone

Place = tuple[nn.Module, str]  # an attribute of a module
# What torch keeps there, and takes care of.
OWN = {*nn.Module().__dict__, "forward", "_flat_weights", "_flat_weight_refs"}
NOTHING = object()


class Attributes:
    """Values of attributes, those of tensors and containers inside included, and the generators of
    Python and numpy.

    Args:
        places: which; of all that these modules have, None.
        draws: whether the generators are looked at.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        places: Sequence[Place] | None = None,
        draws: bool = True,
    ) -> None:
        self._draws = _generators() if draws else None
        self._modules = list(modules)
        self._whole = places is None
        places = self._all() if places is None else places
        self.saved = [(m, name, _Value(m.__dict__.get(name, NOTHING))) for m, name in places]

    def _all(self) -> list[Place]:
        return [(m, n) for m in self._modules for n in m.__dict__ if n not in OWN]

    def _came(self) -> list[Place]:
        if not self._whole:
            return []
        known = {(id(m), name) for m, name, _ in self.saved}
        return [(m, name) for m, name in self._all() if (id(m), name) not in known]

    def drew(self) -> bool:
        """Whether something drew from the generators of Python or numpy."""
        return self._draws is not None and not _same_draws(self._draws, _generators())

    def moved(self) -> list[Place]:
        """Attributes that changed since, or came."""
        changed = [(m, n) for m, n, old in self.saved if old.changed(m.__dict__.get(n, NOTHING))]
        return changed + self._came()

    def restore(self) -> None:
        if self._draws is not None and self.drew():
            random.setstate(self._draws[0])
            np.random.set_state(self._draws[1])
        for module, name in self._came():
            del module.__dict__[name]
        for module, name, old in self.saved:
            old.restore()
            if old.value is not NOTHING:
                module.__dict__[name] = old.value
            else:
                module.__dict__.pop(name, None)


def _generators() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()


def _same_draws(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    same = a[0] == b[0] and a[1][2:] == b[1][2:]
    return same and bool((a[1][1] == b[1][1]).all())


class _Value:
    """A value, and copies of what can be written to inside of it."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.inside: list[tuple[Any, Any, int]] = []
        self._look(value, set())

    def _look(self, value: Any, seen: set[int]) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, nn.Parameter):
            return  # nothing that a forward writes to
        if isinstance(value, Tensor):
            version = 0 if value.is_inference() else value._version
            self.inside.append((value, value.detach().clone(), version))
        elif isinstance(value, torch.Generator):
            self.inside.append((value, value.get_state(), 0))
        elif isinstance(value, (list, dict, set, deque)):
            self.inside.append((value, value.copy(), 0))
            for one in value.values() if isinstance(value, dict) else value:
                self._look(one, seen)
        elif isinstance(value, tuple):
            for one in value:
                self._look(one, seen)

    def changed(self, now: Any) -> bool:
        if now is not self.value and not _same_plain(now, self.value):
            return True
        return any(_differs(*one) for one in self.inside)

    def restore(self) -> None:
        with torch.no_grad():
            for value, copy, version in self.inside:
                if _differs(value, copy, version):
                    _write(value, copy)

    @property
    def holds_tensors(self) -> bool:
        return any(isinstance(value, Tensor) for value, *_ in self.inside)


def holds_tensors(places: Iterable[Place]) -> bool:
    """Whether there are tensors in attributes."""
    return any(_Value(m.__dict__.get(name)).holds_tensors for m, name in places)


def _same_plain(a: Any, b: Any) -> bool:
    plain = (bool, int, float, complex, str, bytes, torch.Size)
    return type(a) is type(b) and isinstance(a, plain) and a == b


def _differs(value: Any, copy: Any, version: int) -> bool:
    if isinstance(value, Tensor):
        if value.shape != copy.shape or (not value.is_inference() and value._version != version):
            return True
        return has_values(value) and not torch.equal(value, copy)
    if isinstance(value, torch.Generator):
        return not torch.equal(value.get_state(), copy)
    if isinstance(value, dict):
        items = zip(value.items(), copy.items(), strict=False)
        return len(value) != len(copy) or any(a != b or v is not w for (a, v), (b, w) in items)
    if isinstance(value, set):
        return bool(value != copy)
    return len(value) != len(copy) or any(a is not b for a, b in zip(value, copy, strict=False))


def _write(value: Any, copy: Any) -> None:
    if isinstance(value, Tensor) and value.shape == copy.shape:
        value.detach().copy_(copy)
    elif isinstance(value, Tensor):
        value.data = copy.clone()
    elif isinstance(value, torch.Generator):
        value.set_state(copy)
    else:
        value.clear()
        (value.update if isinstance(value, (dict, set)) else value.extend)(copy)


class Start:
    """Where a forward starts from, so that it can start again.

    Args:
        noticed: beside other threads, what was seen of the draws since.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, noticed: Callable[[], Draws | None]
    ) -> None:
        self.model, self.device, self._noticed = model, device, noticed
        self.buffers = BufferSnapshot(all_buffers(model))
        self.attributes = Attributes(model.modules())
        self.generator = generator_state(device)

    def restore(self) -> None:
        self.attributes.restore()
        self.buffers.restore()
        self.rewind()

    def rewind(self) -> None:
        """The generator alone; where another thread may draw, only what this one drew."""
        draws = self._noticed()
        if draws is not None and draws.alone_moved():
            draws.rewind(self.generator)
        elif alone():
            set_generator_state(self.device, self.generator)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Forwards in here start where this one did; afterwards all is as it left it."""
        after = Start(self.model, self.device, self._noticed)
        self.restore()
        try:
            yield
        finally:
            after.restore()
