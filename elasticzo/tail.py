"""The tail's optimiser: any torch class, gated by the same flag as the head's step."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from elasticzo.wrapper import ElasticZO

FUSED_DEVICES = ("cuda", "cpu")


def gate_on(model: ElasticZO) -> Tensor:
    """1.0 where this step must be skipped.

    `model.backward` looked at the losses; after a plain `losses.mean().backward()` the gradients
    are what can be looked at.
    """
    if model._micro_batches == 0 and model._stepped:  # zo.step came first
        return model._last_found
    if model._gated:
        return model._found
    grads = [p.grad for p in model.tail_parameters() if p.grad is not None]
    if not grads:
        return model._found
    finite = torch.stack([torch.isfinite(g).all() for g in grads]).all()
    return (~finite).to(torch.float32)


def tail_optimizer(
    model: ElasticZO, cls: type[torch.optim.Optimizer], **settings: Any
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
        skip = gate_on(model)
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
    optimizer._elasticzo_gate = True  # type: ignore[attr-defined]
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


__all__ = ["gate_on", "tail_optimizer"]
