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
    """Build `cls` on the tail and gate its steps.

    Raises: ValueError for a class that evaluates its closure itself, or a fused form that is wrong.
    """
    given = inspect.signature(cls.step).parameters.get("closure")
    if given is not None and given.default is inspect.Parameter.empty:
        raise ValueError(
            f"the tail's optimiser must take a step from gradients, but {cls.__name__} evaluates a "
            "closure as often as it likes, where no gate can hold a loss that is not finite"
        )
    parameters: list[Any] = list(model.tail_parameters())
    groups: list[Any] = parameters or [{"params": []}]
    if _can_fuse(cls, parameters, settings):
        settings = {**settings, "fused": True}
    optimizer = cls(groups, **settings)
    _check_fused(optimizer)
    if optimizer.defaults.get("fused"):
        _start_momentum(optimizer)
    plain_step = optimizer.step

    def step(self: torch.optim.Optimizer, closure: Any = None) -> Any:
        loss = None
        if closure is not None:  # it makes what the gate looks at
            with torch.enable_grad():
                loss = closure()
        if not parameters:  # Full ZO: nothing to skip, nothing to read
            plain_step()
            return loss
        skip = model.session.gate(model.tail_parameters())
        if all(group.get("fused") for group in self.param_groups):
            _check_fused(self)
            scaler_found = getattr(self, "found_inf", None)  # GradScaler says so in the same way
            both = skip if scaler_found is None else torch.maximum(skip, scaler_found.to(skip))
            self.found_inf = both  # type: ignore[attr-defined]
            try:
                plain_step()
            finally:
                if scaler_found is None:
                    del self.found_inf  # type: ignore[attr-defined]
                else:
                    self.found_inf = scaler_found  # type: ignore[attr-defined]
        elif skip.item() == 0:  # no device-side gate in this class: the flag is read on the host
            plain_step()
        return loss

    # Bound, as LR schedulers expect of a step.
    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    optimizer.elasticzo_gate = model  # type: ignore[attr-defined]
    return optimizer


def check_of(model: ZOModule, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError unless an optimiser is gated by this model, and trains its tail alone."""
    tail = {id(p) for p in model.tail_parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    gate = getattr(optimizer, "elasticzo_gate", None)
    if gate is not model or any(id(p) not in tail for p in params):
        of = "none" if gate is None else "another model" if gate is not model else "more than that"
        raise ValueError(
            "the tail's optimiser must be of this model's tail, and skip the steps that it skips: "
            f"build it by model.tail_optimizer; the one given is of {of}"
        )


def _can_fuse(
    cls: type[torch.optim.Optimizer], parameters: list[Any], settings: dict[str, Any]
) -> bool:
    if not parameters or "fused" not in inspect.signature(cls).parameters:
        return False
    if any(settings.get(name) for name in ("fused", "foreach", "differentiable")):
        return False
    if settings.get("dampening"):  # a skipped first step must leave the momentum unset
        return False
    if any(_wrong_when_fused(cls, p) for p in parameters):
        return False
    return all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters)


def _wrong_when_fused(cls: type, p: Any) -> bool:
    """torch's fused SGD (2.13) leaves most 16-bit weights on the CPU where they are."""
    narrow = p.dtype.itemsize < 4 and p.device.type == "cpu"
    return narrow and issubclass(cls, torch.optim.SGD)


def _check_fused(optimizer: torch.optim.Optimizer) -> None:
    """A weight may have been cast since, or fused=True be the user's."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            for p in group["params"]:
                if _wrong_when_fused(type(optimizer), p):
                    raise ValueError(
                        f"torch's fused SGD is wrong for {p.dtype} on the CPU: build "
                        " the tail's optimiser with fused=False, after the cast"
                    )


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Fused SGD leaves a new momentum buffer unwritten when it skips its first step: begin at zero,
    which without dampening gives the same first step."""
    for group in optimizer.param_groups:
        if group.get("momentum"):
            for p in group["params"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
