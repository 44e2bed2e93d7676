"""An `nn.Sequential` of the pair: a layer's kernel may apply the ReLU and the pooling behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from elasticzo.forward.layers.registry import runs_torch_s
from elasticzo.forward.passes import Follow, Layer, Pass


def run_sequence(
    current: Pass, layer: Layer, forward: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """What `nn.Sequential.forward` computes; modules that a kernel took along are passed over."""
    # Not children(): a module may stand there twice.
    modules = [m for m in layer.module._modules.values() if m is not None]
    x, i = args[0] if args else kwargs["input"], 0
    while i < len(modules):
        current.follow = follow = _what_follows(modules, i)
        x = modules[i](x)
        current.follow = None
        i += 1 + (follow.modules if follow is not None and follow.done else 0)
    return x


def is_sequential(module: nn.Module) -> bool:
    """Whether its forward is known to run its modules one after the other."""
    kind = type(module)
    known = runs_torch_s(module) and kind.forward is nn.Sequential.forward
    return known and getattr(kind, "__iter__", None) is nn.Sequential.__iter__


def _what_follows(modules: Sequence[nn.Module], i: int) -> Follow | None:
    """ReLU, or ReLU and 2x2 max-pooling, behind module i; a hook must see what it asked for."""
    rest = modules[i + 1 : i + 3]
    if not rest or type(rest[0]) is not nn.ReLU or _observed(modules[i]) or _observed(rest[0]):
        return None
    pool = len(rest) > 1 and _is_pool(rest[1]) and type(modules[i]) is nn.Conv2d
    pool = pool and not _observed(rest[1])
    return Follow(modules[i], relu=True, pool=pool, modules=1 + pool)


def _observed(m: nn.Module) -> bool:
    hooks = (m._forward_hooks, m._forward_pre_hooks)
    everywhere = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    if type(m) in (nn.ReLU, nn.MaxPool2d) and not runs_torch_s(m):
        return True  # someone's own forward
    return any(hooks) or any(everywhere)


def _is_pool(m: nn.Module) -> bool:
    if type(m) is not nn.MaxPool2d or m.return_indices or m.ceil_mode:
        return False
    settings = (m.kernel_size, m.stride, m.padding, m.dilation)
    pairs = [value if isinstance(value, tuple) else (value, value) for value in settings]
    return pairs == [(2, 2), (2, 2), (0, 0), (1, 1)]
