"""Directions of rank one: one a sample of the batch, one for neighbours, or one for all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elasticzo.directions import Direction, draw
from elasticzo.head import HeadParameter
from elasticzo.points import Points
from elasticzo.settings import check_integer, check_noise

CHUNK = 1 << 22  # elements of factors that exist at a time


@dataclass(frozen=True)
class Samples:
    """`z_i = r_i u_i^T` of a weight seen as `[N, K]`, made again from (seed, step, query, i).

    Weights of one dimension, and those of normalisation, have an element of noise each. Sample i is
    the i-th of the step, over all its micro-batches.

    Args:
        noise: of the factors. group: neighbouring samples that share a direction; None is all.
    Source: arXiv:1803.04386 (Flipout), whose perturbations of a sample these are.
    """

    noise: str = "rademacher"
    group: int | None = 1

    def __post_init__(self) -> None:
        check_noise(self.noise)
        if self.group is not None:
            check_integer("group", self.group, 1, 1 << 31)

    def number(self, sample: int) -> int:
        """Of the direction that a sample has."""
        return 0 if self.group is None else sample // self.group

    def factors(
        self,
        head: HeadParameter,
        shape: torch.Size,
        key: Tensor,
        query: int,
        first: int,
        count: int,
        backend: str,
    ) -> tuple[Tensor, Tensor | None]:
        """`r [count, N]` and `u [count, K...]` of the directions from number `first` on; a weight
        of one dimension, or a flat one, has `r` alone, of its own shape."""
        at: dict[str, Any] = {"first_row": first}

        def rows(of: tuple[int, ...], purpose: str) -> Tensor:
            return draw(self.noise, (count, *of), head, key, query, backend, purpose, **at)

        if head.flat or len(shape) < 2:
            # Where a shape has several dimensions, its noise is that of the flat weight.
            return rows((shape.numel(),), "sample_left").view(count, *shape), None
        return rows(tuple(shape[:1]), "sample_left"), rows(tuple(shape[1:]), "sample_right")

    def of_samples(
        self,
        head: HeadParameter,
        shape: torch.Size,
        key: Tensor,
        query: int,
        first: int,
        count: int,
        backend: str,
    ) -> tuple[Tensor, Tensor | None]:
        """The factors of `count` samples from sample `first` on: a row for each."""
        start, stop = self.number(first), self.number(first + count - 1) + 1
        found = self.factors(head, shape, key, query, start, stop - start, backend)
        if self.group == 1:
            return found
        if self.group is None:
            r, u = (None if t is None else t.expand(count, *t.shape[1:]) for t in found)
        else:
            numbers = torch.arange(first, first + count, device=key.device)
            places = numbers.div_(self.group, rounding_mode="floor") - start
            r, u = (None if t is None else t[places] for t in found)
        assert r is not None
        return r, u

    def sum(self, head: HeadParameter, w: Tensor, key: Tensor, a: Tensor, backend: str) -> Tensor:
        """`sum_q sum_i a_qi s r_qi u_qi^T`, like `w`: `a` is `[Q, B]` float64, of all samples of
        the step."""
        wide = torch.promote_types(w.dtype, torch.float32)
        a = self._by_direction(a)
        total = torch.zeros(w.shape, dtype=wide, device=w.device)
        rows = max(CHUNK // max(w.shape[0] + w.numel() // w.shape[0], 1), 1) if w.dim() else CHUNK
        with torch.autocast(w.device.type, enabled=False):
            for query, first in ((q, i) for q in range(len(a)) for i in range(0, a.shape[1], rows)):
                weights = a[query, first : first + rows].to(wide)
                at = (head, w.shape, key, query, first, len(weights), backend)
                r, u = (None if t is None else t.to(wide) for t in self.factors(*at))
                assert r is not None
                if u is None:
                    total += torch.tensordot(weights, r, 1)
                else:
                    r = r * weights[:, None]
                    total += (r.t() @ u.flatten(1)).view(w.shape)
        return total.mul_(head.scale)

    def _by_direction(self, a: Tensor) -> Tensor:
        """Coefficients of samples `[Q, B]` summed to those of their directions."""
        if self.group is None:
            return a.sum(1, keepdim=True)
        if self.group == 1:
            return a
        padded = F.pad(a, (0, -a.shape[1] % self.group))
        return padded.view(len(a), -1, self.group).sum(2)


@dataclass(frozen=True)
class RankOne(Direction):
    """One direction of rank one a batch, `z = r u^T`: N + K numbers in place of N K.

    Args:
        noise: of the factors: with signs every element of `z` is one.
    Source: EGGROLL, arXiv:2511.16652, of whose perturbations this is one of rank one.
    """

    noise: str = "rademacher"

    def __post_init__(self) -> None:
        check_noise(self.noise)

    def describe(self) -> dict[str, Any]:
        return {"direction": "rank1", "noise": self.noise}

    def sum(self, head: HeadParameter, w: Tensor, key: Tensor, a: Tensor, backend: str) -> Tensor:
        return Samples(self.noise, None).sum(head, w, key, a[:, None], backend)

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
        wide = torch.promote_types(w.dtype, torch.float32)
        out = torch.empty((len(points), *w.shape), dtype=dtype or w.dtype, device=w.device)
        if points.base:
            out[0] = w.detach()
        for place, (query, sign) in enumerate(points.signed(), start=int(points.base)):
            one = torch.zeros(query + 1, dtype=torch.float64, device=w.device)
            one[query] = sign
            z = self.sum(head, w, key, one, backend)  # s is in it
            out[place] = w.detach() + z * eps.to(wide)
        return out
