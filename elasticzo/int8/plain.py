"""A float layer is converted by its weight and settings alone: whatever else it does is refused."""

from __future__ import annotations

from inspect import isfunction

from torch import nn

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
METHODS = ("forward", "_conv_forward", "__iter__")  # what a forward is made of
REMEDIES = (
    "prune.remove, remove_weight_norm, remove_spectral_norm or parametrize.remove_parametrizations"
)


def check_plain(name: str, module: nn.Module) -> None:
    """Raise where a module of a known type does not compute what that type does.

    Raises: ValueError for weights that are computed or no parameters (pruning, weight_norm) or have
        no values, hooks, and methods that were replaced on the instance or its class.
    """
    called = f"{name or 'the model'!r} ({type(module).__name__})"
    for local in _lost(module):
        raise ValueError(
            f"the {local} of {called} must be a parameter, but it is computed or was replaced; "
            f"make it one first ({REMEDIES})"
        )
    for local, t in (*module._parameters.items(), *module._buffers.items()):
        if t is not None and t.is_meta:
            raise ValueError(f"the {local} of {called} is on 'meta' and has no values to convert")
    for hooks in HOOKS:
        if getattr(module, hooks):
            kind = hooks.strip("_").replace("_", " ")
            raise ValueError(
                f"{called} has {kind}, which an int8 network does not run: remove them before "
                "converting"
            )
    for method in _replaced(module):
        raise ValueError(
            f"{called} has another {method} than its class came with, which an int8 network does "
            "not run: put the original back before converting"
        )


def _lost(module: nn.Module) -> list[str]:
    """Parameters of the constructor that are none any more."""
    return [
        local
        for local in ("weight", "bias")
        if local not in module._parameters and getattr(module, local, None) is not None
    ]


def _replaced(module: nn.Module) -> list[str]:
    """Methods that are not those of the module's class as its own file defines it."""
    kind = type(module)
    found = [name for name in module.__dict__ if isfunction(getattr(kind, name, None))]
    for name in METHODS:
        base = next((b for b in kind.__mro__ if name in b.__dict__), None)
        method = base and base.__dict__[name]
        # A patch is written elsewhere, or says that it wraps what was there.
        if base and (hasattr(method, "__wrapped__") or method.__module__ != base.__module__):
            found.append(name)
    return found
