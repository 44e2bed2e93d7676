"""Where a run stands, what this step has seen, and the update that waits: one owner of it all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from elasticzo.buffers import BufferSnapshot, address
from elasticzo.directions import Direction, Move
from elasticzo.head import Head, Target
from elasticzo.settings import check_long, check_number


class Kept(NamedTuple):
    """A tensor of the step: dtype, value of a new run, whether it is zero again when a step ends,
    and the entry of a state that it is saved as (None: it is not)."""

    dtype: torch.dtype
    value: Any = 0
    reset: bool = False
    saved: str | None = None


# All that lives on the device. What is listed here is moved, reset, saved and put back with the
# rest; it keeps its address, which a captured step reads. A run in integers has the integers alone.
TENSORS = {
    "key": Kept(torch.int64, [0, 0]),  # seed, step
    "next": Kept(torch.int64, [0, 1]),  # what the key grows by
    "eps": Kept(torch.float64),  # perturbation scale
    "found": Kept(torch.float32, reset=True),  # 1 where a loss of this step is not finite
    "last_found": Kept(torch.float32),  # the same of the step before
    "skips": Kept(torch.int64, saved="skipped"),  # steps skipped
}
# What the host knows of this step.
FLAGS: dict[str, Any] = {
    "forwards": 0,  # training forwards since the last step
    "samples": 0,  # in those
    "kept": (),  # what they left for the step to learn from
    "gated": False,  # whether `found` says what the tail needs to know
    "before": None,  # buffers as the last step left them
    "seen": (),  # weights of the head as the last forward read them
}


class Session:
    """The state of a run: see `TENSORS` and `FLAGS`, which are attributes here.

    Attributes:
        stepped: whether a step was done since wrapping.
        learns, learnt: whether a run learns more than weights, and what, by name (the matrices of
            learnt feedback).
        pending: an update that waits for the next forward.
    """

    key: Tensor
    next: Tensor
    eps: Tensor
    found: Tensor
    last_found: Tensor
    skips: Tensor
    forwards: int
    samples: int
    kept: tuple[Any, ...]
    gated: bool
    before: BufferSnapshot | None
    seen: Sequence[tuple[int, int]]

    def __init__(self, seed: int, eps: float | None, device: torch.device) -> None:
        integer = eps is None
        self._kept = {
            name: kept
            for name, kept in TENSORS.items()
            if not (integer and kept.dtype.is_floating_point)
        }
        for name in TENSORS:
            setattr(self, name, None)
        for name, kept in self._kept.items():
            setattr(self, name, torch.tensor(kept.value, dtype=kept.dtype, device=device))
        self._seed, self._eps, self._start = seed, eps, 0
        self.key[0] = seed
        if eps is not None:
            self.eps.fill_(eps)
        self.stepped = False
        self.learns = False
        self.learnt: dict[str, Tensor] = {}
        self.pending: Pending | None = None
        self._begin()

    @property
    def seed(self) -> int:
        return self._seed

    @property
    def scale(self) -> float:
        """eps as the host knows it."""
        assert self._eps is not None
        return self._eps

    @property
    def goes_on(self) -> bool:
        """Whether the run has steps behind it, here or where it was saved."""
        return self.stepped or self._start > 0

    @property
    def device(self) -> torch.device:
        return self.key.device

    def tensors(self) -> Iterator[Tensor]:
        """All that lives on the device."""
        yield from (getattr(self, name) for name in self._kept)
        yield from self.learnt.values()

    # ---- a step

    def note_forward(self, samples: int | None = None, kept: Sequence[Any] = ()) -> None:
        """A training forward ran, over so many samples; what it kept, the step will want."""
        self.forwards += 1
        self.samples += samples or 0
        self.kept = (*self.kept, *kept)

    def keep_before(self, buffers: BufferSnapshot) -> None:
        """These are the buffers as the last step left them, of those that are not known yet."""
        if self.before is None:
            self.before = buffers
        else:
            self.before.add(buffers)

    def note_losses(self, finite: Tensor) -> None:
        """A backward looked at losses: `[]` bool."""
        self.found.copy_(torch.maximum(self.found, (~finite).to(torch.float32)))
        self.gated = True

    def check_ready(self, head: Head, known: set[int] | None = None) -> None:
        """Raise unless there was a forward whose weights are the present ones, and `known`."""
        if self.forwards == 0:
            raise RuntimeError(
                "zo.step without a training forward since the last step: call model(x) in train() "
                "first"
            )
        if known is None:
            return
        for (one, p), seen in zip(head, self.seen, strict=True):
            if id(p) not in known:
                raise RuntimeError(REPLACED.format(one.name))
            if (id(p), address(p)) != seen:
                raise RuntimeError(
                    f"head parameter {one.name!r} was replaced or moved between the forward and "
                    "zo.step: the losses belong to other weights"
                )

    def not_finite(self, losses: Tensor, *more: Tensor) -> Tensor:
        """1 where this step is to be skipped: `[]` float32. `more`: what else must be finite."""
        of = torch.cat([t.flatten() for t in (losses, *more)]) if more else losses
        found = (~torch.isfinite(of).all()).to(torch.float32)
        return torch.maximum(found, self.found) if self.gated else found

    def gate(self, tail: Iterator[Tensor]) -> Tensor:
        """1 where the tail's optimiser must skip this step: a loss that `backward` looked at, or a
        gradient, is not finite."""
        # Where zo.step came first, it has the losses' flag.
        found = self.last_found if self.forwards == 0 and self.stepped else self.found
        there = (p.grad for p in tail if p.grad is not None and p.grad.numel())
        grads = [grad._values() if grad.is_sparse else grad for grad in there]
        if not grads:
            return found
        sizes = torch._foreach_norm(grads, float("inf"))  # one read, and no sum that overflows
        finite = torch.isfinite(torch.stack(list(sizes))).all()
        return torch.maximum(found, (~finite).to(torch.float32))

    def advance(self, found: Tensor | None) -> None:
        """On to the next `z`; buffers that moved go back where the step was skipped."""
        if found is not None:
            if self.before:
                self.before.restore_where(found != 0)
            self.skips += found.to(torch.int64)
            self.last_found.copy_(found)
        self.stepped = True
        self.key.add_(self.next)
        self.forget()

    def forget(self) -> None:
        """What is known of this step belongs to other weights now, or to the step before."""
        for name, kept in self._kept.items():
            if kept.reset:
                getattr(self, name).zero_()
        self._begin()

    def _begin(self) -> None:
        for name, value in FLAGS.items():
            setattr(self, name, value)

    # ---- the update that waits

    def flush(self) -> None:
        """Apply it, where there is one."""
        if self.pending is not None:
            self.pending.finish()

    # ---- a run

    def go_to(self, seed: int, step: int) -> None:
        """Take the noise of another place: a checkpoint's, or a log's end."""
        self._seed, self._start = seed, step
        self.key.copy_(torch.tensor([seed, step], dtype=torch.int64, device="cpu"))
        self.forget()

    def saved(self) -> dict[str, Any]:
        """Entries of a state. Reads the device."""
        found = {k.saved: getattr(self, name).tolist() for name, k in self._kept.items() if k.saved}
        learnt = {"learnt": {name: t.clone() for name, t in self.learnt.items()}}
        return found | (learnt if self.learns else {})

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError where an entry of a state cannot be taken."""
        for name in ("seed", "step"):
            check_long(name, state[name])
        for kept in self._kept.values():
            if kept.saved and not kept.dtype.is_floating_point:
                check_long(kept.saved, state[kept.saved])
            elif kept.saved:
                check_number(kept.saved, state[kept.saved], "a number", lambda v: True)

    def load(self, state: Mapping[str, Any]) -> None:
        """Take the entries of a state."""
        for name, kept in self._kept.items():
            if kept.saved:
                getattr(self, name).copy_(
                    torch.tensor(state[kept.saved], dtype=kept.dtype, device="cpu")
                )
        learnt = state.get("learnt", {})
        self.learnt = {name: t.to(self.device, copy=True) for name, t in learnt.items()}

    def to(self, device: torch.device) -> None:
        self.flush()
        self.pending, self.before = None, None
        for name in self._kept:
            setattr(self, name, getattr(self, name).to(device))
        self.learnt = {name: t.to(device) for name, t in self.learnt.items()}

    @contextmanager
    def untouched(self, eps: float | None = None) -> Iterator[None]:
        """Afterwards as before; meanwhile at another eps, if one is given."""
        values = [(t, t.clone()) for t in self.tensors()]
        learnt = dict(self.learnt)
        flags = {name: getattr(self, name) for name in (*FLAGS, "stepped")}
        if eps is not None:
            self.eps.fill_(eps)
        try:
            yield
        finally:
            self.learnt = learnt
            for t, value in values:
                t.copy_(value)
            for name, value in flags.items():
                setattr(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        state = {**self.__dict__, "pending": None}
        if self.kept:  # what layers keep of a forward is of this model alone: a copy begins anew
            state |= {**FLAGS, "found": torch.zeros_like(self.found)}
        return state


REPLACED = (
    "head parameter {!r} is not the one this optimiser was built on: it was replaced; build it "
    "after loading or assigning parameters"
)
_WAITING: WeakSet[Pending] = WeakSet()


def flush_others(model: nn.Module) -> None:
    """Apply what waits for a parameter of this model in a wrapper that had it before."""
    mine = {id(p) for p in model.parameters()}
    for pending in list(_WAITING):
        if mine & pending.left.keys():
            pending.finish()


class Pending:
    """An update of the head that waits for the next training forward, which writes weights anyway.

    Its tensors live as long as the optimiser, so that a captured step finds them; where nothing
    waits, `skip` is 1 and applying it changes nothing.

    Attributes:
        left: places in `targets` of the weights that have not taken it, by id of the weight.
    """

    def __init__(
        self, targets: Sequence[Target], direction: Direction, like: Move, backend: str
    ) -> None:
        self.targets, self.direction, self.backend = targets, direction, backend
        names = ("key", "coeff", "lr", "weight_decay", "skip", "settings")
        of = {name: getattr(like, name) for name in names}
        empty: dict[str, Any] = {k: t if t is None else torch.zeros_like(t) for k, t in of.items()}
        self.move = replace(like, **empty)
        self.move.skip.fill_(1.0)
        self.left: dict[int, int] = {}
        _WAITING.add(self)

    def put(self, move: Move) -> None:
        """Take note of one update of all targets."""
        assert not self.left, "an update is pending already"
        for mine, given in zip(self.move.tensors(), move.tensors(), strict=True):
            mine.copy_(given)
        self.mark()

    def mark(self) -> None:
        """Every target has the update to come."""
        self.left = {id(t.w): i for i, t in enumerate(self.targets)}

    def take(self, weights: Sequence[Tensor]) -> dict[str, Any] | None:
        """What `stage_` needs to apply the update to these weights, which then have it; None where
        they have it, or where the direction has no kernel and they just took it."""
        places = [self.left[id(w)] for w in weights if id(w) in self.left]
        if not places or not self.direction.dense:
            self.apply(weights)
            return None
        assert len(places) == len(weights), "some of these weights have the update, some have not"
        for w in weights:
            del self.left[id(w)]
        targets, move = [self.targets[i] for i in places], self.move.of(places)
        names = ("coeff", "lr", "weight_decay", "skip")
        numbers = {name: getattr(move, name) for name in names}
        groups = [t.group for t in targets]
        return {"before": move.key, **numbers, "groups": groups, **move.ruled(targets)}

    def apply(self, weights: Sequence[Tensor]) -> None:
        """Apply the update to those of these weights that have not taken it, in one launch."""
        places = [self.left.pop(id(w)) for w in weights if id(w) in self.left]
        if places:
            targets = [self.targets[i] for i in places]
            self.direction.update_(targets, self.move.of(places), self.backend)

    def finish(self) -> None:
        """Apply it to all that have not taken it; afterwards nothing is pending."""
        self.apply([t.w for t in self.targets])
        self.move.skip.fill_(1.0)

    def cancel(self, to_come: bool) -> None:
        """What waits was a rehearsal; `to_come`: a graph that was recorded will put one here."""
        self.move.skip.fill_(1.0)
        if not to_come:
            self.left = {}
