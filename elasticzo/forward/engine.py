"""The engine: a module, its plan, and what the first forward settled about it.

Module forwards are taken over during a pass. Nothing of the model is replaced for good: outside a
training forward it is the model it was. A first forward that shows something to settle (a parameter
read around its module, a module whose halves cannot be joined, a generator drawn from) changes the
plan and starts again, from the same buffers and generator state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from elasticzo.buffers import (
    BufferSlot,
    BufferSnapshot,
    address,
    all_buffers,
    generator_state,
    set_generator_state,
)
from elasticzo.cut import Cut
from elasticzo.directions import Direction
from elasticzo.feedback import Feedback
from elasticzo.forward.halves import NotByHalf, NotBySample, UsesGenerator, each_half, run_stacked
from elasticzo.forward.layers.sequence import run_sequence
from elasticzo.forward.listening import Clean, Heard, Instead, Listener, Order, floats, versions
from elasticzo.forward.passes import Layer, Pass, learn_by
from elasticzo.forward.plan import around, build_plan, owner_of, promote
from elasticzo.forward.precision import compute_dtype, parse_compute_dtype
from elasticzo.forward.staging import Staging
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
from elasticzo.head import Head, Kind
from elasticzo.points import CLEAN, Points
from elasticzo.samples import Samples
from elasticzo.session import Session
from elasticzo.settings import refuse_sharded
from zo_kernels import resolve_backend

DRAWS = (
    "the model draws from torch's generator outside nn.Dropout; its halves run one after the other "
    "from the same generator state"
)


class Engine:
    """Evaluates a module at the points of an estimator.

    Attributes:
        pairing: as the user wants it; `effective_pairing` is how the points run.
        plan: which function serves which module.
        moving: the buffers that a forward moves.
        mixes_generator: whether the model draws from torch's generator outside nn.Dropout.
        compiled: whether torch.compile traces around the layers.
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
        self._known = list(module.modules())
        self._settled: tuple[Any, ...] | None = None  # circumstances that the plan was seen in
        self.moving: list[BufferSlot] = []
        self.mixes_generator = self.compiled = False
        self.current: Pass | None = None

    @property
    def effective_pairing(self) -> str:
        """How the points run: those of a model with parameters at its root, one by one."""
        by_half = "" in self.plan.layers and self.plan.layers[""].by_half
        return "sequential" if by_half or self.mixes_generator else self.pairing

    def settle(self, moving: list[BufferSlot]) -> None:
        """The plan holds as it is, and a forward moves these buffers."""
        self.moving, self._settled = moving, self._circumstances()

    def unsettle(self) -> None:
        """What was seen is to be seen again."""
        self._settled = None

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
        return self._settled == self._circumstances()

    def _circumstances(self) -> tuple[Any, ...]:
        computed_in = compute_dtype(self.session.device, self.compute_dtype)
        training = tuple(m.training for m in self._known)
        return training, computed_in, torch.is_grad_enabled()

    # ---- forwards

    def run(self, points: Points, args: Any, kwargs: Any) -> Any:
        """The outputs at the points, `[points, B, ...]`: a training forward of the session."""
        if torch.compiler.is_compiling():
            self.compiled = True
        if self.settled():
            return self._run(points, args, kwargs)
        return self._first_run(points, args, kwargs)

    def settle_on(self, points: Points, args: Any, kwargs: Any) -> None:
        """What the first forward settles, of these inputs; all that it moves is put back."""
        session, device = self.session, self.session.device
        snapshot, generator = BufferSnapshot(all_buffers(self.module)), generator_state(device)
        try:
            with session.untouched():
                session.forget()
                self._first_run(points, args, kwargs)
        finally:
            snapshot.restore()
            set_generator_state(device, generator)

    def clean(self, args: Any, kwargs: Any) -> Any:
        """The outputs at `w` alone, `[1, B, ...]`; buffers stay: statistics move with the points,
        once a micro-batch."""
        self.session.flush()
        buffers = BufferSnapshot(all_buffers(self.module))
        output = self._evaluate(self.new_pass(CLEAN), args, kwargs)
        buffers.restore()
        return output

    def again(self, heard: Heard, here: slice, args: Any, kwargs: Any, listener: Listener) -> Any:
        """The forward of a clean pass once more, or of some of its samples; buffers and generators
        stay as they are."""
        device = self.session.device
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        buffers, generator = BufferSnapshot(self.moving), None
        current = self.new_pass(CLEAN)
        current.micro_batch, current.listener = heard.micro_batch, listener
        current.offset = here.start or 0
        current.first = heard.first + current.offset
        if heard.generator is not None:
            generator = generator_state(device)
            set_generator_state(device, heard.generator)
        autocast, on = heard.autocast, heard.autocast is not None
        try:
            with torch.autocast(device.type, dtype=autocast, enabled=on):
                return self._evaluate(current, args, kwargs)
        finally:
            buffers.restore()
            if generator is not None:
                set_generator_state(device, generator)

    def _kept(
        self, current: Pass, args: Any, kwargs: Any, output: Any, generator: Any
    ) -> tuple[Any, list[Any]]:
        """The output, and what a training forward leaves for the step."""
        clean = current.listener
        if not isinstance(clean, Clean):
            return output, list(current.kept.values())
        if current.batch is None or any(t.shape[1:2] != (current.batch,) for t in floats(output)):
            shapes = [list(t.shape[1:]) for t in floats(output)]
            raise ValueError(
                f"learnt feedback needs outputs whose dimension 0 is the batch ({current.batch}), "
                f"got shapes {shapes}"
            )
        output, outputs = clean.outputs(output)
        device = self.session.device
        drew = not torch.equal(generator, generator_state(device))
        on = torch.is_autocast_enabled(device.type)
        heard = Heard(
            args=args,
            kwargs=kwargs,
            versions=versions((args, kwargs, outputs)),
            micro_batch=current.micro_batch,
            first=current.first,
            samples=current.batch,
            generator=generator if drew else None,
            autocast=torch.get_autocast_dtype(device.type) if on else None,
            modes=tuple(m.training for m in self._known),
            outputs=outputs,
            **clean.left(),
        )
        return output, [heard]

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]
    def _run(self, points: Points, args: Any, kwargs: Any) -> Any:
        session = self.session
        if session.before is None:
            session.before = BufferSnapshot(self.moving)
        try:
            generator = generator_state(session.device) if self.feedback else None
            current = self._listened(self.new_pass(points), args, kwargs)
            output = self._evaluate(current, args, kwargs)
            session.flush()  # what this forward did not read
        except NotBySample as problem:
            session.before.restore()
            raise ValueError(
                f"{problem.layer.name!r} cannot tell samples apart: {problem.why}; it could in the "
                "first forward"
            ) from None
        except UsesGenerator:
            self.mixes_generator = True
            session.before.restore()
            raise RuntimeError(f"{DRAWS}; it did not before: repeat this step") from None
        output, kept = self._kept(current, args, kwargs, output, generator)
        session.note_forward(current.batch, kept)
        return output

    def _listened(self, current: Pass, args: Any, kwargs: Any) -> Pass:
        if self.feedback is not None:
            current.listener = Clean(around(self.plan, self.cut), (args, kwargs), self.feedback)
        return current

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _first_run(self, points: Points, args: Any, kwargs: Any) -> Any:
        """A training forward under observation; its output, once the plan has settled."""
        session, device = self.session, self.session.device
        session.flush()
        snapshot = BufferSnapshot(all_buffers(self.module))
        generator = generator_state(device)
        self.moving = all_buffers(self.module)
        for _ in range(len(self.head.parameters) * len(self._known) + 2):
            watch = Watch(self.head)
            try:
                with watch.over(self.module, self.cut.tail_parameters):
                    current = self._listened(self.new_pass(points, watch), args, kwargs)
                    output = self._evaluate(current, args, kwargs)
                if self._settles(watch, points):
                    self.settle(snapshot.moved())
                    if session.before is None:
                        session.before = snapshot.only(self.moving)
                    output, kept = self._kept(current, args, kwargs, output, generator)
                    session.note_forward(current.batch, kept)
                    return output
            except NotBySample as problem:
                learn_by(self.head.kinds, problem.layer, Kind("weight", problem.why))
            except NotByHalf as problem:
                self._promote(problem.layer.name, [h.name for *_, h in problem.layer.swaps])
            except UsesGenerator:
                self.mixes_generator = True
                warnings.warn(DRAWS, stacklevel=5)
            except Exception:
                snapshot.restore()
                raise
            snapshot.restore()
            set_generator_state(device, generator)
        raise AssertionError("the plan of the model did not settle")

    def new_pass(self, points: Points, watch: Watch | None = None) -> Pass:
        """The state of a forward that evaluates these points."""
        session = self.session
        weights = list(self.head)
        session.seen = [(id(p), address(p)) for _, p in weights]
        for head, p in weights:
            refuse_sharded(head.name, p)
        backend, kinds = resolve_backend(self._backend, session.device), self.head.kinds
        return Pass(
            Staging(session, weights, kinds, self.direction, self.samples, points, backend),
            session.forwards,
            self.moving,
            wanted=self.compute_dtype,
            precision=self.precision,
            watch=watch,
            samples=self.samples,
            kinds=kinds,
            first=session.samples,
        )

    def _evaluate(self, current: Pass, args: Any, kwargs: Any) -> Any:
        n, self.current = current.halves, current
        current.batch = samples_of((args, kwargs))
        with ExitStack() as stack:
            stack.enter_context(self._taken_over(current))
            if self.effective_pairing == "stacked" and n > 1:
                stacked, current.unbatched, current.batched = stack_inputs((args, kwargs), n)
                return unstack_outputs(run_stacked(self.module, current, *stacked), n)
            inputs = InputsStay((strip(args), strip(kwargs)))
            if isinstance(current.listener, Clean):
                stack.enter_context(Instead(current.listener))
            outputs = each_half(current, self.moving, lambda half: inputs.run(self.module, half))
            return join(outputs, stack_leaves)

    @contextmanager
    def _taken_over(self, current: Pass) -> Iterator[None]:
        """Take over the forwards of the plan's layers for one pass.

        Where the model around them is compiled, they are marked as not to be traced.
        """
        call = _call_untraced if self.compiled else _call
        patched: list[tuple[nn.Module, Any]] = []
        with ExitStack() as stack:
            stack.callback(self._hand_back, patched)
            for layer in self.plan.layers.values():
                if layer.call is run_sequence and (self.compiled or current.watch is not None):
                    continue  # nothing to be traced around, or watched
                module = layer.module
                patched.append((module, module.__dict__.get("forward")))
                module.__dict__["forward"] = partial(call, current, layer, module.forward)
            if current.listener is not None:
                for name in {n.rpartition(".")[0] for n in self.cut.tail_parameters}:
                    module = self.module.get_submodule(name)
                    patched.append((module, module.__dict__.get("forward")))
                    run = partial(_call_tail, current.listener, name, module.forward)
                    module.__dict__["forward"] = run
            yield

    def _hand_back(self, patched: Sequence[tuple[nn.Module, Any]]) -> None:
        self.current = None
        for module, before in reversed(patched):
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before

    # ---- what a first forward settles

    def _settles(self, watch: Watch, points: Points) -> bool:
        """Whether each weight of the head was read perturbed, and none as it is; else the plan
        changes."""
        wrong = watch.wrong(self.head)
        if not wrong or not (points.halves or self.feedback):
            return True
        name = min(wrong)
        self._promote(owner_of(self.plan, name), [name])
        return False

    def _promote(self, layer: str, parameters: Sequence[str]) -> None:
        if layer:
            promote(self.plan, self.head, self.module, layer, parameters)
            return
        if not parameters:
            raise ValueError(
                "the halves of this model cannot run stacked: use pairing='sequential'"
            )
        raise ValueError(
            f"head parameter {parameters[0]!r} was not perturbed in the forward (it is not used, "
            "or not through its module): freeze it with requires_grad_(False) before wrapping"
        )


def _call(
    current: Pass, layer: Layer, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """What a layer's module runs instead of its own forward."""
    if current.listener is None or not (layer.head or layer.swaps):
        return layer.call(current, layer, forward, args, kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        return layer.call(current, layer, forward, args, kwargs)

    return current.listener.layer(current, layer, run, args, kwargs)


def _call_tail(listener: Listener, name: str, run: Any, *args: Any, **kwargs: Any) -> Any:
    return listener.tail(name, run, args, kwargs)


_call_untraced: Callable[..., Any] = torch.compiler.disable(_call)  # type: ignore[no-untyped-call]
