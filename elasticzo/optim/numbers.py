"""The numbers of parameter groups on the device, and how far a step by them reaches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Above every |z|: 6 of a normal (its uniforms end at 2^-24), their product of directions of rank 1.
FARTHEST = 64.0


class DeviceNumbers:
    """Numbers as device tensors, written again only when one changed."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tensor, list[Any]]] = {}

    def of(self, name: str, values: list[Any], device: torch.device) -> Tensor:
        """A number a group: `[G]` float64.

        Raises: ValueError for a number that is none, or below 0; tensors are not read here.
        """
        if any(isinstance(v, Tensor) for v in values):
            # Tensors are read on the device at every step: a schedule moves them in place.
            wide = [torch.as_tensor(v, dtype=torch.float64, device=device) for v in values]
            return torch.stack(wide)
        kept, kept_values = self._kept.get(name, (None, None))
        if kept_values != values:
            for value in values:
                if not 0.0 <= value < float("inf"):
                    raise ValueError(
                        f"{name} of a parameter group must be a finite number >= 0, got {value!r}"
                    )
        if kept is None or kept.device != device or len(kept) != len(values):
            kept = torch.tensor(values, dtype=torch.float64, device=device)
        elif kept_values != values:
            for i, value in enumerate(values):
                kept[i].fill_(value)  # a launch with the number in it: nothing is copied, or waits
        self._kept[name] = (kept, values)
        return kept


def reach(
    a: Tensor, lr: Tensor, decay: Tensor, groups: Sequence[dict[str, Any]], scale: float, rule: str
) -> list[Tensor]:
    """What must be finite for a step by the coefficients `a` not to take a weight, or what the rule
    keeps for it, beyond its arithmetic: float32's, but of float64 weights alone."""
    found = a.flatten() * (FARTHEST * scale * len(a))
    if rule == "adam":
        found = found * found
    if any(isinstance(group[name], Tensor) for group in groups for name in ("lr", "weight_decay")):
        found = torch.cat([found, found * lr.amax(), lr, decay, lr * decay])
    else:
        rate = max(float(group["lr"]) for group in groups)
        most = max(float(group["lr"]) * float(group["weight_decay"]) for group in groups)
        found = found * max(rate, most, 1.0)
    if all(p.dtype == torch.float64 for group in groups for p in group["params"]):
        return [found]
    return [found.to(torch.float32)]
