"""`ZOSign`: the sign of the estimate of the head's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from elasticzo.module import ZOModule
from elasticzo.optim.head import HeadOptimizer


class ZOSign(HeadOptimizer):
    """`w -= lr * sign(u)`, `u = sum_q clip(g_q, +-clip) / Q * s z_q + weight_decay * w`.

    Every weight moves by lr, whatever the scale of the loss.

    Args:
        model, lr, groups, clip, weight_decay, defer: as of `ZOSGD`.
    Source: signSGD, Bernstein et al. 2018 (arXiv:1802.04434); ZO-signSGD, Liu et al. 2019.
    """

    rule = "sign"

    def __init__(
        self,
        model: ZOModule,
        lr: float | Tensor,
        groups: Sequence[dict[str, Any]] | None = None,
        clip: float | None = None,
        weight_decay: float = 0.0,
        defer: bool = False,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(model, defaults, groups, clip, defer)
