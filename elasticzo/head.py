"""The head: which weights zeroth-order optimisation trains, and what belongs to each of them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from elasticzo.settings import check_number


@dataclass(frozen=True)
class HeadParameter:
    """A perturbed weight: its name, its place in the model's named_parameters, its scale.

    `still_row` is the row of an embedding's padding token, which no gradient moves.
    """

    name: str
    index: int
    scale: float
    still_row: int | None = None


@dataclass(frozen=True)
class Target:
    """A weight that an update works on, the group whose learning rate it has, and what the rule
    keeps for it."""

    w: Tensor
    head: HeadParameter
    group: int = 0
    state: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Slot:
    """Where a weight lives: a parameter or buffer of a module, by its local name."""

    name: str
    module: nn.Module
    local: str

    @property
    def w(self) -> Any:
        """The weight that is there now."""
        p = self.module._parameters.get(self.local)
        return self.module._buffers[self.local] if p is None else p


class Head:
    """The weights of the head in the order of the model.

    Attributes:
        parameters: what belongs to each, by name.
    """

    def __init__(self, parameters: Iterable[HeadParameter], slots: Mapping[str, Slot]) -> None:
        self.parameters = {head.name: head for head in parameters}
        self._slots = [slots[name] for name in self.parameters]

    def __iter__(self) -> Iterator[tuple[HeadParameter, Any]]:
        for head, slot in zip(self.parameters.values(), self._slots, strict=True):
            yield head, slot.w

    def named(self) -> Iterator[tuple[str, Any]]:
        """The weights by name."""
        return ((slot.name, slot.w) for slot in self._slots)


def slots_of(model: nn.Module) -> dict[str, Slot]:
    """Where each parameter of a float model lives, by its name in `named_parameters()`."""
    modules = dict(model.named_modules())
    found = {}
    for name, _ in model.named_parameters():
        owner, _, local = name.rpartition(".")
        found[name] = Slot(name, modules[owner], local)
    return found


def resolve_scale(names: Sequence[str], scale: Mapping[str, float] | None) -> dict[str, float]:
    """The relative scale of every weight of the head; the last pattern that matches wins.

    Raises: TypeError for what is no mapping, ValueError for a pattern that matches nothing, or a
        scale that is no finite number >= 0.
    """
    if not isinstance(scale, Mapping | None):
        raise TypeError(f"scale must be {{name pattern: number}}, got {scale!r}")
    found = dict.fromkeys(names, 1.0)
    for pattern, s in (scale or {}).items():
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(
                f"scale pattern {pattern!r} matches no head parameter; they are: "
                + (", ".join(names) or "none")
            )
        expected = "finite and >= 0"
        check_number(f"scale of {pattern!r}", s, expected, lambda v: 0.0 <= v < float("inf"))
        found |= dict.fromkeys(matched, float(s))
    return found
