"""Who froze what: a wrapper freezes the parameters of its head, and `unwrap` gives them back.

What is frozen is noted by name in the modules that have the parameters, in plain Python: copies,
pickles, averaged models and assigned states have it too, and it outlives the wrapper.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from elasticzo.head import Head
from elasticzo.module import ZOModule
from elasticzo.session import flush_others

NOTE = "_elasticzo_frozen"  # of a module: {name of its own parameter: tenure of the wrapper}


def check_free(model: nn.Module) -> None:
    """Raise ValueError for a model that a wrapper has already, or that has one inside."""
    for name, module in model.named_modules():
        if isinstance(module, ZOModule):
            raise ValueError(
                f"model must be free of wrappers: {name or 'the model'!r} is one "
                f"({type(module).__name__}); give the model that it wraps, wrapper.unwrap()"
            )
    frozen = [f"{name}.{own}" if name else own for name, _, own in _frozen(model)]
    if frozen:
        raise ValueError(
            f"parameters of the model ({', '.join(frozen[:3])}{', ...' if frozen[3:] else ''}) are "
            "frozen by a wrapper around it, or around the one that it was copied from: call "
            "elasticzo.unwrap(model) first, and freeze after it what is to stay frozen"
        )


def freeze(model: nn.Module, head: Head) -> dict[str, bool]:
    """Freeze a head, and note it; returns the wrapper's tenure, for `check_held`."""
    tenure = {"held": True}
    mine = {id(p) for _, p in head.named()}
    for module in model.modules():
        own = {name: tenure for name, p in module._parameters.items() if id(p) in mine}
        if own:
            module.__dict__[NOTE] = own
    for _, p in head.named():
        p.requires_grad_(False)
    return tenure


def check_held(tenure: dict[str, bool]) -> None:
    """Raise RuntimeError where a wrapper trains what it gave back."""
    if not tenure["held"]:
        raise RuntimeError(
            "the model was unwrapped: this wrapper trains it no more; wrap the model again"
        )


def unwrap(model: Any) -> Any:
    """The model without its wrapper: what was frozen by it requires gradients again.

    An update that waits is applied. The wrapper refuses to train from then on. A copy of a wrapped
    model (`copy.deepcopy`, `AveragedModel`, a pickle) is a model of its own.

    Args:
        model: an `ElasticZO`, a model that one wraps or wrapped, or a copy of such a model; of one
            that was never wrapped nothing changes.
    Returns: the module; what was frozen before it was wrapped is so still.
    Raises: TypeError for what is no module, or has no float model.

    >>> from elasticzo import ElasticZO
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    >>> unwrap(ElasticZO(net, tail=1)) is net, net[0].weight.requires_grad
    (True, True)
    """
    if not isinstance(model, nn.Module) or (isinstance(model, ZOModule) and model.integer):
        raise TypeError(f"model must be a module or an ElasticZO, got {type(model).__name__}")
    if isinstance(model, ZOModule):
        model.flush()
        model.forget_forwards()
        model = model.get_submodule("module")
    flush_others(model)
    for _, module, own in list(_frozen(model)):
        module.__dict__[NOTE][own]["held"] = False
        p = module._parameters.get(own)
        if p is not None:
            p.requires_grad_(True)
    for module in model.modules():
        module.__dict__.pop(NOTE, None)
    return model


def _frozen(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name of a module, it, its own parameter) of all that is noted."""
    for name, module in model.named_modules():
        for own in module.__dict__.get(NOTE, ()):
            yield name, module, own
