"""Directions: what `z` is. Made again from (seed, step, query, weight) wherever it is needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from elasticzo.head import HeadParameter, Target
from elasticzo.points import Points
from elasticzo.settings import check_integer, check_noise
from zo_kernels import apply_rule_, perturbed_weights, sample, update_


@dataclass(frozen=True)
class Move:
    """One update of the head, `w <- rule(w, sum_q coeff_q s z_q)`, as numbers on the device.

    Attributes:
        key: `[2]` int64, the seed and step that made `z`.
        coeff: `[Q]` float64. lr, weight_decay: `[G]` float64, a value a group.
        skip: `[]` float32; not 0 leaves weights and the rule's state bit-identical.
        rule: one of `zo_kernels.RULES`. settings: its numbers, `[T, n]` float64, a row a target.
    """

    key: Tensor
    coeff: Tensor
    lr: Tensor
    weight_decay: Tensor
    skip: Tensor
    rule: str = "sgd"
    settings: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        found = [self.key, self.coeff, self.lr, self.weight_decay, self.skip]
        return found if self.settings is None else [*found, self.settings]

    def of(self, places: Sequence[int]) -> Move:
        """The same of some of its targets."""
        if self.settings is None or len(places) == len(self.settings):
            return self
        rows = [self.settings[i] for i in places]
        return replace(self, settings=torch.stack(rows) if rows else self.settings[:0])

    def ruled(self, targets: Sequence[Target]) -> dict[str, Any]:
        """What an op is told of the rule: nothing of plain descent."""
        if self.rule == "sgd":
            return {}
        state = [s for kind in zip(*(t.state for t in targets), strict=True) for s in kind]
        return {"rule": self.rule, "state": state, "settings": self.settings}


class Direction(ABC):
    """`z_q` of every weight of the head: a pure function of (seed, step, query, weight).

    A new direction is right on the day it has `weights` and `sum`; its update then costs a weight
    at a time. `dense` says that kernels make it an element at a time, and perturb and update by it.
    """

    noise: str
    dense = False

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What makes it another direction: it stands in logs and states."""

    @abstractmethod
    def sum(self, head: HeadParameter, w: Tensor, key: Tensor, a: Tensor, backend: str) -> Tensor:
        """`sum_q a_q s z_q`, like `w`: `a` is `[Q]` float64."""

    @abstractmethod
    def weights(
        self,
        head: HeadParameter,
        w: Tensor,
        key: Tensor,
        eps: Tensor,
        points: Points,
        dtype: torch.dtype | None,
        backend: str,
    ) -> Tensor:
        """The weight at the points, `w +- eps s z_q`: `[len(points), *w.shape]`."""

    @torch.no_grad()
    def update_(self, targets: Sequence[Target], move: Move, backend: str) -> None:
        """Update the targets in place; rows that stay do so."""
        with rows_stay(targets):
            self._update(targets, move, backend)

    def _update(self, targets: Sequence[Target], move: Move, backend: str) -> None:
        for i, t in enumerate(targets):
            u = self.sum(t.head, t.w, move.key, move.coeff, backend)
            apply_(t, u, move.of([i]), backend)


def apply_(t: Target, u: Tensor, move: Move, backend: str) -> None:
    """One update of a weight by its estimate `u`; `move` is of this target alone."""
    numbers = None if move.settings is None else move.settings[0]
    at = (move.lr[t.group], move.weight_decay[t.group], move.skip)
    words = None
    if t.w.dtype == torch.bfloat16:  # what stochastic rounding decides by
        words = draw("bits", t.w.shape, t.head, move.key, 0, backend, "rounding")
    apply_rule_(t.w, u, *at, move.rule, t.state, numbers, words, backend=backend)


def draw(
    noise: str,
    shape: Sequence[int],
    head: HeadParameter,
    key: Tensor,
    query: int,
    backend: str,
    purpose: str = "noise",
    first_row: int = 0,
) -> Tensor:
    """Noise that belongs to a weight; each purpose is a stream of its own."""
    at: dict[str, Any] = {"tensor": head.index, "query": query, "purpose": purpose}
    at["first_row"] = first_row
    return sample(shape, key, noise=noise, backend=backend, **at)


@contextmanager
def rows_stay(targets: Sequence[Target]) -> Iterator[None]:
    """Padding rows of embeddings, and what a rule keeps for them, are put back."""
    still = [
        tensor[t.head.still_row]
        for t in targets
        if t.head.still_row is not None
        for tensor in (t.w, *t.state)
    ]
    values = [row.clone() for row in still]
    yield
    for row, value in zip(still, values, strict=True):
        row.copy_(value)


