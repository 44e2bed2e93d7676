"""An update of the head that waits for the next training forward, which writes the weights anyway.

Its tensors live as long as the optimiser, so that a captured step finds them; where nothing waits,
`skip` is 1 and applying it changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from zo_kernels import update_

if TYPE_CHECKING:
    from elasticzo.optimizer import Targets


_WAITING: WeakSet[Deferred] = WeakSet()


def flush_others(model: nn.Module) -> None:
    """Apply what waits for a parameter of this model in a wrapper that had it before."""
    mine = {id(p) for p in model.parameters()}
    for deferred in list(_WAITING):
        if mine & deferred.left.keys():
            deferred.finish(deferred.noise, deferred.backend)


class Deferred:
    """The pending update: what `update_` would have been given.

    Attributes:
        left: places in `targets` of the weights that have not taken it, by id of the parameter.
    """

    def __init__(
        self,
        targets: Targets,
        queries: int,
        groups: int,
        device: torch.device,
        noise: str,
        backend: str,
    ) -> None:
        wide = partial(torch.zeros, dtype=torch.float64, device=device)
        self.targets, self.noise, self.backend = targets, noise, backend
        _WAITING.add(self)
        self.key = torch.zeros(2, dtype=torch.int64, device=device)
        self.coeff = wide(queries)
        self.lr = wide(groups)
        self.weight_decay = wide(groups)
        self.skip = torch.ones((), dtype=torch.float32, device=device)
        self.left: dict[int, int] = {}

    def put(self, key: Tensor, coeff: Tensor, lr: Tensor, decay: Tensor, skip: Tensor) -> None:
        """Take note of one update of all targets."""
        assert not self.left, "an update is pending already"
        for mine, given in zip(self._tensors(), (key, coeff, lr, decay, skip), strict=True):
            mine.copy_(given)
        self.mark()

    def mark(self) -> None:
        """Every target has the update to come."""
        self.left = {id(p): i for i, p in enumerate(self.targets.params)}

    def take(self, p: Tensor) -> dict[str, Any] | None:
        """What `stage_` needs to apply the update to `p`, which then has it; None if it has."""
        place = self.left.pop(id(p), None)
        if place is None:
            return None
        names = ("before", "coeff", "lr", "weight_decay", "skip")
        return dict(zip(names, self._tensors(), strict=True)) | {
            "groups": [self.targets.groups[place]]
        }

    @torch.no_grad()
    def apply(self, params: Iterable[Tensor], noise: str, backend: str) -> None:
        """Apply the update to those of these weights that have not taken it, in one launch."""
        places = [self.left.pop(id(p)) for p in params if id(p) in self.left]
        if not places:
            return
        of = self.targets
        update_(
            [of.params[i] for i in places],
            *self._tensors(),
            tensors=[of.tensors[i] for i in places],
            groups=[of.groups[i] for i in places],
            scales=[of.scales[i] for i in places],
            noise=noise,
            backend=backend,
        )

    def finish(self, noise: str, backend: str) -> None:
        """Apply it to all that have not taken it; afterwards nothing is pending."""
        self.apply(list(self.targets.params), noise, backend)
        self.skip.fill_(1.0)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.key, self.coeff, self.lr, self.weight_decay, self.skip


__all__ = ["Deferred"]
