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

    `still_row` is the row of an embedding's padding token, which no gradient moves. `flat`: it
    multiplies element by element, whatever its shape (normalisation), and is no matrix.
    """

    name: str
    index: int
    scale: float
    still_row: int | None = None
    flat: bool = False


# What the noise belongs to that a weight is learnt by.
KINDS = ("weight", "rank1", "sample", "node", "auto", "feedback")
BY_SAMPLE = ("sample", "node", "auto")  # they need the loss of each sample


@dataclass(frozen=True)
class Kind:
    """Of a weight: whose noise it is learnt by.

    Attributes:
        name: "weight" (an element of noise for each of its own, one direction a batch), "rank1"
            (one direction of rank one a batch), "sample" (one of rank one a sample), "node" (noise
            on the outputs of its layer), "auto" (not settled before the first forward), "feedback"
            (errors that a learnt matrix carries back; of the whole head or of none).
        why: what decided, where it is not what was asked for.
        automatic: whether "auto" was asked for.
    """

    name: str
    why: str = ""
    automatic: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name


WEIGHT = Kind("weight")


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
        kinds: by whose noise each is learnt, by name; "auto" until the first forward.
        slots: where each lives.
    """

    def __init__(self, parameters: Iterable[HeadParameter], slots: Mapping[str, Slot]) -> None:
        self.parameters = {head.name: head for head in parameters}
        self.kinds = dict.fromkeys(self.parameters, WEIGHT)
        self.slots = [slots[name] for name in self.parameters]

    def __iter__(self) -> Iterator[tuple[HeadParameter, Any]]:
        for head, slot in zip(self.parameters.values(), self.slots, strict=True):
            yield head, slot.w

    @property
    def by_sample(self) -> bool:
        """Whether a step needs the loss of each sample."""
        return any(kind.name in BY_SAMPLE for kind in self.kinds.values())

    def asked(self) -> dict[str, str]:
        """The kinds before "auto" was settled, by name: what makes a run another one."""
        return {n: "auto" if kind.automatic else kind.name for n, kind in self.kinds.items()}

    def settled(self) -> dict[str, str]:
        """The kinds by name.

        Raises: RuntimeError before "auto" is settled.
        """
        open_ = [name for name, kind in self.kinds.items() if kind.name == "auto"]
        if open_:
            raise RuntimeError(
                f"directions='auto' of {open_[0]!r} is settled by the first training forward: call "
                "model.settle(x) on a batch first"
            )
        return {name: kind.name for name, kind in self.kinds.items()}

    def named(self) -> Iterator[tuple[str, Any]]:
        """The weights by name."""
        return ((slot.name, slot.w) for slot in self.slots)


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


def resolve_directions(names: Sequence[str], directions: str | Mapping[str, str]) -> dict[str, str]:
    """The kind that is asked for of every weight of the head; the last pattern that matches wins,
    by the name of the weight or of its module, and what none matches is "weight".

    Raises: TypeError for what is neither a kind nor a mapping, ValueError for an unknown kind, or a
        pattern that matches nothing.
    """
    if isinstance(directions, str):
        directions = {"*": directions} if names else {}
    if not isinstance(directions, Mapping):
        raise TypeError(
            f"directions must be one of {KINDS} or {{name pattern: one of them}}, got "
            f"{directions!r}"
        )
    found = dict.fromkeys(names, "weight")
    for pattern, kind in directions.items():
        if kind not in KINDS:
            raise ValueError(f"directions of {pattern!r} must be one of {KINDS}, got {kind!r}")
        places = {name: (name, name.rpartition(".")[0]) for name in names}
        matched = [
            n for n, at in places.items() if any(fnmatch.fnmatchcase(a, pattern) for a in at)
        ]
        if not matched:
            raise ValueError(
                f"directions pattern {pattern!r} matches no head parameter; they are: "
                + (", ".join(names) or "none")
            )
        found |= dict.fromkeys(matched, kind)
    return found
