"""Learning-rate schedules as pure functions of the step: nothing to store, nothing to restore."""

from __future__ import annotations

import math


def factor(
    kind: str,
    step: int,
    steps: int,
    warmup: int = 0,
    drop_steps: int = 1,
    gamma: float = 1.0,
) -> float:
    """What the base learning rate is multiplied by at `step`.

    Args:
        kind: "constant", "cosine" (to 0), "linear" (to 0) or "step".
        step: counted from 0.
        steps: of the whole run; warm-up is part of it.
        warmup: steps of linear growth from 1 / (warmup + 1).
        drop_steps, gamma: of "step": `gamma ** (step // drop_steps)`.

    >>> [round(factor("cosine", s, 4), 3) for s in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    if kind == "step":
        return float(gamma ** (step // drop_steps))
    done = (step - warmup) / max(1, steps - warmup)
    if kind == "linear":
        return 1.0 - done
    if kind != "cosine":
        raise ValueError(f"schedule must be constant, cosine, linear or step, got {kind!r}")
    return 0.5 * (1.0 + math.cos(math.pi * done))
