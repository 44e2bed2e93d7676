"""Which function serves which kind of module while the points of a forward run stacked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elasticzo.forward.halves import NotByHalf
from elasticzo.forward.passes import Layer, Pass
from elasticzo.head import Kind

Serve = Callable[[Pass, Layer, Any], Tensor]


@dataclass(frozen=True)
class Handler:
    """How a kind of module takes part.

    Attributes:
        run: gives of a stacked input `[n B, ...]` the outputs of all points that run now.
        always: whether it does so where no weight of its own is perturbed, too.
        subclasses: whether what derives from the kind is served as well.
        kinds: whose noise its weights are learnt by, where that is not what is asked for.
    """

    run: Serve
    always: bool
    subclasses: bool
    kinds: Mapping[str, Kind]

    def kind_of(self, asked: str) -> Kind:
        """By whose noise its weights are learnt where this is asked for."""
        return self.kinds.get(asked, Kind(asked))

    def __call__(
        self, current: Pass, layer: Layer, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Tensor:
        """What runs instead of a module's forward."""
        x = args[0] if args else next(iter(kwargs.values()))  # torch calls it input, or x
        n = current.count
        if n > 1 and (x.dim() == 0 or x.shape[0] % n):
            raise NotByHalf(layer)
        if current.parts is not None:
            current.note_read(layer.name, x)
        return self.run(current, layer, x)


TORCH = Path(nn.__file__).parent  # where the forwards of torch's own modules are written
_HANDLERS: dict[type[nn.Module], Handler] = {}


def serves(
    *modules: type[nn.Module],
    always: bool = False,
    subclasses: bool = False,
    kinds: Mapping[str, Kind] | None = None,
) -> Callable[[Serve], Serve]:
    """Let a function `(current, layer, x)` serve these kinds of modules; see `Handler`."""

    def register(run: Serve) -> Serve:
        _HANDLERS.update(dict.fromkeys(modules, Handler(run, always, subclasses, kinds or {})))
        return run

    return register


def runs_torch_s(module: nn.Module) -> bool:
    """Whether its forward is the one that torch wrote: neither a subclass's own, nor patched on the
    instance or the class."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    code = getattr(type(module).forward, "__code__", None)
    return "forward" not in module.__dict__ and code is not None and _of_torch(code.co_filename)


@cache
def _of_torch(file: str) -> bool:
    return Path(file).is_relative_to(TORCH)


def handler_of(module: nn.Module) -> Handler | None:
    """What serves a module, None where nothing does, or where its forward is someone else's."""
    if not runs_torch_s(module):
        return None
    found = _HANDLERS.get(type(module))
    if found is not None:
        return found
    derived = (h for kind, h in _HANDLERS.items() if h.subclasses and isinstance(module, kind))
    return next(derived, None)
