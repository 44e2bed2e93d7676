"""How a loss reduces, how it is told not to, and what its mean divides by: losses by sample."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

# Their mean divides by the weights of the targets that count; linear_cross_entropy: torch 2.13.
CLASSES = ("cross_entropy", "nll_loss", "linear_cross_entropy")
CLASS_LOSSES = tuple(getattr(F, name) for name in CLASSES if hasattr(F, name))
CLASS_MODULES = tuple(
    getattr(nn, name)
    for name in ("CrossEntropyLoss", "NLLLoss", "LinearCrossEntropyLoss")
    if hasattr(nn, name)
)
WEIGHTED = (F.mse_loss, F.l1_loss)  # by the sum of their weights, where there are any


def reduced(loss: Callable[..., Any], reduction: str) -> Callable[..., Any]:
    """`loss` that reduces so: a module's copy, a keyword of what takes it; others as they are.

    A copy shares hooks, weights and a forward that was set on the module.
    """
    if isinstance(loss, nn.Module) and "reduction" in vars(loss):
        twin = copy.copy(loss)
        vars(twin)["reduction"] = reduction
        own = vars(loss).get("forward")
        if isinstance(own, MethodType) and own.__self__ is loss:
            vars(twin)["forward"] = MethodType(own.__func__, twin)
        return twin
    if reduction not in ("mean", "none") or _takes(loss, "reduction"):
        return partial(loss, reduction=reduction)
    return loss


def _takes(loss: Callable[..., Any], keyword: str) -> bool:
    """Whether a loss has an argument of this name, or takes any."""
    try:
        arguments = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss)
    except (TypeError, ValueError):  # a builtin that does not say
        return False
    return any(
        p.kind is p.VAR_KEYWORD or (p.name == keyword and p.kind is not p.POSITIONAL_ONLY)
        for p in arguments.parameters.values()
    )


def sample_losses(
    loss: Callable[..., Any],
    samples: int,
    divisor: Tensor | int | None,
    output: Any,
    *targets: Any,
    **settings: Any,
) -> Tensor:
    """Losses `[B]` of one half: `l_i = B / D sum_j e_ij`, from the elements e `[B, ...]`.

    Args:
        loss: gives the elements, as `reduced(loss, "none")` does.
        samples: B.
        divisor: D as `mean_divisor` has it; None for the number of elements.
    Raises: ValueError where the loss gives something else than `[B, ...]`.
    """
    elements = loss(output, *targets, **settings)
    shape = list(elements.shape) if isinstance(elements, Tensor) else []
    if shape[:1] != [samples]:
        raise ValueError(
            f"{_name(loss)} must give losses of shape [{samples}, ...], of each of {samples} "
            f'samples, got shape {shape}: let it take reduction="none", or not reduce; only the '
            'directions "weight" and "rank1" can learn from one number a batch'
        )
    wide = elements.to(torch.promote_types(elements.dtype, torch.float32))
    if divisor is None:
        rows: Tensor = reduce(wide, "b ... -> b", "mean")
    else:
        rows = reduce(wide, "b ... -> b", "sum") * share(samples, divisor, wide.dtype)
    return rows.to(elements.dtype) if elements.is_floating_point() else rows


def share(samples: int, divisor: Tensor | int, dtype: torch.dtype) -> Tensor | float:
    """`B / D`, without a wait for the device."""
    return samples / (divisor.to(dtype) if isinstance(divisor, Tensor) else divisor)


def mean_divisor(
    loss: Callable[..., Any], samples: int, targets: tuple[Any, ...], settings: dict[str, Any]
) -> Tensor | int | None:
    """D, by which a loss divides the sum of its elements; None for the number of these.

    That of `mean`, or of what a module (or a partial) was made with: 1 for "sum", B for
    "batchmean". Classes as targets count by their weights, ignored ones not at all; classes given
    as probabilities count as elements, whatever the weights.

    Raises: ValueError for the CTC loss, which divides each sample by its own length.
    """
    function, given = _unwrapped(loss)
    settings = given | settings
    module = isinstance(function, nn.Module)
    own = vars(function).get("reduction") if module else given.get("reduction")
    if function is F.ctc_loss or isinstance(function, nn.CTCLoss):
        raise ValueError(
            "the CTC loss divides by the length of each target: give a loss of your own, of shape "
            f"[{samples}], that does"
        )
    if own in ("sum", "batchmean"):
        return 1 if own == "sum" else samples
    if isinstance(function, CLASS_MODULES):
        target = targets[0] if targets else settings.get("target")
        return _counted(target, function.weight, function.ignore_index)
    if not any(function is known for known in (*CLASS_LOSSES, *WEIGHTED)):
        return None
    named = inspect.signature(function).bind_partial(None, *targets, **settings).arguments
    weight = named.get("weight")
    if any(function is known for known in CLASS_LOSSES):
        return _counted(named.get("target"), weight, named.get("ignore_index"))
    return None if weight is None else weight.sum()


def _counted(target: Any, weight: Tensor | None, ignored: int | None) -> Tensor | None:
    """The weights of the targets that count, added: `[]`."""
    if not isinstance(target, Tensor) or target.is_floating_point():
        return None
    taken = target != (-100 if ignored is None else ignored)
    if weight is None:
        return taken.sum()
    index = target.long().clamp(0, len(weight) - 1)  # the loss itself refuses what is outside
    return weight[index].where(taken, 0).sum()


def _unwrapped(loss: Any) -> tuple[Any, dict[str, Any]]:
    """What partials, decorators and torch.compile were put around; the partials' settings."""
    given: dict[str, Any] = {}
    while isinstance(loss, partial):
        given = loss.keywords | given
        loss = loss.func
    return inspect.unwrap(loss), given


def _name(loss: Any) -> str:
    function = _unwrapped(loss)[0]
    return getattr(function, "__name__", type(function).__name__)
