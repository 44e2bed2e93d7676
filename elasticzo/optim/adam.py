"""`ZOAdam`: Adam, and AdamW, on the estimate of the head's gradient."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from elasticzo.head import Target
from elasticzo.module import ZOModule
from elasticzo.optim.head import HeadOptimizer
from elasticzo.settings import check_number

_NARROW = (
    "beta2={} keeps squares longer than bfloat16 can add to them: exp_avg_sq of {!r} will stall; "
    "use float32 weights, or betas=(0.9, 0.99)"
)


class ZOAdam(HeadOptimizer):
    """Adam on `u = sum_q clip(g_q, +-clip) / Q * s z_q + weight_decay * w`, which is never stored.

    `m = beta1 m + (1 - beta1) u; v = beta2 v + (1 - beta2) u^2;
    w -= lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)`, t counting the steps that were
    not skipped. `state[p]` has "step", "exp_avg" and "exp_avg_sq", as `torch.optim.Adam`'s has: two
    tensors a weight, and one launch a step.

    Args:
        model, lr, groups, clip, weight_decay, defer: as of `ZOSGD`.
        betas: (beta1, beta2), in [0, 1). eps: of the denominator, not of the perturbation.
        decoupled_weight_decay: AdamW's, `w -= lr * weight_decay * w` beside the rule.
    Source: Kingma and Ba 2015 (arXiv:1412.6980); Loshchilov and Hutter 2019 (arXiv:1711.05101).
    """

    rule = "adam"
    counted = ("step",)

    def __init__(
        self,
        model: ZOModule,
        lr: float | Tensor,
        groups: Sequence[dict[str, Any]] | None = None,
        clip: float | None = None,
        weight_decay: float = 0.0,
        defer: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decoupled_weight_decay: bool = False,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        defaults["decoupled_weight_decay"] = decoupled_weight_decay
        super().__init__(model, defaults, groups, clip, defer)
        narrow = [n for n, p in model.named_head_parameters() if p.dtype == torch.bfloat16]
        if narrow and 1.0 - betas[1] < 2.0**-8:
            warnings.warn(_NARROW.format(betas[1], narrow[0]), stacklevel=2)

    def check_group(self, group: dict[str, Any]) -> None:
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas!r}")
        for i, beta in enumerate(betas):
            check_number(f"betas[{i}]", beta, "in [0, 1)", lambda v: 0.0 <= v < 1.0)
        check_number("eps", group["eps"], "a finite number > 0", lambda v: 0.0 < v < float("inf"))

    def numbers(self, group: dict[str, Any]) -> list[float]:
        return [*group["betas"], group["eps"], float(group["decoupled_weight_decay"])]

    def take_numbers(self, group: dict[str, Any], numbers: Sequence[float]) -> None:
        beta1, beta2, group["eps"], decoupled = numbers
        group["betas"], group["decoupled_weight_decay"] = (beta1, beta2), bool(decoupled)

    def state_of(self, p: Tensor) -> tuple[Tensor, ...]:
        state = self.state[p]
        step = state.get("step")
        if step is None:
            step = torch.zeros((), dtype=torch.float32, device=p.device)
        state["step"] = step.to(p.device)
        return super().state_of(p)

    def settings(self, targets: Sequence[Target], found: Tensor) -> Tensor:
        """beta1, beta2, eps, the two corrections, decoupled: powers are taken here, in float64."""
        rows = super().settings(targets, found)
        assert rows is not None
        steps = [self.state[t.w]["step"] for t in targets]
        counts = torch.stack(steps) + (1.0 - found)
        torch._foreach_copy_(steps, counts.unbind())
        t = counts.to(torch.float64).unsqueeze(1)
        return torch.cat([rows[:, :3], 1.0 - rows[:, :2] ** t, rows[:, 3:]], 1)
