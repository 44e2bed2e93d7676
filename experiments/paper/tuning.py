"""The settings that are tried for each method, the same number for all, and the choice.

From scratch the main rate of a method is multiplied by the powers of 2 around its recipe: the
head's, where it has one, else the tail's. In integers the share of weights that moves plays the
head's rate, the bits of an update (a factor of 2 each) the tail's. From trained weights both rates
fall together, since what is learnt must not be lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.config import TrainConfig
from experiments.paper.cells import WITH_HEAD

# The first is the recipe itself: it wins where others are only as good.
FACTORS = (1.0, 0.5, 2.0, 0.25, 4.0)
FINE = (1.0, 0.3, 0.1, 0.03, 0.01)
SHIFTS = (0, -1, 1, -2, 2)
MOST_BITS = 7  # of an update of the tail

Changes = dict[str, Any]


def candidates(config: TrainConfig, fine: bool, count: int) -> dict[str, Changes]:
    """What to try: a name and the changed fields for each.

    Args:
        config: resolved, with the recipe of its method.
        fine: from trained weights.
        count: how many, the recipe first.
    """
    make = _fine if fine else _from_scratch
    return dict(list(make(config).items())[:count])


def _from_scratch(config: TrainConfig) -> dict[str, Changes]:
    has_head = config.method in WITH_HEAD
    if config.precision == "int8":
        if has_head:
            return {f"density x {f:g}": _density(config, f) for f in FACTORS}
        return {f"b_bp {shift:+d}": _bits(config, shift) for shift in SHIFTS}
    name = "head_lr" if has_head else "tail_lr"
    return {f"{name} x {f:g}": _rate(config, name, f) for f in FACTORS}


def _fine(config: TrainConfig) -> dict[str, Changes]:
    """Joint factors on what the method has."""
    if config.precision == "int8":
        return {f"x {f:g}": _density(config, f) for f in FINE}
    return {f"x {f:g}": _rate(config, "head_lr", f) for f in FINE}


def _rate(config: TrainConfig, name: str, factor: float) -> Changes:
    return {name: getattr(config, name) * factor}


def _density(config: TrainConfig, factor: float) -> Changes:
    """The share of weights that a step moves, times a factor, at most all."""
    assert config.p_zero is not None
    return {"p_zero": tuple(round(max(0.0, 1.0 - (1.0 - p) * factor), 6) for p in config.p_zero)}


def _bits(config: TrainConfig, shift: int) -> Changes:
    """Twice the update of the tail for every bit."""
    assert config.b_bp is not None
    return {"b_bp": tuple(min(MOST_BITS, max(0, bits + shift)) for bits in config.b_bp)}


def choose(tried: Mapping[str, Sequence[float]]) -> str:
    """The name with the highest mean accuracy; of equal ones the first."""
    return max(tried, key=lambda name: sum(tried[name]) / len(tried[name]))


__all__ = ["candidates", "choose"]
