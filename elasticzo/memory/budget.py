"""`tail="auto"`: the largest tail whose training step fits a memory budget.

Every cut is priced by `elasticzo.memory`, from the largest tail on, until one fits. The peak need
not grow with the tail: Full BP runs one pass where the pair runs two.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from elasticzo.cut import COUNTED, Cut, resolve_cut
from elasticzo.memory.liveness import StepMemory, check_device, shadow, step_memory
from elasticzo.memory.tracker import tracked
from elasticzo.module import ZOModule

V = TypeVar("V")
Wrap = Callable[..., ZOModule]


@dataclass(frozen=True)
class Candidate:
    """A cut and what it would hold.

    Attributes:
        cut: C, the number of layers that zeroth-order optimisation trains, from the input on.
        tail: what `ElasticZO` takes: the number of last layers, or "all".
        parameters: numbers that backpropagation trains.
        memory: the peaks; None where this cut is not possible.
        reason: why it is not.
    """

    cut: int
    tail: int | str
    parameters: int
    memory: StepMemory | None = None
    reason: str = ""


def cuts(model: nn.Module) -> list[tuple[int, int | str]]:
    """(C, tail) from Full BP (C = 0) to Full ZO (C = L, all counted layers)."""
    layers = sum(1 for m in model.modules() if isinstance(m, COUNTED))
    return [(c, layers - c if c else "all") for c in range(layers + 1)]


def price(
    wrap: Wrap,
    model: nn.Module,
    cut: int,
    tail: int | str,
    inputs: Any,
    state_tensors: int,
    scale: Mapping[str, float] | None = None,
    path: str | Mapping[str, str] = "auto",
    how: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
) -> Candidate:
    """What a training step of `model` with this cut would hold.

    Args:
        wrap: what wraps a model: `ElasticZO`.
        model: not wrapped; it stays as it is.
        inputs, state_tensors, device: as of `elasticzo.memory.training_memory`.
        scale, path, how: settings of the wrapper; patterns without a match in the head fall away.
    """
    there = next((p.device for p in model.parameters()), torch.device("cpu"))
    with tracked(check_device(device or there)) as (tracker, fake):
        net = shadow(model, fake, tracker.device)
        try:
            resolved = resolve_cut(net, tail)
            given = patterns_of(resolved, scale, path)
            twin = wrap(net, tail, scale=given[0], path=given[1], **(how or {})).train()
            numbers = sum(p.numel() for p in twin.tail_parameters())
            memory = step_memory(twin, tracker, fake, inputs, None, (), state_tensors)
        except ValueError as error:
            return Candidate(cut, tail, 0, None, str(error))
    return Candidate(cut, tail, numbers, memory)


def fit_tail(
    wrap: Wrap,
    model: nn.Module,
    budget: int,
    inputs: Any,
    state_tensors: int,
    scale: Mapping[str, float] | None,
    path: str | Mapping[str, str],
    how: Mapping[str, Any],
) -> tuple[Candidate, Mapping[str, float] | None, str | Mapping[str, str]]:
    """The cut with the largest tail that fits, and what of scale and path belongs to its head.

    Raises: ValueError that says the least budget where no cut fits.
    """
    _check_patterns(model, scale, path)
    tried = []
    for cut, tail in cuts(model):
        found = price(wrap, model, cut, tail, inputs, state_tensors, scale, path, how)
        if found.memory is not None and found.memory.peak.bytes <= budget:
            return found, *patterns_of(resolve_cut(model, tail), scale, path)
        tried.append(found)
    possible = [(c.memory.peak.bytes, c) for c in tried if c.memory is not None]
    if not possible:
        raise ValueError(f"tail='auto' found no cut that this model allows: {tried[-1].reason}")
    least, best = min(possible, key=lambda pair: pair[0])
    less = "; pairing='sequential' needs less" if how["pairing"] == "stacked" else ""
    raise ValueError(
        f"memory_budget must be at least {least} bytes (tail={best.tail!r}) for a training step on "
        f"this example_input, got {budget}{less}"
    )


def patterns_of(
    cut: Cut, scale: Mapping[str, float] | None, path: str | Mapping[str, str]
) -> tuple[Mapping[str, float] | None, str | Mapping[str, str]]:
    """The patterns of scale and path that match something in the head."""
    parameters = cut.head_parameters
    modules = [name.rpartition(".")[0] for name in parameters]
    kept = path if isinstance(path, str) else _matching(path, modules) or "auto"
    return (None if scale is None else _matching(scale, parameters)), kept


def _matching(patterns: Mapping[str, V], names: Sequence[str]) -> dict[str, V]:
    return {
        pattern: value
        for pattern, value in patterns.items()
        if any(fnmatch.fnmatchcase(name, pattern) for name in names)
    }


def _check_patterns(
    model: nn.Module, scale: Mapping[str, float] | None, path: str | Mapping[str, str]
) -> None:
    """A pattern must match somewhere: which cut will be chosen nobody knows yet."""
    parameters = [name for name, _ in model.named_parameters()]
    modules = [name.rpartition(".")[0] for name in parameters]
    for what, patterns, names in (("scale", scale, parameters), ("path", path, modules)):
        for pattern in patterns if isinstance(patterns, Mapping) else ():
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"{what} pattern {pattern!r} matches nothing of: {', '.join(names)}"
                )
