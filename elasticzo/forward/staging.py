"""The weights of the head at the points that run now: staged small ones together, large ones alone.

Weights are only ever read here, but for an update that waits: it is applied on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from elasticzo.directions import Direction
from elasticzo.head import HeadParameter, Kind
from elasticzo.points import Points
from elasticzo.samples import RankOne, Samples
from elasticzo.session import Session
from zo_kernels import stage_

SMALL = 1 << 14  # elements: weights up to this size are staged together, in one launch
MANY = 8  # halves; up to here small weights are staged for all of them at once
ALIGN = 64  # elements between the places of two weights in one memory

Weights = Sequence[tuple[HeadParameter, Tensor]]


class Staging:
    """Makes the weights of one forward.

    Attributes:
        points: all that the forward evaluates; `here` those that run now.
        kernels: whether they are neighbouring halves of a direction that kernels make.
    """

    def __init__(
        self,
        session: Session,
        weights: Weights,
        kinds: Mapping[str, Kind],
        direction: Direction,
        samples: Samples,
        points: Points,
        backend: str,
    ) -> None:
        self.key, self.eps, self.pending = session.key, session.eps, session.pending
        self.direction, self.backend = direction, backend
        self._ranked = {name for name, kind in kinds.items() if kind.name == "rank1"}
        self._rank_one = RankOne(samples.noise)
        self.points = self.here = points
        self.kernels = direction.dense and points.span is not None
        # Halves of small weights by id and dtype, the first of them, the weight's version.
        self._ready: dict[tuple[int, torch.dtype | None], tuple[Tensor, int, int]] = {}
        dense = [(head, p) for head, p in weights if kinds[head.name].name == "weight"]
        self._small = _together(dense) if self.kernels else []
        self._small_ids = {id(p) for _, p in self._small}

    @property
    def noise(self) -> str:
        return self.direction.noise

    @property
    def perturbs(self) -> bool:
        """Whether anything but `w` itself is evaluated now."""
        return len(self.here.halves) > 0

    @property
    def span(self) -> dict[str, int]:
        """The halves that run now, as kernels take them."""
        assert self.here.span is not None
        start, stop = self.here.span
        return {"start": start, "stop": stop}

    def weights(self, w: Tensor, head: HeadParameter, dtype: torch.dtype | None) -> Tensor:
        """The weight at the points that run now: `[points, *w.shape]`; not to be written to where
        nothing is perturbed."""
        if not self.perturbs or head.scale == 0.0:
            self.update_now(w)
            return w.detach().to(dtype or w.dtype).expand(len(self.here), *w.shape)
        halves = self._small_halves(w, dtype)
        if halves is None:
            halves = self._large_halves(w, head, dtype)
        if head.still_row is not None:
            halves[:, head.still_row] = w.detach()[head.still_row]
        return halves

    def update_now(self, w: Tensor) -> None:
        """What waits for this weight is applied before it is read."""
        if self.pending is not None:
            self.pending.apply([w])

    def take_pending(self, w: Tensor) -> dict[str, Any] | None:
        """The update that `w` waits for, which the caller applies; None if there is none."""
        return None if self.pending is None else self.pending.take([w])

    # ---- large

    def _large_halves(self, w: Tensor, head: HeadParameter, dtype: torch.dtype | None) -> Tensor:
        if self.kernels and self._waits(w):
            strides = torch.empty_like(w, device="meta").stride()
            shape, strides = (len(self.here), *w.shape), (w.numel(), *strides)
            out = torch.empty_strided(shape, strides, dtype=dtype or w.dtype, device=w.device)
            self._stage([out], [w], [head], self.take_pending(w), **self.span)
            return out
        self.update_now(w)
        at = (self.key, self.eps, self.here, dtype, self.backend)
        direction = self._rank_one if head.name in self._ranked else self.direction
        return direction.weights(head, w, *at)

    def rows(
        self,
        rows: Tensor,
        head: HeadParameter,
        first: int,
        dtype: torch.dtype | None,
        pending: dict[str, Any] | None,
    ) -> Tensor:
        """Halves of the rows of a weight from `first` on: `[points, rows, ...]`."""
        shape = (len(self.here), *rows.shape)
        out = torch.empty(shape, dtype=dtype or rows.dtype, device=rows.device)
        if pending is not None and "state" in pending:
            own = slice(first, first + rows.shape[0])
            pending = {**pending, "state": [s[own] for s in pending["state"]]}
        self._stage([out], [rows], [head], pending, **self.span, first_row=first)
        return out

    def _stage(
        self,
        outs: list[Tensor],
        params: list[Tensor],
        heads: list[HeadParameter],
        pending: dict[str, Any] | None,
        start: int,
        stop: int,
        first_row: int = 0,
    ) -> None:
        with torch.no_grad():
            stage_(
                outs,
                params,
                self.key,
                self.eps,
                tensors=[head.index for head in heads],
                scales=[head.scale for head in heads],
                first_row=first_row,
                noise=self.noise,
                backend=self.backend,
                start=start,
                stop=stop,
                **(pending or {}),
            )

    # ---- small ones together

    def _small_halves(self, w: Tensor, dtype: torch.dtype | None) -> Tensor | None:
        """The halves of a small weight that run now, unless someone wrote to it since."""
        if id(w) not in self._small_ids:
            return None
        first = self.span["start"]
        halves, start, version = self._ready.get((id(w), dtype), (None, 0, 0))
        if halves is None or not start <= first < start + halves.shape[0]:
            self._stage_small(dtype)
            halves, start, version = self._ready[id(w), dtype]
        if w._version != version:
            return None
        return halves[first - start : first - start + len(self.here)]

    def _waits(self, w: Tensor) -> bool:
        return self.pending is not None and id(w) in self.pending.left

    def _stage_small(self, dtype: torch.dtype | None) -> None:
        """Stage all small weights in one launch (two where only some wait for an update): of all
        halves, or of this one where they are many."""
        few = len(self.points) <= MANY or len(self.here) == len(self.points)
        start, stop = (self.points if few else self.here).span or (0, 0)
        groups: dict[bool, list[tuple[HeadParameter, Tensor]]] = {}
        for head, p in self._small:
            groups.setdefault(self._waits(p), []).append((head, p))
        for waits, members in groups.items():
            heads, params = [head for head, _ in members], [p for _, p in members]
            outs = _room(params, stop - start, dtype)
            pending = self.pending.take(params) if waits and self.pending is not None else None
            self._stage(outs, params, heads, pending, start, stop)
            for p, out in zip(params, outs, strict=True):
                self._ready[id(p), dtype] = (out, start, p._version)


def _together(weights: Weights) -> Weights:
    """The small weights that one launch can stage."""
    small = [
        (head, p)
        for head, p in weights
        if p.numel() <= SMALL and head.scale != 0.0 and head.still_row is None
    ]
    return small if len({p.dtype for _, p in small}) <= 1 else []


def _room(params: Sequence[Tensor], count: int, dtype: torch.dtype | None) -> list[Tensor]:
    """Room for the halves of weights of one dtype, each in its memory format, in one memory."""
    places, total = [], 0
    for p in params:
        places.append(total)
        total += -(-count * p.numel() // ALIGN) * ALIGN
    memory = torch.empty(total, dtype=dtype or params[0].dtype, device=params[0].device)
    outs = []
    for p, place in zip(params, places, strict=True):
        strides = p.stride() if p.is_contiguous() else torch.empty_like(p, device="meta").stride()
        outs.append(memory.as_strided((count, *p.shape), (p.numel(), *strides), place))
    return outs
