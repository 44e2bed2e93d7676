"""The tail's optimiser: any torch class, gated by the same flag as the head's step."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch

from elasticzo.module import ZOModule

FUSED_DEVICES = ("cuda", "cpu")


def tail_optimizer(
    model: ZOModule, cls: type[torch.optim.Optimizer], **settings: Any
) -> torch.optim.Optimizer:
    """Build `cls` on the tail and gate its steps."""
    parameters: list[Any] = list(model.tail_parameters())
    groups: list[Any] = parameters or [{"params": []}]
    if _can_fuse(cls, parameters, settings):
        settings = {**settings, "fused": True}
    optimizer = cls(groups, **settings)
    if optimizer.defaults.get("fused"):
        _start_momentum(optimizer)
    plain_step = optimizer.step

    def step(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        if not parameters:
            return plain_step(closure)  # Full ZO: nothing to skip, nothing to read
        skip = model.session.gate(model.tail_parameters())
        if all(group.get("fused") for group in self.param_groups):
            scaler_found = getattr(self, "found_inf", None)  # GradScaler says so in the same way
            both = skip if scaler_found is None else torch.maximum(skip, scaler_found.to(skip))
            self.found_inf = both  # type: ignore[attr-defined]
            try:
                return plain_step(closure)
            finally:
                if scaler_found is None:
                    del self.found_inf  # type: ignore[attr-defined]
                else:
                    self.found_inf = scaler_found  # type: ignore[attr-defined]
        if skip.item() != 0:  # no device-side gate in this class: the flag is read on the host
            return None
        return plain_step(closure)

    # Bound, as LR schedulers expect of a step.
    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    optimizer.elasticzo_gate = True  # type: ignore[attr-defined]
    return optimizer


def _can_fuse(
    cls: type[torch.optim.Optimizer], parameters: list[Any], settings: dict[str, Any]
) -> bool:
    if not parameters or "fused" not in inspect.signature(cls).parameters:
        return False
    if any(settings.get(name) for name in ("fused", "foreach", "differentiable")):
        return False
    if settings.get("dampening"):  # a skipped first step must leave the momentum unset
        return False
    return all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters)


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Fused SGD leaves a new momentum buffer unwritten when it skips its first step: begin at zero,
    which without dampening gives the same first step."""
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for p in group["params"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
