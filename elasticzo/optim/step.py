"""The zeroth-order step, the same for floats and integers: losses in, the next `z` out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from elasticzo.module import ZOModule


class Log(Protocol):
    """What is told of every step."""

    def record(self, step: Mapping[str, Any]) -> None: ...


class Step(ABC):
    """One zeroth-order step. What a subclass adds is its rule.

    Attributes:
        model: whose head it trains.
        clip: bound on |g_q|; None is unbounded.
        log: a trajectory log, if one is attached.
        projected_gradient: `[Q]`, of the last step.
    """

    model: ZOModule
    clip: float | None = None
    log: Log | None = None
    projected_gradient: Tensor

    @torch.no_grad()
    def step(self, losses: Any = None) -> None:
        """Update the head from the losses of the halves, and go on to the next `z`.

        Losses that are not finite skip the step, and so does what they and the rates come to where
        it would take a weight beyond all bounds: weights, and buffers since the last step, are
        bit-identical to before; `skipped` counts it.

        Args:
            losses: `[2Q]` scalars of any origin, one a point of the forward; the mean over
                micro-batches where there were more.
        Raises: RuntimeError without a forward since the last step, or when a parameter was replaced
            or moved since; ValueError for another number of losses.
        """
        model, session = self.model, self.model.session
        losses = self._take(losses)  # L+ and L-, of w + eps z and w - eps z
        self._check_ready()
        if model.cut.everything:  # Full BP: nothing is perturbed
            found = self._not_finite(losses)
            self.projected_gradient.zero_()
        else:
            g = model.estimator.project(losses, session.eps)  # (L+ - L-) / (2 eps)
            a = model.estimator.coefficients(g, self.clip)  # clip(g) / Q
            found = self._not_finite(losses, a)
            self._update(a, found)  # w <- rule(w, sum_q a_q s z_q)
            self.projected_gradient = g if g.dim() == 1 else g.mean(1)
        if self.log is not None:
            self.log.record(self.entry(session.key[1], found, losses))
        model.end_step(found)  # the next z

    def attach(self, log: Log | None) -> None:
        """Write every step from now on to a trajectory log (None detaches)."""
        self.log = log

    @abstractmethod
    def _take(self, losses: Any) -> Tensor:
        """The losses, checked, on the device."""

    @abstractmethod
    def _not_finite(self, losses: Tensor, a: Tensor | None = None) -> Tensor | None:
        """1 on the device where a step by these losses and coefficients is to be skipped; None
        where none ever is."""

    def _check_ready(self) -> None:
        self.model.session.check_ready(self.model.head)

    @abstractmethod
    def _update(self, a: Tensor, found: Any) -> None:
        """Move the weights by the coefficients `[Q]`, unless `found`."""

    # ---- the log

    @abstractmethod
    def header(self) -> dict[str, Any]:
        """All that a replay depends on."""

    @abstractmethod
    def fields(self) -> dict[str, type]:
        """Entries of a step that live on the device, and what kind of number they are."""

    @abstractmethod
    def entry(self, step: Tensor, found: Any, losses: Tensor) -> dict[str, Any]:
        """What a log is told of a step: the fields as tensors, and what the host knows."""
