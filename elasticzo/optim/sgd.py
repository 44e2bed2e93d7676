"""`ZOSGD`: stochastic gradient descent along the projected gradients of the head, with momentum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from elasticzo.module import ZOModule
from elasticzo.optim.head import HeadOptimizer
from elasticzo.settings import check_number


class ZOSGD(HeadOptimizer):
    """Stochastic gradient descent along the projected gradients of the head.

    `w -= lr * u`, `u = sum_q clip(g_q, +-clip) / Q * s z_q + weight_decay * w`, with
    `g_q = (L+_q - L-_q) / (2 eps)`. With momentum `b = momentum * b + u; w -= lr * b` (Nesterov:
    `w -= lr * (u + momentum * b)`), b in `state[p]["momentum_buffer"]` as `torch.optim.SGD` has it.
    One launch, one read and one write of every weight; nothing waits for the device.

    Args:
        model: the `ElasticZO` whose head it trains.
        lr: learning rate; a number, or a 0-d tensor that a schedule changes in place.
        groups: torch-style dictionaries {"params": [...], "lr": ..., "weight_decay": ...} over head
            parameters; the rest of the head gets the defaults.
        clip: bound on |g_q|, in loss per unit of z; None is unbounded.
        weight_decay: of the defaults.
        defer: leave the update to the next training forward, which reads and writes the weights
            once for both; bit-equal. `eval()`, `state_dict()` and `head_parameters()` of the model
            apply it first; before reading or writing weights any other way, call `model.flush()`.
        momentum: in [0, 1); 0 is the paper's step and keeps no state.
        nesterov: look ahead by the momentum.
    Raises: ValueError, TypeError that name what was expected and what came.
    Source: arXiv:2501.04287 (w -= lr g z).
    """

    def __init__(
        self,
        model: ZOModule,
        lr: float | Tensor,
        groups: Sequence[dict[str, Any]] | None = None,
        clip: float | None = None,
        weight_decay: float = 0.0,
        defer: bool = False,
        momentum: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov}
        self.check_group(defaults)
        if nesterov and not momentum:
            raise ValueError("nesterov needs momentum > 0")
        defaults = (defaults if momentum else {}) | {"lr": lr, "weight_decay": weight_decay}
        self.rule = "momentum" if momentum else "sgd"
        super().__init__(model, defaults, groups, clip, defer)

    def check_group(self, group: dict[str, Any]) -> None:
        momentum = group.get("momentum", 0.0)
        check_number("momentum", momentum, "in [0, 1)", lambda v: 0.0 <= v < 1.0)

    def numbers(self, group: dict[str, Any]) -> list[float]:
        return [group["momentum"], float(group["nesterov"])]

    def take_numbers(self, group: dict[str, Any], numbers: Sequence[float]) -> None:
        group["momentum"], group["nesterov"] = numbers[0], bool(numbers[1])
