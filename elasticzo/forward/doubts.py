"""What a first forward is asked once it ran: did each half read what it reads alone?

The first point runs alone, from the same start. What differs was cut in the wrong place: the module
around is to run by half. The same is asked of samples, of state that modules keep, and of
parametrisations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from elasticzo.buffers import has_values
from elasticzo.forward.halves import KeepsState, NotByHalf, NotBySample, WritesInput
from elasticzo.forward.layers.whole import run_whole
from elasticzo.forward.parts import Parts
from elasticzo.forward.passes import Layer, Pass
from elasticzo.forward.plan import Plan
from elasticzo.forward.state import Place, Start, holds_tensors
from elasticzo.forward.trees import same_values
from elasticzo.head import BY_SAMPLE, Head

Alone = Callable[[Any], Parts]  # the first point on these inputs, and what its layers read
FEW = 4  # samples of which a half is no batch
FINER = 16.0  # how much smaller the second perturbation is by which a jump is told from a bend
JUMPS = (
    "the parametrisation of {!r} ({}) jumps where its parameters move by eps={:g}: the perturbed "
    "layer is none that is near; use a smooth one (of orthogonal, orthogonal_map='cayley' or "
    "'matrix_exp'), or freeze it with requires_grad_(False) before wrapping"
)


@dataclass
class Doubts:
    """Of one observed forward.

    Attributes:
        places: attributes that it changed. alone: see `Alone`; from `start`.
    """

    current: Pass
    plan: Plan
    head: Head
    model: nn.Module
    start: Start
    places: Sequence[Place]
    alone: Alone
    inputs: Any

    def settle(self, output: Any, stacked: bool, feedback: bool) -> None:
        """Raise what the plan has to take into account."""
        if stacked:
            self._check_inputs()
        by_sample = any(kind.name in BY_SAMPLE for kind in self.head.kinds.values())
        if stacked or by_sample or feedback or self.places:
            alone = self.alone(self.inputs)
            if self.places:
                self._check_state(alone, stacked, feedback)
            if stacked:
                assert self.current.parts is not None
                self.current.parts.note("", pytree.tree_map_only(Tensor, lambda t: t[0], output))
                self._check_halves(self.current.parts, alone)
            if by_sample or feedback:
                self._check_samples(alone)
        if self.current.staging.points.halves:
            self._check_parametrised()

    def explain(self) -> None:
        """The halves failed together: raise where a layer got something else than alone."""
        assert self.current.parts is not None
        try:
            alone = self.alone(self.inputs)
        except Exception:
            return
        self._check_halves(self.current.parts, alone)

    def _check_inputs(self) -> None:
        """A write through `.data` has no version: the halves of an input agree no more."""
        for stacked, _, half in self.current.batched.values():
            parts = stacked.chunk(self.current.halves)
            unread = self.current.original(stacked) is None
            if not (unread or all(same_values(part, half) for part in parts)):
                raise WritesInput

    def _check_halves(self, stacked: Parts, alone: Parts) -> None:
        for name in stacked.differ(alone):
            raise NotByHalf(
                self.plan.layers[name] if name else Layer("output", self.model, run_whole)
            )

    def _check_samples(self, alone: Parts) -> None:
        """What does not have the samples in front is not as many fewer as they are (fewer, so that
        a first step needs no more memory); where the model runs at one size of batch alone, it
        stays as it is while they take other places."""
        batch = self.current.batch
        if batch is None:
            return
        self.start.restore()
        try:
            if batch < FEW:
                size, other = 2 * batch, self._of_samples(lambda t: torch.cat([t, t]))
            else:
                size, other = batch // 2, self._of_samples(lambda t: t[: batch // 2])
            found = set(alone.without_rows(self.alone(other), batch, size))
        except NotBySample:
            raise
        except Exception:
            self.start.restore()
            found = set(alone.stay(self.alone(self._of_samples(lambda t: t.roll(1, 0))), batch))
        for layer in (self.plan.layers[name] for name in found if name):
            if layer.kind.name in BY_SAMPLE:
                raise NotBySample(layer, "dimension 0 of its input is not the batch")
            layer.in_front = False

    def _of_samples(self, change: Callable[[Tensor], Tensor]) -> Any:
        """The inputs, with a change to those that have the batch."""
        batch = self.current.batch
        return pytree.tree_map_only(
            Tensor, lambda t: change(t) if t.dim() and len(t) == batch else t, self.inputs
        )

    # ---- state in attributes

    def _check_state(self, alone: Parts, stacked: bool, feedback: bool) -> None:
        """Whether the next forward is another one for what this one left in attributes."""
        names = self._names()
        self.start.buffers.restore()
        self.start.rewind()
        try:
            matters = list(alone.differ(self.alone(self.inputs))) != []
        except Exception:  # of a hidden state of another batch, say
            matters = True
        if matters and feedback:
            raise ValueError(
                f"learnt feedback runs the model twice a step, but it keeps state in {names}: "
                "register it as a buffer, or hand it in as an input"
            )
        if matters and stacked and holds_tensors(self.places):
            raise KeepsState(names)

    def _names(self) -> str:
        of = {id(m): name for name, m in self.model.named_modules()}
        found = [f"{of[id(m)]}.{name}".lstrip(".") for m, name in self.places if id(m) in of]
        return ", ".join(sorted(found))

    # ---- parametrisations

    def _check_parametrised(self) -> None:
        """Refuse a parametrisation that jumps where its parameters move."""
        mine = {id(p): one for one, p in self.head}
        for name, module in self.model.named_modules():
            if not parametrize.is_parametrized(module):
                continue
            forms: Any = module.parametrizations
            for local, form in forms.items():
                own = {n: p for n, p in form.named_parameters() if id(p) in mine}
                if own and self._jumps(form, own, mine):
                    eps, kinds = (
                        float(self.current.staging.eps),
                        [type(one).__name__ for one in form],
                    )
                    raise ValueError(
                        JUMPS.format(f"{name}.{local}".lstrip("."), ", ".join(kinds), eps)
                    )

    @torch.no_grad()
    def _jumps(self, form: Any, own: dict[str, Any], heads: dict[int, Any]) -> bool:
        staging = self.current.staging
        z = {n: staging.weights(p, heads[id(p)], None)[-1] - p for n, p in own.items()}

        def bend(size: float) -> bool:
            """Whether both sides together are further from `w` than they are from each other."""
            plus, still, minus = (
                functional_call(form, {n: p + s * size * z[n] for n, p in own.items()}, ())
                for s in (1.0, 0.0, -1.0)
            )
            far = (plus + minus - 2 * still).norm() > 0.5 * (plus - minus).norm()
            return has_values(far) and bool(far)

        return bend(1.0) and bend(1.0 / FINER)
