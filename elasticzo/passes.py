"""One training forward of the pair: which halves run, their weights, and who consumed them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from elasticzo.deferred import Deferred
from elasticzo.state import has_values
from zo_kernels import perturbed_weights, stage_

SMALL = 1 << 14  # elements: weights up to this size are staged together, in one launch
MANY = 8  # halves; up to here small weights are staged for all of them at once
ALIGN = 64  # elements between the places of two weights in one memory


@dataclass(frozen=True)
class HeadParameter:
    """A perturbed parameter: its name, its place in the model's named_parameters, its scale.

    `still_row` is the row of an embedding's padding token, which no gradient moves.
    """

    name: str
    index: int
    scale: float
    still_row: int | None = None


@dataclass
class Follow:
    """What follows a layer in its `nn.Sequential`, and may be done by the layer's own kernel."""

    module: nn.Module
    relu: bool
    pool: bool
    modules: int  # how many they are
    done: bool = False


@dataclass
class Pass:
    """State of one training forward.

    Halves are numbered `0 .. halves - 1`: `2q` is + and `2q + 1` is - of query q. `half` is the one
    that runs now, or None while all of them travel together, stacked along the batch.
    """

    key: Tensor  # [2] int64
    eps: Tensor  # [] fp64
    noise: str
    backend: str
    halves: int
    micro_batch: int
    half: int | None = None
    perturb: bool = True  # False: a clean pass, and Full BP
    verify: bool = False  # the first forward checks that every head parameter was perturbed
    consumed: set[str] = field(default_factory=set)
    swapped: set[tuple[int, str]] = field(default_factory=set)
    watched: dict[int, str] = field(default_factory=dict)  # id of a swapped weight -> its name
    held: list[Tensor] = field(default_factory=list)  # keeps those ids unique while verifying
    raw: dict[int, str] = field(default_factory=dict)  # id of a head parameter itself -> its name
    read_raw: set[str] = field(default_factory=set)  # those read without perturbation
    staging: bool = False  # while the pass itself reads them
    # Stacked inputs by id, as (stacked, its version, one half): they carry the batch, and while
    # nobody wrote to them their halves agree.
    batched: dict[int, tuple[Tensor, int, Tensor]] = field(default_factory=dict)
    unbatched: set[int] = field(default_factory=set)
    calls: dict[tuple[int, int | None], int] = field(default_factory=dict)
    tail_ran: str | None = None
    generator_state: Tensor | None = None
    wanted: torch.dtype | None = None  # compute dtype the user named
    precision: str | None = None  # of float32 products, where the user named one
    small: Sequence[tuple[HeadParameter, Tensor]] = ()  # staged together
    # Halves of small weights by id and dtype, the first of them, the weight's version.
    ready: dict[tuple[int, torch.dtype | None], tuple[Tensor, int, int]] = field(
        default_factory=dict
    )
    deferred: Deferred | None = None  # the update that the weights still wait for
    follow: Follow | None = None

    def __post_init__(self) -> None:
        self.small_ids = {id(p) for _, p in self.small}

    @property
    def count(self) -> int:
        """Halves that a module called now serves."""
        return self.halves if self.half is None else 1

    def stage(
        self,
        w: Tensor,
        head: HeadParameter,
        dtype: torch.dtype | None = None,
        computed_in: torch.dtype | None = None,
    ) -> Tensor:
        """Perturbed weights of the halves that run now: `[count, *w.shape]`.

        `computed_in` is the dtype that autocast will round them to, where it is not `dtype`.
        """
        with self.unwatched():
            return self._stage(w, head, dtype, computed_in)

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """The pass itself reads weights: nothing for the watch over who reads them unperturbed."""
        self.staging = True
        try:
            yield
        finally:
            self.staging = False

    def _stage(
        self,
        w: Tensor,
        head: HeadParameter,
        dtype: torch.dtype | None,
        computed_in: torch.dtype | None,
    ) -> Tensor:
        self._consume(head)
        if not self.perturb or head.scale == 0.0:
            if self.deferred is not None:
                self._update_now([w])
            return w.detach().to(dtype or w.dtype).expand(self.count, *w.shape)
        halves = self._small_halves(w, dtype)
        if halves is None:
            halves = self._stage_large(w, head, dtype)
        if head.still_row is not None:
            halves[:, head.still_row] = w.detach()[head.still_row]
        if self.verify:
            self._check_perturbed(w, halves.to(computed_in or halves.dtype), head)
        return halves

    def _consume(self, head: HeadParameter) -> None:
        self.consumed.add(head.name)
        if self.verify and self.tail_ran is not None:
            raise ValueError(
                f"the tail must come after the whole head: {self.tail_ran!r} (tail) ran before "
                f"{head.name!r} (head)"
            )

    @property
    def _span(self) -> dict[str, Any]:
        start = 0 if self.half is None else self.half
        return {"start": start, "stop": start + self.count}

    def _stage_large(self, w: Tensor, head: HeadParameter, dtype: torch.dtype | None) -> Tensor:
        if self._waits(w):
            strides = torch.empty_like(w, device="meta").stride()
            shape, strides = (self.count, *w.shape), (w.numel(), *strides)
            out = torch.empty_strided(shape, strides, dtype=dtype or w.dtype, device=w.device)
            self._stage_into([out], [w], [head], self.take_pending(w), **self._span)
            return out
        return perturbed_weights(
            w,
            self.key,
            self.eps,
            tensor=head.index,
            noise=self.noise,
            scale=head.scale,
            dtype=dtype,
            backend=self.backend,
            **self._span,
        )

    def _stage_into(
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

    def _small_halves(self, w: Tensor, dtype: torch.dtype | None) -> Tensor | None:
        """The halves of a small weight that run now, unless someone wrote to it since."""
        if id(w) not in self.small_ids:
            return None
        first = 0 if self.half is None else self.half
        halves, start, version = self.ready.get((id(w), dtype), (None, 0, 0))
        if halves is None or not start <= first < start + halves.shape[0]:
            self._stage_small(dtype)
            halves, start, version = self.ready[id(w), dtype]
        if w._version != version:
            return None
        return halves[first - start : first - start + self.count]

    def _waits(self, w: Tensor) -> bool:
        return self.deferred is not None and id(w) in self.deferred.left

    def _stage_small(self, dtype: torch.dtype | None) -> None:
        """Stage all small weights in one launch (two where only some wait for an update): of all
        halves, or of this one where they are many."""
        start, stop = 0, self.halves
        if self.half is not None and self.halves > MANY:
            start, stop = self.half, self.half + 1
        groups: dict[bool, list[tuple[HeadParameter, Tensor]]] = {}
        for head, p in self.small:
            groups.setdefault(self._waits(p), []).append((head, p))
        for waits, members in groups.items():
            heads, params = [head for head, _ in members], [p for _, p in members]
            outs = _room(params, stop - start, dtype)
            pending = None
            if waits:
                taken = [self.take_pending(p) for p in params]
                pending = {**(taken[0] or {})}
                pending["groups"] = [t["groups"][0] for t in taken if t is not None]
            self._stage_into(outs, params, heads, pending, start, stop)
            for p, out in zip(params, outs, strict=True):
                self.ready[id(p), dtype] = (out, start, p._version)

    def stage_rows(
        self,
        rows: Tensor,
        head: HeadParameter,
        first: int,
        dtype: torch.dtype | None,
        pending: dict[str, Any] | None,
    ) -> Tensor:
        """Halves of the rows of a weight from `first` on: `[count, rows, ...]`."""
        self._consume(head)
        shape = (self.count, *rows.shape)
        out = torch.empty(shape, dtype=dtype or rows.dtype, device=rows.device)
        self._stage_into([out], [rows], [head], pending, **self._span, first_row=first)
        return out

    def note_fused(self, w: Tensor, head: HeadParameter, dtype: torch.dtype | None) -> None:
        """A kernel is about to read `w` and to perturb it itself."""
        self._consume(head)
        if self.deferred is not None:
            self._update_now([w])
        if self.verify and head.scale != 0.0:
            halves = perturbed_weights(
                *(w, self.key, self.eps),
                tensor=head.index,
                noise=self.noise,
                scale=head.scale,
                dtype=dtype,
                backend=self.backend,
            )
            self._check_perturbed(w, halves, head)

    def take_pending(self, w: Tensor) -> dict[str, Any] | None:
        """The update that `w` waits for, which the caller applies; None if there is none."""
        return None if self.deferred is None else self.deferred.take(w)

    def _update_now(self, params: list[Tensor]) -> None:
        assert self.deferred is not None
        self.deferred.apply(params, self.noise, self.backend)

    def _check_perturbed(self, w: Tensor, halves: Tensor, head: HeadParameter) -> None:
        """Refuse an eps that rounding to the compute dtype swallows."""
        half, still, named = halves[0], w.detach().to(halves.dtype), str(halves.dtype)
        if self.precision == "tf32" and w.dim() > 1 and halves.dtype == torch.float32:
            half, still = (_tf32(t) for t in (half, still))
            named = "tf32"
        stay = w.numel() - torch.count_nonzero(half != still)  # `sum` would copy to int64
        if w.numel() and has_values(stay) and stay > 0.5 * w.numel():
            raise ValueError(
                f"eps={float(self.eps):g} (scale {head.scale:g}) vanishes in {named} for "
                f"{head.name!r}: more than half of its elements do not move; use a larger eps or a "
                "wider dtype"
            )

    @contextmanager
    def only(self, half: int) -> Iterator[None]:
        """Run one half: everything called inside serves it alone."""
        before, tail_ran = self.half, self.tail_ran
        self.half = half
        try:
            yield
        finally:
            self.half = before
            if half + 1 < self.halves:  # the next half starts where this one did
                self.tail_ran = tail_ran

    def original(self, x: Tensor) -> Tensor | None:
        """One half of a stacked input that is still as the wrapper made it, else None."""
        stacked, version, half = self.batched.get(id(x), (None, 0, None))
        return half if stacked is x and x._version == version else None

    def next_call(self, module: nn.Module) -> int:
        """How often `module` was called before in this half: distinguishes reused modules."""
        at = (id(module), self.half)
        self.calls[at] = self.calls.get(at, -1) + 1
        return self.calls[at]


def _tf32(t: Tensor) -> Tensor:
    """What tensor cores read of fp32: a mantissa of 10 bits."""
    return t.contiguous().view(torch.int32) & -0x2000


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


__all__ = ["SMALL", "Follow", "HeadParameter", "Pass"]