@dataclass(frozen=True)
class Dense(Direction):
    """`z` with an independent element for each of the weight: "normal" or "rademacher"."""

    noise: str = "normal"
    dense = True

    def __post_init__(self) -> None:
        check_noise(self.noise)

    def describe(self) -> dict[str, Any]:
        return {"direction": "dense", "noise": self.noise}

    def sum(self, head: HeadParameter, w: Tensor, key: Tensor, a: Tensor, backend: str) -> Tensor:
        wide = torch.promote_types(w.dtype, torch.float32)
        total = torch.zeros_like(w, dtype=wide)
        for query in range(a.numel()):
            z = draw(self.noise, w.shape, head, key, query, backend)
            total += a[query].to(wide) * z.to(wide)
        return total.mul_(head.scale)

    def weights(
        self,
        head: HeadParameter,
        w: Tensor,
        key: Tensor,
        eps: Tensor,
        points: Points,
        dtype: torch.dtype | None,
        backend: str,
    ) -> Tensor:
        def halves(start: int, stop: int) -> Tensor:
            how: dict[str, Any] = {"tensor": head.index, "scale": head.scale, "dtype": dtype}
            how |= {"noise": self.noise, "backend": backend}
            return perturbed_weights(w, key, eps, start=start, stop=stop, **how)

        if points.span is not None:
            return halves(*points.span)
        parts = [w.detach().to(dtype or w.dtype).unsqueeze(0)] if points.base else []
        return torch.cat(parts + [halves(half, half + 1) for half in points.halves])

    def _update(self, targets: Sequence[Target], move: Move, backend: str) -> None:
        update_(
            [t.w for t in targets],
            *(move.key, move.coeff, move.lr, move.weight_decay, move.skip),
            tensors=[t.head.index for t in targets],
            groups=[t.group for t in targets],
            scales=[t.head.scale for t in targets],
            noise=self.noise,
            backend=backend,
            **move.ruled(targets),
        )


@dataclass(frozen=True)
class LowRank(Direction):
    """`z = U V^T / sqrt(r)` of a weight seen as `[N, K]`, of unit variance an element.

    `U [N, r]` is new at every step, `V [K, r]` stays for `every` steps: so long updates lie in one
    subspace of rank r. Weights of one dimension have dense directions. Only over several V is the
    estimate unbiased.

    Args:
        rank: r. every: steps for which V stays.
        noise: of the factors, and of weights of one dimension.
    Source: LOZO, Chen et al., arXiv:2410.07698 (theirs is U V^T with the update divided by r: the
        same step at `eps / sqrt(r)`).
    """

    rank: int = 2
    every: int = 50
    noise: str = "normal"

    def __post_init__(self) -> None:
        check_noise(self.noise)
        check_integer("rank", self.rank, 1, 1 << 16)
        check_integer("every", self.every, 1, 1 << 31)

    def describe(self) -> dict[str, Any]:
        settings = {"rank": self.rank, "every": self.every}
        return {"direction": "low_rank", "noise": self.noise, **settings}

    def _z(self, head: HeadParameter, w: Tensor, key: Tensor, query: int, backend: str) -> Tensor:
        """`z_q` like `w`, in its dtype but at least float32."""
        wide = torch.promote_types(w.dtype, torch.float32)
        if w.dim() < 2:
            return draw(self.noise, w.shape, head, key, query, backend).to(wide)
        held = key.clone()  # V is that of the first step of its period
        held[1] -= key[1] % self.every
        left, right = (w.shape[0], self.rank), (w[0].numel(), self.rank)
        u = draw(self.noise, left, head, key, query, backend, "left").to(wide)
        v = draw(self.noise, right, head, held, query, backend, "right").to(wide)
        with torch.autocast(w.device.type, enabled=False):  # the same z in a forward and a step
            return (u @ v.t()).mul_(self.rank**-0.5).view(w.shape)

    def sum(self, head: HeadParameter, w: Tensor, key: Tensor, a: Tensor, backend: str) -> Tensor:
        total = torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))
        for query in range(a.numel()):
            total += a[query].to(total.dtype) * self._z(head, w, key, query, backend)
        return total.mul_(head.scale)

    def weights(
        self,
        head: HeadParameter,
        w: Tensor,
        key: Tensor,
        eps: Tensor,
        points: Points,
        dtype: torch.dtype | None,
        backend: str,
    ) -> Tensor:
        queries = {query for query, _ in points.signed()}
        kept = {query: self._z(head, w, key, query, backend) for query in queries}
        out = torch.empty((len(points), *w.shape), dtype=dtype or w.dtype, device=w.device)
        if points.base:
            out[0] = w.detach()
        for place, (query, sign) in enumerate(points.signed(), start=int(points.base)):
            z = kept[query]
            out[place] = w.detach() + z * (sign * eps * head.scale).to(z.dtype)
        return out
