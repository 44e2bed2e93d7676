"""One forward of a module at points: its layers taken over, its halves stacked or one by one.

Module forwards are taken over during a pass. Nothing of the model is replaced for good: outside a
training forward it is the model it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from elasticzo.buffers import (
    BufferSlot,
    BufferSnapshot,
    address,
    all_buffers,
)
from elasticzo.cut import Cut
from elasticzo.directions import Direction
from elasticzo.feedback import Feedback
from elasticzo.forward.draws import Draws, alone, from_state
from elasticzo.forward.halves import (
    each_half,
    run_stacked,
)
from elasticzo.forward.listening import Clean, Heard, Instead, Listener, Order
from elasticzo.forward.passes import Pass
from elasticzo.forward.plan import around, build_plan
from elasticzo.forward.precision import parse_compute_dtype
from elasticzo.forward.staging import Staging
from elasticzo.forward.state import Attributes, Place
from elasticzo.forward.takeover import taken_over
from elasticzo.forward.trees import (
    InputsStay,
    join,
    samples_of,
    stack_inputs,
    stack_leaves,
    strip,
    unstack_outputs,
)
from elasticzo.forward.watch import Watch
from elasticzo.head import Head
from elasticzo.points import CLEAN, Points
from elasticzo.samples import Samples
from elasticzo.session import Session
from elasticzo.settings import refuse_sharded, refuse_transforms
from zo_kernels import resolve_backend


class Evaluator:
    """Evaluates a module at points, by a plan.

    Attributes:
        pairing: as the user wants it; `effective_pairing` is how the points run.
        plan: which function serves which module.
        moving, places: the buffers and attributes that a forward moves.
        mixes_generator: whether the model draws from torch's generator outside nn.Dropout.
        keeps_state: whether a forward reads what the one before it left in attributes.
        shares: whether layers may read one half of the input in place of all.
        compiled: whether torch.compile traces around the layers.
        draws: whether a forward draws from the generators of Python or numpy.
        watching: whether a first forward runs.
        drawn: whether anyone drew from torch's generator during a forward: beside other threads it
            is seen who. noticed: by whom, of the last pass.
        current: the pass that runs.
    """

    def __init__(
        self,
        module: nn.Module,
        cut: Cut,
        head: Head,
        session: Session,
        direction: Direction,
        samples: Samples,
        feedback: Feedback | None,
        backend: str,
        pairing: str,
        path: str | Mapping[str, str],
        directions: str | Mapping[str, str],
        wanted: torch.dtype | str | None,
    ) -> None:
        self.module, self.cut, self.head, self.session = module, cut, head, session
        self.direction, self._backend, self.pairing = direction, backend, pairing
        self.samples, self.feedback = samples, feedback
        self.compute_dtype, self.precision = parse_compute_dtype(wanted)
        self.plan = build_plan(module, head, path, directions)
        if pairing == "stacked" and self.plan.sequence_first and not cut.everything:
            raise ValueError(
                "pairing='stacked' needs the batch as dimension 0, but these modules have "
                f"batch_first=False: {', '.join(self.plan.sequence_first)}; use "
                "pairing='sequential'"
            )
        self.order = Order()  # of learnt feedback: when a step is done with weights
        self.residual: dict[str, Tensor] = {}
        self.moving: list[BufferSlot] = []
        self.places: list[Place] = []
        self.watching = self.draws = self.drawn = False
        self.noticed: Draws | None = None
        self.mixes_generator = self.keeps_state = self.compiled = False
        self.shares = True
        self.current: Pass | None = None

    @property
    def effective_pairing(self) -> str:
        """How the points run: those of a model with parameters at its root, one by one."""
        by_half = "" in self.plan.layers and self.plan.layers[""].by_half
        one_by_one = by_half or self.mixes_generator or self.keeps_state
        return "sequential" if one_by_one else self.pairing

    # ---- a pass

    def listened(self, current: Pass, args: Any, kwargs: Any) -> Pass:
        if self.feedback is not None:
            current.listener = Clean(around(self.plan, self.cut), (args, kwargs), self.feedback)
        return current

    def _attributes(self) -> Attributes:
        """Of what modules keep, what a forward changes; of one that is watched, all."""
        if self.watching:
            return Attributes(self.module.modules())
        return Attributes((), self.places, self.draws)

    def new_pass(self, points: Points, watch: Watch | None = None) -> Pass:
        """The state of a forward that evaluates these points."""
        session = self.session
        weights = list(self.head)
        session.seen = [(id(p), address(p)) for _, p in weights]
        for head, p in weights:
            refuse_sharded(head.name, p)
        backend, kinds = resolve_backend(self._backend, session.device), self.head.kinds
        looks = self.watching or self.drawn or self.feedback is not None
        self.noticed = Draws(session.device) if looks and not alone() else None
        return Pass(
            Staging(session, weights, kinds, self.direction, self.samples, points, backend),
            session.forwards,
            self.moving,
            self._attributes if self.places or self.draws or self.watching else None,
            wanted=self.compute_dtype,
            precision=self.precision,
            watch=watch,
            samples=self.samples,
            kinds=kinds,
            first=session.samples,
            shares=self.shares,
            draws=self.noticed,
        )

    @contextmanager
    def _taken_over(self, current: Pass) -> Iterator[None]:
        tail: dict[str, nn.Module] = {}
        if current.listener is not None:
            names = {n.rpartition(".")[0] for n in self.cut.tail_parameters}
            tail = {name: self.module.get_submodule(name) for name in names}
        try:
            with taken_over(self.plan.layers.values(), tail, current, self.compiled):
                yield
        finally:
            self.current = None

    def evaluate(self, current: Pass, args: Any, kwargs: Any) -> Any:
        n, self.current = current.halves, current
        current.batch = samples_of((args, kwargs))
        with ExitStack() as stack:
            stack.enter_context(self._taken_over(current))
            if current.draws is not None:
                stack.enter_context(current.draws)
            if self.effective_pairing == "stacked" and n > 1:
                stacked, current.unbatched, current.batched = stack_inputs((args, kwargs), n)
                return unstack_outputs(run_stacked(self.module, current, *stacked), n)
            args, kwargs = strip(args), strip(kwargs)
            if current.apart:
                args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            inputs = InputsStay((args, kwargs), current.watch is not None, current.apart)
            if isinstance(current.listener, Clean):
                stack.enter_context(Instead(current.listener))
            outputs = each_half(current, self.moving, lambda half: inputs.run(self.module, half))
            return join(outputs, stack_leaves)

    def clean(self, args: Any, kwargs: Any) -> Any:
        """The outputs at `w` alone, `[1, B, ...]`; buffers stay: statistics move with the points,
        once a micro-batch."""
        refuse_transforms()
        self.session.flush()
        buffers = BufferSnapshot(all_buffers(self.module))
        attributes = self._attributes()
        try:
            return self.evaluate(self.new_pass(CLEAN), args, kwargs)
        finally:
            attributes.restore()
            buffers.restore()

    def again(self, heard: Heard, here: slice, args: Any, kwargs: Any, listener: Listener) -> Any:
        """The forward of a clean pass once more, or of some of its samples; buffers and generators
        stay as they are."""
        device = self.session.device
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        buffers = BufferSnapshot(self.moving)
        current = self.new_pass(CLEAN)
        current.micro_batch, current.listener = heard.micro_batch, listener
        current.offset = here.start or 0
        current.first = heard.first + current.offset
        autocast, on = heard.autocast, heard.autocast is not None
        try:
            with (
                from_state(device, heard.generator),
                torch.autocast(device.type, dtype=autocast, enabled=on),
            ):
                return self.evaluate(current, args, kwargs)
        finally:
            buffers.restore()
