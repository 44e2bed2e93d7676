"""The engine: a module, its plan, and what the first forward settled about it.

Module forwards are taken over during a pass. Nothing of the model is replaced for good: outside a
training forward it is the model it was. A first forward that shows something to settle (a parameter
read around its module, a module whose halves cannot be joined, a generator drawn from) changes the
plan and starts again, from the same buffers and generator state.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from elasticzo.buffers import (
    BufferSlot,
    BufferSnapshot,
    all_buffers,
    generator_state,
    set_generator_state,
)
from elasticzo.forward.doubts import Doubts
from elasticzo.forward.draws import DRAWS, alone
from elasticzo.forward.evaluator import Evaluator
from elasticzo.forward.halves import (
    KeepsState,
    NotByHalf,
    NotBySample,
    ToSettle,
    UsesGenerator,
    WritesInput,
)
from elasticzo.forward.layers.sequence import run_sequence
from elasticzo.forward.listening import Clean, heard_of
from elasticzo.forward.parts import Parts
from elasticzo.forward.passes import Pass, learn_by
from elasticzo.forward.plan import run_around, swap_around
from elasticzo.forward.precision import compute_dtype
from elasticzo.forward.state import Attributes, Place, Start
from elasticzo.forward.takeover import Locks, OtherPath
from elasticzo.forward.watch import Watch
from elasticzo.head import Kind
from elasticzo.points import Points
from elasticzo.settings import refuse_meta, refuse_transforms

STATE = (
    "the model keeps state in {}, which its next forward reads; its halves run one after the other "
    "from the same state, and leave that of the last"
)
HOST = (
    "learnt feedback runs the model twice a step, but it draws from the generators of Python or "
    "numpy: draw from torch's"
)
OTHER: Any = object()  # in place of outputs: the forward took another path


class Seen(NamedTuple):
    """An observed forward: the buffers and attributes that it moved."""

    current: Pass
    output: Any
    moved: list[BufferSlot]
    places: list[Place]


@contextmanager
def _unless_done(start: BufferSnapshot, attributes: Attributes | None) -> Iterator[None]:
    """Buffers and attributes are put back where what follows raises."""
    try:
        with start.unless_done():
            yield
    except BaseException:
        if attributes is not None:
            attributes.restore()
        raise


class Engine(Evaluator):
    """Settles the plan of a module in its first forward, and evaluates by it from then on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._known = list(self.module.modules())
        # Sets of layers that ran in a forward, by the circumstances in which they were watched.
        self._seen: dict[tuple[Any, ...], set[frozenset[str]]] = {}
        self._planned: list[Any] = []  # the plan by which they did
        self._locks = Locks()

    def unsettle(self) -> None:
        """What was seen is to be seen again."""
        self._seen, self._locks = {}, Locks()

    def settle(
        self,
        moved: list[BufferSlot],
        places: Sequence[Place] = (),
        path: frozenset[str] | None = None,
    ) -> None:
        """The plan holds as it is; a forward moves these buffers and attributes, and runs these
        layers (None: all)."""
        plan = [(name, one.by_half, len(one.swaps)) for name, one in self.plan.layers.items()]
        if self._planned != plan:
            self._planned, self._seen = plan, {}
        if path is None:
            layers = self.plan.layers.items()
            path = frozenset(name for name, one in layers if one.call is not run_sequence)
        self._seen.setdefault(self._circumstances(), set()).add(path)
        self.moving = self.moving + [slot for slot in moved if slot not in self.moving]
        self.places = self.places + [place for place in places if place not in self.places]
        self._locks = Locks()

    def settled(self) -> bool:
        """Whether the circumstances are those that the plan was seen in.

        Raises: RuntimeError where modules were replaced since wrapping.
        """
        modules, known = list(self.module.modules()), self._known
        if len(modules) != len(known) or any(
            a is not b for a, b in zip(modules, known, strict=True)
        ):
            raise RuntimeError(
                "modules of the model were added or replaced since it was wrapped: wrap it again"
            )
        return self._circumstances() in self._seen

    def _circumstances(self) -> tuple[Any, ...]:
        computed_in = compute_dtype(self.session.device, self.compute_dtype)
        training = tuple(m.training for m in self._known)
        return training, computed_in, torch.is_grad_enabled()

    def start(self) -> Start:
        """Where the module stands."""
        return Start(self.module, self.session.device, lambda: self.noticed)

    # ---- forwards

    def run(self, points: Points, args: Any, kwargs: Any) -> Any:
        """The outputs at the points, `[points, B, ...]`: a training forward of the session."""
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            self.compiled = True
        else:
            refuse_transforms()
        if self.settled():
            return self._run(points, args, kwargs)
        return self._first_run(points, args, kwargs)

    def settle_on(self, points: Points, args: Any, kwargs: Any) -> None:
        """What the first forward settles, of these inputs; all that it moves is put back."""
        refuse_transforms()
        session = self.session
        start = self.start()
        try:
            with session.untouched():
                session.forget()
                self._first_run(points, args, kwargs)
        finally:
            start.restore()

    def _kept(
        self, current: Pass, args: Any, kwargs: Any, output: Any, generator: Any
    ) -> tuple[Any, list[Any]]:
        """The output, and what a training forward leaves for the step."""
        if not isinstance(current.listener, Clean):
            return output, list(current.kept.values())
        modes = tuple(m.training for m in self._known)
        output, heard = heard_of(current, args, kwargs, output, generator, modes)
        return output, [heard]

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def _run(self, points: Points, args: Any, kwargs: Any) -> Any:
        session = self.session
        start = BufferSnapshot(self.moving)
        if session.before is None:
            session.before = start
        generator = generator_state(session.device) if self.feedback else None
        current = self.listened(self.new_pass(points), args, kwargs)
        attributes = None if current.attributes is None else current.attributes()
        try:
            with _unless_done(start, attributes):
                output = self._known_path(current, args, kwargs)
        except NotBySample as problem:
            raise ValueError(
                f"{problem.layer.name!r} cannot tell samples apart: {problem.why}; it could in the "
                "first forward"
            ) from None
        except UsesGenerator:  # the model began to, or another thread does: who is to be seen
            self.drawn, output = True, OTHER
        if output is OTHER:
            start.restore()
            if attributes is not None:
                attributes.restore()
            if current.started is not None and alone():
                set_generator_state(session.device, current.started)
            return self._first_run(points, args, kwargs)
        with _unless_done(start, attributes):
            session.flush()  # what this forward did not read
            output, kept = self._kept(current, args, kwargs, output, generator)
        session.note_forward(current.batch, kept)
        return output

    def _known_path(self, current: Pass, args: Any, kwargs: Any) -> Any:
        """The outputs; `OTHER` where weights are not for their layers alone, or where other layers
        run than in the forwards that were watched."""
        paths = self._seen[self._circumstances()]
        current.known = frozenset().union(*paths)
        try:
            # torch.compile guards on the parameters that it finds.
            of = (current, self.head, self.module, self.plan.layers)
            with nullcontext() if self.compiled else self._locks.closed(*of):
                output = self.evaluate(current, args, kwargs)
        except (OtherPath, NotByHalf):
            return OTHER
        return output if current.ran in paths else OTHER

    # ---- the first

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _first_run(self, points: Points, args: Any, kwargs: Any) -> Any:
        """A training forward under observation; its output, once the plan has settled."""
        refuse_meta(self.module)
        session = self.session
        session.flush()
        start, undo = self.start(), self.plan.saved(self.head)
        moving, self.moving, self.watching = self.moving, all_buffers(self.module), True
        try:
            current, output, moved, places = self._settled_by(points, args, kwargs, start)
        except BaseException:
            start.restore()
            undo()
            raise
        finally:
            self.moving, self.watching = moving, False
        self.settle(moved, places, frozenset(current.ran))
        self.drawn |= not torch.equal(start.generator, generator_state(session.device))
        session.keep_before(start.buffers.only(self.moving))
        output, kept = self._kept(current, args, kwargs, output, start.generator)
        session.note_forward(current.batch, kept)
        return output

    def _settled_by(self, points: Points, args: Any, kwargs: Any, start: Start) -> Seen:
        """Forwards under observation, until one changes nothing of the plan."""
        for _ in range(len(self.head.parameters) * len(self._known) + len(self._known) + 2):
            try:
                seen = self._observed(points, args, kwargs, start)
                if seen is not None:
                    return seen
            except NotBySample as problem:
                learn_by(self.head.kinds, problem.layer, Kind("weight", problem.why))
            except NotByHalf as problem:
                run_around(self.plan, self.head, self.module, problem.layer)
            except UsesGenerator:
                self.mixes_generator = True
                warnings.warn(DRAWS, stacklevel=6)
            except KeepsState as names:
                self.keeps_state = True
                warnings.warn(STATE.format(names), stacklevel=6)
            except WritesInput:
                self.shares = False
            start.restore()
        raise AssertionError("the plan of the model did not settle")

    def _observed(self, points: Points, args: Any, kwargs: Any, start: Start) -> Seen | None:
        """One forward under observation; None where it changed the plan."""
        watch = Watch(self.head, self.session.goes_on)
        current = self.listened(self.new_pass(points, watch), args, kwargs)
        current.parts = Parts()
        stacked = self.effective_pairing == "stacked" and len(points) > 1

        def one(inputs: Any) -> Parts:
            return self._alone(points.one(0), *inputs)

        def doubts(places: Sequence[Place] = ()) -> Doubts:
            of = (current, self.plan, self.head, self.module, start, places, one)
            return Doubts(*of, (args, kwargs))

        try:
            with watch.over(self.module, self.cut.tail_parameters):
                output = self.evaluate(current, args, kwargs)
        except ToSettle:
            raise
        except Exception:
            if stacked:
                start.restore()
                doubts().explain()
            raise
        wrong = watch.wrong(self.head)
        if wrong and (points.halves or self.feedback):
            swap_around(self.plan, self.head, self.module, min(wrong), later=bool(self._seen))
            return None
        moved, places = start.buffers.moved(), start.attributes.moved()
        self.draws = self.draws or start.attributes.drew()
        if self.draws and self.feedback:
            raise ValueError(HOST)
        with start.again():
            doubts(places).settle(output, stacked, self.feedback is not None)
        return Seen(current, output, moved, places)

    @torch.no_grad()
    def _alone(self, point: Points, args: Any, kwargs: Any) -> Parts:
        """What layers read at one point alone; its output is noted under no name."""
        current = self.new_pass(point)
        current.parts = parts = Parts()
        output = self.evaluate(current, args, kwargs)
        parts.note("", pytree.tree_map_only(Tensor, lambda t: t[0], output))
        return parts
