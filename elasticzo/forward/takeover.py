"""Layers stand in for themselves while a pass runs; afterwards the model is what it was.

In a forward that nothing watches, the weights of the head are locked for everyone but their layer:
where something else reads one, or a layer runs that never did, it is `OtherPath`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elasticzo.forward.layers.sequence import run_sequence
from elasticzo.forward.listening import Listener, parameters_of
from elasticzo.forward.passes import Layer, Pass
from elasticzo.forward.watch import asks
from elasticzo.head import Head

PATCHED = (
    "the forward of {!r} is another one than when the model was wrapped: patch it before, and wrap "
    "the model again"
)


class OtherPath(Exception):
    """This forward takes another path than those that were watched."""


class Locked(Tensor):
    """Stands where a weight does: it tells what the weight is, and nothing of its values."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not asks(func):
            raise OtherPath
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Locks:
    """A locked stand-in for every weight of the head, wherever it lives; a copy makes its own."""

    def __init__(self) -> None:
        # By layer: (parameters of a module, local name, weight, stand-in) that it may read.
        self._of: dict[str, list[tuple[dict[str, Any], str, Any, Locked]]] = {}
        # As `_of`, and the address of the weight.
        self._all: list[tuple[dict[str, Any], str, Any, Locked, int]] = []

    def __reduce__(self) -> Any:
        return Locks, ()

    @contextmanager
    def closed(
        self, current: Pass, head: Head, model: nn.Module, layers: Mapping[str, Layer]
    ) -> Iterator[None]:
        """All weights locked, for one pass."""
        if not self._current():
            self._make(head, model, layers)
        current.locks = self._of
        try:
            for place, local, _, locked, _ in self._all:
                place[local] = locked
            yield
        finally:
            for place, local, p, _, _ in self._all:
                place[local] = p

    def _current(self) -> bool:
        """Whether the weights are where they were, so that no old memory is kept."""
        return bool(self._all) and all(
            p.data_ptr() == at and place.get(local) is p for place, local, p, _, at in self._all
        )

    def _make(self, head: Head, model: nn.Module, layers: Mapping[str, Layer]) -> None:
        mine = {id(p) for _, p in head}
        made: dict[int, Locked] = {}
        self._all, places = [], {}
        for module in model.modules():
            of: dict[str, Any] = module._parameters
            for local, p in of.items():
                if p is None or id(p) not in mine or type(p) not in (nn.Parameter, Tensor):
                    continue  # of a subclass (without memory, say) there is no plain view
                if id(p) not in made:
                    made[id(p)] = p.detach().as_subclass(Locked)
                place = (of, local, p, made[id(p)])
                places[id(module), local] = place
                self._all.append((*place, p.data_ptr()))
        self._of = {}
        for name, layer in layers.items():
            at = [(id(module), local) for module, local, _ in parameters_of(layer)]
            self._of[name] = [places[one] for one in at if one in places]


@contextmanager
def taken_over(
    layers: Iterable[Layer], tail: Mapping[str, nn.Module], current: Pass, compiled: bool
) -> Iterator[None]:
    """Take over the forwards of layers, and before a listener of the tail's modules, for one pass.

    Where the model around them is compiled, they are marked as not to be traced.
    Raises: RuntimeError where a forward was patched since the plan was made.
    """
    call = _call_untraced if compiled else _call
    patched: list[tuple[nn.Module, Any]] = []
    with ExitStack() as stack:
        stack.callback(_hand_back, patched)
        for layer in layers:
            module = layer.module
            own = module.__dict__.get("forward")
            if layer.changed(own):
                raise RuntimeError(PATCHED.format(layer.name or "the model itself"))
            if layer.call is run_sequence and (compiled or current.watch is not None):
                continue  # nothing to be traced around, or watched
            patched.append((module, own))
            module.__dict__["forward"] = partial(call, current, layer, module.forward)
        for name, module in tail.items():
            patched.append((module, module.__dict__.get("forward")))
            run = partial(_call_tail, current.listener, name, module.forward)
            module.__dict__["forward"] = run
        yield


def _hand_back(patched: Sequence[tuple[nn.Module, Any]]) -> None:
    for module, before in reversed(patched):
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before


def _call(
    current: Pass, layer: Layer, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """What a layer's module runs instead of its own forward."""
    if layer.call is run_sequence:
        return run_sequence(current, layer, forward, args, kwargs)
    current.ran.add(layer.name)
    if current.known is not None and layer.name not in current.known:
        raise OtherPath  # before it moves statistics
    locks = current.locks.get(layer.name, ())
    opened = [one for one in locks if one[0][one[1]] is one[3]]
    for place, local, p, _ in opened:
        place[local] = p
    try:
        return _serve(current, layer, forward, args, kwargs)
    finally:
        for place, local, p, locked in opened:
            if place[local] is p:
                place[local] = locked


def _serve(current: Pass, layer: Layer, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if current.listener is None or not (layer.head or layer.swaps):
        return layer.call(current, layer, forward, args, kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        return layer.call(current, layer, forward, args, kwargs)

    return current.listener.layer(current, layer, run, args, kwargs)


def _call_tail(listener: Listener, name: str, run: Any, *args: Any, **kwargs: Any) -> Any:
    return listener.tail(name, run, args, kwargs)


_call_untraced: Callable[..., Any] = torch.compiler.disable(_call)  # type: ignore[no-untyped-call]
