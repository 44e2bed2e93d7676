"""One training forward of the pair: which halves run, their weights, and who consumed them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zo_kernels import perturbed_weights


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
        self.staging = True
        try:
            return self._stage(w, head, dtype, computed_in)
        finally:
            self.staging = False

    def _stage(
        self,
        w: Tensor,
        head: HeadParameter,
        dtype: torch.dtype | None,
        computed_in: torch.dtype | None,
    ) -> Tensor:
        self.consumed.add(head.name)
        if self.verify and self.tail_ran is not None:
            raise ValueError(
                f"the tail must come after the whole head: {self.tail_ran!r} (tail) ran before "
                f"{head.name!r} (head)"
            )
        if not self.perturb or head.scale == 0.0:
            return w.detach().to(dtype or w.dtype).expand(self.count, *w.shape)
        start = 0 if self.half is None else self.half
        halves = perturbed_weights(
            w,
            self.key,
            self.eps,
            tensor=head.index,
            start=start,
            stop=start + self.count,
            noise=self.noise,
            scale=head.scale,
            dtype=dtype,
            backend=self.backend,
        )
        if head.still_row is not None:
            halves[:, head.still_row] = w.detach()[head.still_row]
        if self.verify:
            _check_perturbed(w, halves.to(computed_in or halves.dtype), head, float(self.eps))
        return halves

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


def _check_perturbed(w: Tensor, halves: Tensor, head: HeadParameter, eps: float) -> None:
    """Refuse an eps that rounding to the compute dtype swallows."""
    if w.numel() and (halves[0] == w.detach().to(halves.dtype)).double().mean() > 0.5:
        raise ValueError(
            f"eps={eps:g} (scale {head.scale:g}) vanishes in {halves.dtype} for {head.name!r}: "
            "more than half of its elements do not move; use a larger eps or a wider dtype"
        )


__all__ = ["HeadParameter", "Pass"]
