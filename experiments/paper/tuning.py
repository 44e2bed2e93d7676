"""The settings that are tried for each method, the same number for all, and the choice.

From scratch the main rate of a method is multiplied by powers of 2 around its recipe: the head's,
where it has one, else the tail's. In integers the share of weights that moves plays the head's
rate, and the bits of an update the tail's (a bit is a factor of 2). From trained weights a method
with head and tail tries both: there the head's best rate falls (what is learnt must not be lost)
and the tail's does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.paper.cells import WITH_HEAD
from experiments.train.config import TrainConfig
from experiments.train.fields import FIELDS

# Powers of 2 of (head's rate, tail's rate), by how likely they are; the first is the recipe itself.
HEAD = ((0, 0), (-1, 0), (1, 0), (-2, 0), (2, 0))
TAIL = ((0, 0), (0, -1), (0, 1), (0, -2), (0, 2))
FINE_HEAD = ((0, 0), (-1, 0), (-2, 0), (1, 0), (-3, 0))
FINE_TAIL = ((0, 0), (0, -1), (0, 1), (0, -2), (0, -3))
FINE_BOTH = ((0, 0), (0, 1), (-2, 1), (-2, 0), (-3, 1))

Changes = dict[str, Any]


def candidates(config: TrainConfig, fine: bool, count: int) -> dict[str, Changes]:
    """What to try: a name and the changed fields for each.

    Args:
        config: resolved, with the recipe of its method.
        fine: from trained weights.
        count: how many, 1 to 5, the recipe first.
    """
    if config.method not in WITH_HEAD:
        powers = FINE_TAIL if fine else TAIL
    elif not fine:
        powers = HEAD
    else:
        powers = FINE_HEAD if config.method == "full-zo" else FINE_BOTH
    make = _integers if config.precision == "int8" else _floats
    found = {}
    for head, tail in powers[:count]:
        parts = [f"{what} x {2.0**p:g}" for what, p in (("head", head), ("tail", tail)) if p]
        found[" ".join(parts) or "recipe"] = make(config, head, tail)
    return found


def _floats(config: TrainConfig, head: int, tail: int) -> Changes:
    """Learning rates."""
    assert config.head_lr is not None and config.tail_lr is not None
    changes = {"head_lr": config.head_lr * 2.0**head, "tail_lr": config.tail_lr * 2.0**tail}
    return {name: value for name, value in changes.items() if value != getattr(config, name)}


def _integers(config: TrainConfig, head: int, tail: int) -> Changes:
    """The share of weights that a step moves, at most all, and bits of the tail's update."""
    assert config.p_zero is not None and config.b_bp is not None
    changes: Changes = {}
    if head:
        moved = [(1.0 - p) * 2.0**head for p in config.p_zero]
        changes["p_zero"] = tuple(round(max(0.0, 1.0 - share), 6) for share in moved)
    if tail:
        changes["b_bp"] = FIELDS["b_bp"].clipped(tuple(b + tail for b in config.b_bp))
    return changes


def choose(tried: Mapping[str, Sequence[float]]) -> str:
    """The name with the highest mean accuracy; of equal ones the first."""
    return max(tried, key=lambda name: sum(tried[name]) / len(tried[name]))
